//! Commands from a file or a pipe: plain lines, and the exit code of the first failure.

use std::{
    io::Write,
    path::Path,
    process::{Output, Stdio},
};

use crate::{folder, program};

fn pipe(folder: &Path, script: &str) -> Output {
    let mut command = program(folder);
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program runs");
    child.stdin.take().expect("a pipe").write_all(script.as_bytes()).expect("the program reads");
    child.wait_with_output().expect("the program ends")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

#[test]
fn a_script_paints_with_plain_lines_and_without_a_prompt() {
    let folder = folder();
    let script = "# paint twice\nworkflow load paint\narg set prompt=\"the sea at night\"\nseed 4\n\
                  workflow run\nrun\noutputs\nexit\nnonsense\n";
    let output = pipe(folder.path(), script);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{out}\n{err}");
    assert!(!out.contains("dw>") && !out.contains('\u{1b}') && !err.contains('\u{1b}'), "{out}\n{err}");
    assert!(out.starts_with("Loaded workflow: landscape\n"), "{out}");
    let file = "landscape-paint.0-0.0.png\n";
    assert_eq!(out.matches(file).count(), 4, "a line for each file as it is written, and those of `outputs`: {out}");
    assert!(out.ends_with("Goodbye!\n"), "{out}");
    assert!(err.contains("'run' is now 'workflow run'") && err.contains("  denoise 2/2"), "{err}");
    assert_eq!(err.matches("Finished landscape in ").count(), 2, "{err}");
    assert_eq!(err.matches("\n  seed  4").count(), 2, "{err}");
    assert!(!folder.path().join(".local/share/dw/history").exists(), "a script is no history");
}

#[test]
fn the_exit_code_is_that_of_the_first_failure_and_the_rest_is_done() {
    let folder = folder();
    fs_err::write(folder.path().join("file"), "").expect("a file");
    let cases = [
        ("", 0),
        ("help\nworkflow status\n", 0),
        ("nonsense\nhelp\n", 2),
        ("workflow load missing\n", 2),
        ("workflow run\n", 2),
        ("workflow load paint\nconfig set output_dir file\nworkflow run\nnonsense\n", 1),
        ("nonsense\nexit\n", 2),
    ];
    for (script, code) in cases {
        let output = pipe(folder.path(), script);
        assert_eq!(output.status.code(), Some(code), "{script}\n{}", text(&output.stderr));
    }
    let output = pipe(folder.path(), "nonsense\nseed 5\n");
    assert_eq!(text(&output.stdout), "Seed: 5\n");
    assert!(text(&output.stderr).starts_with("Unknown command: nonsense\n"));
}

#[test]
fn faults_of_a_workflow_are_shown_as_validate_shows_them() {
    let folder = folder();
    let paint = fs_err::read_to_string(folder.path().join("paint.json")).expect("the workflow");
    fs_err::write(folder.path().join("bad.json"), paint.replace("variable:steps", "variable:stps"))
        .expect("a workflow");
    let output = pipe(folder.path(), "workflow load bad.json\n");
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("bad.json:") && err.contains("= help: did you mean `variable:steps`?"), "{err}");
}

#[test]
fn settings_that_are_saved_hold_in_the_next_call() {
    let folder = folder();
    assert_eq!(pipe(folder.path(), "config set preview off\nconfig save\n").status.code(), Some(0));
    let output = pipe(folder.path(), "config show\n");
    assert!(text(&output.stdout).contains("  preview=off\n"), "{}", text(&output.stdout));
}
