//! `dw repl` from outside: the real program with its real worker and the model inside, driven through
//! standard input. What single commands say is told by the tests beside them.

#[cfg(unix)]
mod deaths;
mod runs;
mod scripts;

use std::{
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{self, Receiver, Sender},
    thread,
    time::Duration,
};

use tempfile::TempDir;

/// Far more than anything here takes; only a program that hangs waits so long.
const PATIENCE: Duration = Duration::from_mins(5);

/// A loop that is running, in a folder that is also its home.
struct Talk {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    folder: TempDir,
    /// How often it was asked for a sign.
    signs: u32,
}

/// A folder with a workflow that paints with the model inside, in a few steps.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/landscape.json");
    let text = fs_err::read_to_string(example).expect("the example is in the repository");
    let text = text.replace("\"steps\": 25", "\"steps\": 2");
    assert!(text.contains("\"steps\": 2,"), "the example's steps were found");
    fs_err::write(folder.path().join("paint.json"), text).expect("a workflow");
    folder
}

/// The program, with nothing of the machine's own settings.
fn program(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dw"));
    command.args(["repl", "--offline", "--device", "cpu"]).current_dir(folder).env_clear();
    command.env("HOME", folder).env("USERPROFILE", folder);
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

impl Talk {
    /// Starts the loop and loads the workflow.
    fn start() -> Self {
        let folder = folder();
        let mut command = program(folder.path());
        let command = command.arg("paint.json").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program runs");
        let (sender, lines) = mpsc::channel();
        forward(child.stdout.take().expect("a pipe"), sender.clone());
        forward(child.stderr.take().expect("a pipe"), sender);
        let mut talk = Self { input: child.stdin.take(), child, lines, folder, signs: 0 };
        talk.until("Workflow validated successfully");
        talk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Types a line.
    fn say(&mut self, line: &str) {
        let input = self.input.as_mut().expect("the loop listens");
        writeln!(input, "{line}").expect("the loop listens");
    }

    /// Everything up to and including a line that says something.
    #[track_caller]
    fn until(&mut self, words: &str) -> String {
        self.until_one_of(&[words])
    }

    /// Everything up to and including a line that says one of these things.
    #[track_caller]
    fn until_one_of(&mut self, choices: &[&str]) -> String {
        let mut heard = String::new();
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|_| panic!("no line says one of {choices:?}; heard:\n{heard}"));
            heard += &line;
            heard += "\n";
            if choices.iter().any(|words| line.contains(words)) {
                return heard;
            }
        }
    }

    /// Everything that is said until all commands so far are done: until a last word came on both streams,
    /// between which there is no order.
    #[track_caller]
    fn settle(&mut self) -> String {
        self.signs += 1;
        let unknown = format!("sign-{}", self.signs);
        self.say("config set log_level info");
        self.say(&unknown);
        let (answer, complaint) = ("Set log_level=INFO", format!("Unknown command: {unknown}"));
        let mut heard = self.until_one_of(&[answer, &complaint]);
        let missing = if heard.contains(answer) { &complaint } else { answer };
        heard += &self.until(missing);
        heard
    }

    /// Runs the workflow and hands out what was said.
    #[track_caller]
    fn run(&mut self) -> String {
        self.say("workflow run");
        let heard = self.settle();
        assert!(heard.contains("Finished landscape in "), "{heard}");
        heard
    }

    /// The worker's process, if there is one.
    #[track_caller]
    fn worker(&mut self) -> Option<u32> {
        self.say("workflow status");
        let heard = self.until("Worker: ");
        heard.rsplit_once("running, process ").and_then(|(_, rest)| rest.trim().parse().ok())
    }

    /// Ends the input and waits for the end; the exit code.
    #[track_caller]
    fn end(mut self) -> Option<i32> {
        drop(self.input.take());
        self.child.wait().expect("the program ends").code()
    }
}

impl Drop for Talk {
    /// A test that failed leaves nothing behind.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn forward(stream: impl Read + Send + 'static, sender: Sender<String>) {
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
}
