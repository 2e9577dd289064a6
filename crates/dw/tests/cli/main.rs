//! The program from outside: the real binary, its exit codes and what it prints.

mod bad_input;
mod catalog;
mod host;
mod metadata;
mod quantize;
mod run;
mod settings;
mod usage;
mod validate;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

/// A folder to run the program in, which is also its home: nothing of the machine's own settings,
/// caches or tokens is seen.
struct Sandbox {
    folder: TempDir,
    variables: Vec<(&'static str, String)>,
}

/// What the program did.
#[derive(Debug)]
struct Outcome {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Sandbox {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder"), variables: Vec::new() }
    }

    /// With an environment variable.
    fn set(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.variables.push((name, value.into()));
        self
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file, and the folders above it.
    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs_err::create_dir_all(path.parent().expect("a folder")).expect("the folder");
        fs_err::write(&path, text).expect("the file");
        path
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dw"));
        let home = self.folder.path();
        command.args(words).current_dir(home).env_clear().stdin(Stdio::null());
        command.env("HOME", home).env("USERPROFILE", home).env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.envs(self.variables.iter().map(|(name, value)| (*name, value)));
        command
    }

    fn run(&self, words: &[&str]) -> Outcome {
        Outcome::new(self.command(words).output().expect("the program runs"))
    }

    /// Runs with `input` on standard input.
    fn pipe(&self, words: &[&str], input: &str) -> Outcome {
        let mut command = self.command(words);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program runs");
        // The program may end without reading its input.
        let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
        Outcome::new(child.wait_with_output().expect("the program ends"))
    }
}

impl Outcome {
    fn new(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).expect("UTF-8"),
            err: String::from_utf8(output.stderr).expect("UTF-8"),
        }
    }

    /// Checks the exit code and hands out both streams.
    #[track_caller]
    fn exits(self, code: i32) -> (String, String) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        (self.out, self.err)
    }
}
