//! Every command and message of the loop, with a stand-in for the worker. What the real worker does is
//! told by the tests of the program (`tests/repl`).

use std::{
    cell::RefCell,
    collections::{BTreeSet, VecDeque},
    path::Path,
    rc::Rc,
};

use dw_core::{event::Event, seed::Seed};
use dw_engine::{
    LatentPreview, LoadedComponent, MemoryReport, Summary,
    worker::{CancelSwitch, CrashReport, Finished, Job, Update, WorkerError},
};
use serde_json::json;
use tempfile::TempDir;

use super::{lines::Script, *};
use crate::settings::SettingsFile;

/// A workflow that needs no model.
const WORKFLOW: &str = r#"{
  "id": "code",
  "variables": { "text": "hello", "side": 64, "sharp": true },
  "steps": [
    {
      "name": "draw",
      "task": {
        "command": "qr_code",
        "arguments": { "qr_code_contents": "variable:text", "width": "variable:side", "height": "variable:side" }
      },
      "result": { "content_type": "image/png" }
    },
    { "name": "note", "task": { "command": "gather_inputs", "inputs": ["variable:sharp"] } }
  ]
}"#;

/// What a stand-in was told, and how its next runs end; a run without an end here is fine.
#[derive(Default)]
struct Told {
    running: bool,
    jobs: Vec<Job>,
    ends: VecDeque<WorkerError>,
}

/// A worker that says that it ran.
#[derive(Clone, Default)]
struct StandIn(Rc<RefCell<Told>>);

fn report(run_count: u64) -> MemoryReport {
    MemoryReport {
        device_name: "cpu".into(),
        allocated: 1_500_000,
        reserved: Some(20_000_000),
        free: Some(3_000_000_000),
        total: None,
        components: vec![LoadedComponent {
            name: "unet".into(),
            class: "UNet2DConditionModel".into(),
            bytes: 1_500_000,
            workflows: BTreeSet::new(),
        }],
        run_count,
        ..MemoryReport::default()
    }
}

impl Worker for StandIn {
    fn is_running(&mut self) -> bool {
        self.0.borrow().running
    }

    fn process_id(&self) -> Option<u32> {
        self.0.borrow().running.then_some(4711)
    }

    fn execute(
        &mut self,
        job: &Job,
        updates: &mut dyn FnMut(Update),
        _: &CancelSwitch,
    ) -> Result<Finished, WorkerError> {
        let mut told = self.0.borrow_mut();
        told.running = true;
        told.jobs.push(job.clone());
        let seed = job.seed.clone().unwrap_or(Seed::One(11));
        let file = job.output_dir.join(format!("picture-{}.png", told.jobs.len()));
        updates(Update::Output("Reusing loaded models from cache".into()));
        updates(Update::Event(Event::RunStarted {
            workflow: "code".into(),
            steps: 1,
            seed: seed.clone(),
            random_seed: false,
        }));
        if job.preview_every.is_some() {
            updates(Update::Preview(LatentPreview { step: 1, of: 2, png: b"a picture".to_vec() }));
        }
        updates(Update::Event(Event::FileWritten { path: file.clone() }));
        if let Some(error) = told.ends.pop_front() {
            told.running = !matches!(error, WorkerError::Crashed(_));
            return Err(error);
        }
        let summary =
            Summary { workflow: "code".into(), files: vec![file], seed: Some(seed), random_seed: false, seconds: 1.0 };
        let run_count = told.jobs.len() as u64;
        Ok(Finished { summary, run_count, memory: report(run_count) })
    }

    fn memory(&mut self) -> Result<MemoryReport, WorkerError> {
        Ok(report(self.0.borrow().jobs.len() as u64))
    }

    fn clear_memory(&mut self) -> Result<MemoryReport, WorkerError> {
        let report = report(self.0.borrow().jobs.len() as u64);
        Ok(MemoryReport { allocated: 0, components: Vec::new(), ..report })
    }

    fn shutdown(&mut self) {
        self.0.borrow_mut().running = false;
    }
}

/// A loop in a folder of its own.
struct Bench {
    folder: TempDir,
    session: Session,
    worker: StandIn,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs_err::write(folder.path().join("code.json"), WORKFLOW).expect("a workflow");
        fs_err::create_dir(folder.path().join("pictures")).expect("a folder");
        let session = Session {
            settings: SettingsFile::default(),
            log_file: Ok(None),
            log_level: None,
            quiet: true,
            logs_to_console: false,
        };
        Self { folder, session, worker: StandIn::default() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// A loop that answers its own questions with these lines.
    fn repl(&self, answers: &'static str) -> Repl<'_> {
        let worker = self.worker.clone();
        Repl {
            session: &self.session,
            state: State::default(),
            config: Config {
                workflow_dir: self.folder.path().into(),
                output_dir: self.folder.path().join("pictures"),
                ..Config::default()
            },
            config_file: Some(self.folder.path().join("settings/repl.json")),
            worker: Box::new(worker.clone()),
            hire: Box::new(move |_| Box::new(worker.clone())),
            lines: Box::new(Script { input: answers.as_bytes(), number: 0 }),
            interrupts: Interrupts::new(false),
            cancelled: false,
        }
    }

    /// What the last of these lines answers, `DIR` standing for the folder, without colours.
    fn says(&self, lines: &[&str]) -> String {
        self.says_with("", lines)
    }

    fn says_with(&self, answers: &'static str, lines: &[&str]) -> String {
        let folder = self.folder.path().display().to_string();
        let mut repl = self.repl(answers);
        let mut said = String::new();
        for line in lines {
            said = match repl.execute(&line.replace("DIR", &folder)) {
                Ok(reply) => reply.notices.join("\n") + &reply.answer,
                Err(failure) => {
                    let code = failure.exit as u8;
                    format!("{}\n({code}) {}\n", failure.notices.join("\n"), failure.message).trim_start().to_owned()
                }
            };
        }
        console::strip_ansi_codes(&said).replace(&folder, "DIR").replace('\\', "/")
    }
}

const LOAD: &str = "workflow load code";

#[test]
fn commands_without_a_workflow_say_what_is_missing() {
    let bench = Bench::new();
    for line in ["arg show", "arg", "arg set a=1", "workflow run", "run", "workflow run ask text", "workflow reload"] {
        let expected = "(2) Error: No workflow loaded. Use 'workflow load' command first\n";
        assert_eq!(bench.says(&[line]), expected, "{line}");
    }
}

#[test]
fn answers_to_single_lines() {
    let bench = Bench::new();
    let cases = [
        ("", ""),
        ("# a remark", ""),
        ("memory show", "No worker process running\n"),
        ("memory clear", "No worker process running\n"),
        ("clear", "No worker process running\n"),
        ("model ?", "(2) Unknown command: model ?\nDid you mean 'models'? Type 'help' or '?' for a list of commands\n"),
        ("status", "(2) Unknown command: status\nType 'help' or '?' for a list of commands\n"),
        (
            "workfow load x",
            "(2) Unknown command: workfow load x\nDid you mean 'workflow'? Type 'help' or '?' for a list of commands\n",
        ),
        (
            "workflow lod x",
            "(2) Unknown workflow subcommand: lod\nDid you mean 'workflow load'? Use 'workflow ?' for help\n",
        ),
        ("memory x", "(2) Unknown memory subcommand: x\nUse 'memory ?' for help\n"),
        ("workflow load", "(2) Error: Please specify a workflow file path or name\n"),
        ("workflow load a b", "(2) Error: A workflow is one file; put a path with spaces in quotes\n"),
        ("workflow load nope", "(2) Error: Invalid workflow path: Path does not exist: "),
        ("workflow load DIR", "(2) Error: Invalid workflow path: `DIR` is a folder; name a file in it"),
        ("workflow load DIR/code.json", "Loaded workflow: code\nWorkflow validated successfully\n"),
        ("workflow load code.json", "Loaded workflow: code\nWorkflow validated successfully\n"),
        ("workflow load \"code\"", "Loaded workflow: code\nWorkflow validated successfully\n"),
        ("workflow load 'code", "(2) Error: the quote ' is not closed"),
        ("workflow run now", "(2) Error: 'workflow run' takes no arguments, but there is 'now'\n"),
        (
            "workflow status",
            "No workflow currently loaded\nSeed: drawn at random for each run, unless a step names one\nWorker: not running",
        ),
        ("workflow restart", "No worker process running\nWorker will start on next run\n"),
        ("config set log_level=loud", "(2) Error: Log level must be one of: DEBUG, INFO, WARNING, ERROR, CRITICAL\n"),
        ("config set log_level=debug", "Log level set to DEBUG\nSet log_level=DEBUG\n"),
        ("config set preview off", "Set preview=off\n"),
        (
            "config set preview=loud",
            "(2) Error: 'loud' is no value of preview; it takes auto, kitty, iterm, sixel, blocks, off\n",
        ),
        ("config set preview_every 5", "Set preview_every=5\n"),
        ("config set preview", "(2) Error: Invalid format. Use: config set name=value\n"),
        (
            "config set previw off",
            "(2) Error: Unknown setting 'previw'. Did you mean 'preview'? Settings: output_dir, ",
        ),
        ("config set output_dir=DIR/pictures", "Set output_dir=DIR/pictures\n"),
        (
            "config set output_dir \"DIR/two words\"",
            "Warning: Directory 'DIR/two words' does not exist; the next run makes it",
        ),
        ("config set workflow_dir DIR/none", "(2) Error: Invalid workflow directory: `DIR/none` is not a folder\n"),
        (
            "config set cache_budget lots",
            "(2) Error: 'lots' is no value of cache_budget; it takes a size as 6GB, or auto\n",
        ),
        ("config set device tpu", "(2) Error: `tpu` is not a device; use cpu, cuda, cuda:N, metal or auto\n"),
        ("config save", "Saved to DIR/settings/repl.json\n"),
        ("outputs", "No files written in this session\n"),
        ("outputs many", "(2) Error: 'many' is not a number of files; use: outputs 20\n"),
        ("seed", "Seed: drawn at random for each run, unless a step names one\n"),
        ("seed 42", "Seed: 42\n"),
        ("seed 1,2", "Seed: 1,2\n"),
        ("seed x", "(2) Error: 'x' is no seed; use a whole number, N,N,..., keep or random\n"),
        ("seed keep", "(2) Error: There is no seed to keep yet: nothing has run in this session\n"),
        ("help nonsense", "(2) No help for 'nonsense'\nType 'help' or '?' for a list of commands\n"),
        ("exit", "Goodbye!\n"),
        ("quit", "Goodbye!\n"),
    ];
    for (line, expected) in cases {
        let said = bench.says(&[line]);
        assert!(said.starts_with(expected), "{line}\n  says     {said:?}\n  expected {expected:?}");
    }
}

#[test]
fn answers_with_a_workflow_loaded() {
    let bench = Bench::new();
    let cases: [(&[&str], &str); 26] = [
        (
            &["arg show"],
            "Available variables in workflow and their default values:\n  text=hello\n  side=64\n  sharp=true\n\
             Current argument values:\n  No arguments set\n",
        ),
        (&["arg set text=\"two words\""], "Set argument text=two words\n"),
        (&["arg set text=two words side=32"], "Set argument text=two words\nSet argument side=32\n"),
        (&["arg text=old"], "Set argument text=old\n"),
        (&["arg set text="], "Set argument text=\n"),
        (&["arg set text=a=b"], "Set argument text=a=b\n"),
        (&["arg set"], "(2) Error: Please specify an argument\nUsage: arg set name=value\n"),
        (&["arg set text"], "(2) Error: Invalid format. Use: arg set name=value\n"),
        (
            &["arg set nope=1"],
            "(2) Error: 'nope' is not defined in workflow variables\nAvailable variables: text, side, sharp\n",
        ),
        (
            &["arg set text=a sid=3"],
            "(2) Error: 'sid' is not defined in workflow variables\nAvailable variables: text, side, sharp\nDid you mean 'side'?\n",
        ),
        (&["arg set bad;name=1"], "(2) Error: Invalid input: Invalid variable name: bad;name\n"),
        (&["arg set side=wide"], "(2) Error: Invalid input: variable `side` expects a whole number, found "),
        (
            &["arg set sharp=perhaps"],
            "(2) Error: Invalid input: Cannot interpret 'perhaps' as true/false for variable 'sharp'",
        ),
        (&["arg set text=x", "arg clear"], "All workflow arguments cleared\n"),
        (&["arg set text=x side=3", "arg clear side"], "Cleared argument side\n"),
        (&["arg clear side"], "(2) Error: no value is set for 'side'\n"),
        (&["arg nonsense"], "(2) Unknown arg subcommand: nonsense\nUse 'arg ?' for help\n"),
        (
            &["arg set text=x", LOAD],
            "Loaded workflow: code\nWorkflow validated successfully\nAll workflow arguments cleared\n",
        ),
        (
            &["workflow reload"],
            "Reloading workflow from: DIR/code.json\nReloaded workflow: code\nWorkflow validated successfully\n",
        ),
        (&["workflow status"], "Current workflow: code\nFile: DIR/code.json\nSeed: drawn at random"),
        (&["workflow run ask"], "(2) Error: Please specify an argument name\nUsage: workflow run ask <arg_name>\n"),
        (
            &["workflow run ask nope"],
            "(2) Error: 'nope' is not defined in workflow variables\nAvailable variables: text, side, sharp\n",
        ),
        (&["workflow run ask text"], "(130) Cancelled\n"),
        (&["workflow save DIR/new.json"], "Saved to DIR/new.json\n"),
        (&["workflow save DIR/settings"], "Saved to DIR/settings.json\n"),
        (&["help arg set"], "arg set NAME=VALUE ...\n  Set variables for the runs that follow.\n"),
    ];
    for (lines, expected) in cases {
        let lines: Vec<&str> = std::iter::once(LOAD).chain(lines.iter().copied()).collect();
        let said = bench.says(&lines);
        assert!(said.starts_with(expected), "{lines:?}\n  says     {said:?}\n  expected {expected:?}");
    }
}

#[test]
fn all_or_none_of_several_values_are_set() {
    let bench = Bench::new();
    let said = bench.says(&[LOAD, "arg set text=x side=wide", "arg show"]);
    assert!(said.ends_with("No arguments set\n"), "{said}");
}

#[test]
fn a_workflow_with_faults_shows_all_of_them_and_does_not_take_the_place_of_the_current_one() {
    let bench = Bench::new();
    fs_err::write(
        bench.path("bad.json"),
        WORKFLOW.replace("variable:text", "variable:txt").replace("qr_code\"", "qr\""),
    )
    .expect("a workflow");
    let said = bench.says(&[LOAD, "workflow load bad"]);
    assert!(said.contains("DIR/bad.json:8:") && said.contains("DIR/bad.json:9:"), "{said}");
    assert!(said.contains("did you mean") && said.contains(" | "), "{said}");
    assert!(said.ends_with("(2) Error: Workflow validation failed: 2 errors; still loaded: code\n"), "{said}");
    assert!(bench.says(&["workflow load bad"]).ends_with("(2) Error: Workflow validation failed: 2 errors\n"));
}

#[test]
fn a_run_gets_values_seed_folder_and_settings() {
    let bench = Bench::new();
    bench.says(&[
        LOAD,
        "arg set text=\"it's\" side=32",
        "seed 1,2",
        "config set preview_every 3",
        "config set metadata off",
        "config set log_level warning",
        "run",
    ]);
    let told = bench.worker.0.borrow();
    let job = &told.jobs[0];
    assert_eq!(json!(job.variables), json!({"text": "it's", "side": "32"}));
    assert_eq!((job.seed.clone(), job.preview_every, job.metadata), (Some(Seed::Each(vec![1, 2])), Some(3), false));
    assert_eq!((job.workflow.clone(), job.log_level.as_str()), (bench.folder.path().join("code.json"), "WARNING"));
    assert_eq!(job.output_dir, bench.folder.path().join("pictures"));
}

#[test]
fn previews_are_kept_in_a_file() {
    let bench = Bench::new();
    bench.says(&[LOAD, "config set preview_every 1", "run"]);
    assert_eq!(fs_err::read(bench.path("pictures/preview.png")).expect("the file"), b"a picture");
}

#[test]
fn files_and_the_seed_of_runs_are_remembered() {
    let bench = Bench::new();
    let runs = [LOAD, "workflow run", "workflow run"];
    let after = |line| bench.says(&[&runs[..], &[line]].concat());
    assert_eq!(after("outputs 1").lines().count(), 1);
    assert_eq!(after("outputs").lines().count(), 2);
    assert_eq!(
        after("seed"),
        "Seed: drawn at random for each run, unless a step names one\nLast run: 11 ('seed keep' stays with it)\n"
    );
    assert_eq!(after("seed keep"), "Seed: 11\n");
    let status = after("workflow status");
    assert!(status.ends_with("Worker: running, process 4711\nFinished in this session: 2 runs, 2 files\n"), "{status}");
}

#[test]
fn a_value_can_be_asked_for() {
    let bench = Bench::new();
    bench.says_with(" from the answer \n", &[LOAD, "workflow run ask text"]);
    assert_eq!(json!(bench.worker.0.borrow().jobs[0].variables), json!({"text": "from the answer"}));
}

#[test]
fn an_edited_file_is_followed_and_its_faults_stop_the_run() {
    let bench = Bench::new();
    let mut repl = bench.repl("");
    let mut run = |line: &str| repl.execute(line).map_err(|failure| failure.message);
    run(LOAD).expect("loaded");
    run("arg set side=32").expect("set");
    fs_err::write(bench.path("code.json"), WORKFLOW.replace("side", "edge")).expect("edited");
    run("run").expect("a run");
    assert_eq!(json!(bench.worker.0.borrow().jobs[0].variables), json!({}), "the value went with its variable");
    fs_err::write(bench.path("code.json"), "{").expect("edited");
    let message = run("run").expect_err("broken");
    assert!(message.starts_with("Error validating workflow '") && message.ends_with("1 error"), "{message}");
    assert_eq!(bench.worker.0.borrow().jobs.len(), 1);
    fs_err::remove_file(bench.path("code.json")).expect("removed");
    assert!(run("run").is_err());
}

#[test]
fn memory_is_told_in_sizes_that_people_read() {
    let bench = Bench::new();
    let shown = bench.says(&[LOAD, "run", "memory show"]);
    for expected in
        ["Device", "cpu", "1.5 MB", "3.0 GB", "not known", "Runs in this session: 1", "UNet2DConditionModel"]
    {
        assert!(shown.contains(expected), "{expected}: {shown}");
    }
    let cleared = bench.says(&[LOAD, "run", "memory clear"]);
    assert!(cleared.ends_with("Loaded: nothing\nMemory cleared successfully\n"), "{cleared}");
    let models = bench.says(&[LOAD, "run", "models"]);
    assert!(models.contains("unet") && models.contains("  builtin:landscapes\n"), "{models}");
}

#[test]
fn a_crash_a_cancellation_and_an_error_are_told_and_the_loop_goes_on() {
    let bench = Bench::new();
    let crash = CrashReport {
        signal: Some(9),
        log_lines: vec!["the last words".into()],
        advice: "try again".into(),
        ..CrashReport::default()
    };
    bench.worker.0.borrow_mut().ends.extend([
        WorkerError::Crashed(Box::new(crash)),
        WorkerError::Cancelled,
        WorkerError::Unreachable("nobody answers".into()),
    ]);
    let mut repl = bench.repl("");
    repl.execute(LOAD).expect("loaded");
    let failure = repl.execute("run").expect_err("a crash");
    assert!(failure.notices.join("\n").contains("the last words"));
    assert!(failure.message.contains("SIGKILL") && failure.message.ends_with("The next run starts a fresh worker."));
    assert_eq!(failure.exit, Exit::Failed);
    assert!(!repl.worker.is_running());
    let failure = repl.execute("run").expect_err("cancelled");
    assert_eq!((failure.message.as_str(), failure.exit, repl.cancelled), ("", Exit::Cancelled, true));
    let failure = repl.execute("run").expect_err("unreachable");
    assert!(failure.message.contains("nobody answers"), "{}", failure.message);
    assert!(repl.execute("run").is_ok());
    assert_eq!(repl.state.outputs.len(), 4, "what was finished before the end counts");
}

#[test]
fn settings_of_the_worker_end_it_and_others_do_not() {
    let bench = Bench::new();
    let said = bench.says(&[LOAD, "run", "config set preview off"]);
    assert!(!said.contains("worker"), "{said}");
    let said = bench.says(&[LOAD, "run", "config set device cpu"]);
    assert_eq!(said, "Set device=cpu\nThe worker was ended, for the next run needs a fresh one\n");
    assert!(!bench.worker.0.borrow().running);
}

#[test]
fn settings_that_were_saved_hold_the_next_time() {
    let bench = Bench::new();
    bench.says(&["config set preview off", "config set preview_every 4", "config save"]);
    let (config, warnings) = Config::default().with_file(Path::new(&bench.path("settings/repl.json")));
    assert_eq!((config.preview_every, warnings), (4, Vec::new()));
    let shown = bench.says(&["config set preview off", "config show"]);
    assert!(shown.starts_with("Current configuration:\n  output_dir=DIR/pictures\n"), "{shown}");
    assert!(shown.contains("  preview=off\n"), "{shown}");
}

#[test]
fn a_workflow_is_saved_with_values_and_seed_and_other_files_stay() {
    let bench = Bench::new();
    let said = bench.says(&[LOAD, "arg set text=new side=32", "seed 5", "workflow save DIR/other.json"]);
    assert_eq!(said, "Saved to DIR/other.json\n");
    let saved: serde_json::Value =
        serde_json::from_str(&fs_err::read_to_string(bench.path("other.json")).expect("the file")).expect("JSON");
    assert_eq!(saved["variables"], json!({"text": "new", "side": 32, "sharp": true}));
    let keys: Vec<_> = saved.as_object().expect("an object").keys().collect();
    assert_eq!(keys, ["id", "variables", "seed", "steps"]);
    let said = bench.says(&[LOAD, "workflow save DIR/other.json"]);
    assert_eq!(said, "(2) Error: `DIR/other.json` exists already; choose another name, or remove it\n");
    assert_eq!(bench.says(&[LOAD, "arg set side=16", "workflow save"]), "Saved to DIR/code.json\n");
    assert!(fs_err::read_to_string(bench.path("code.json")).expect("the file").contains("\"side\": 16"));
    assert!(bench.says(&[LOAD, "workflow save DIR/pictures/moved"]).starts_with("Warning: relative paths"));
}

#[test]
fn help_is_there_at_every_level() {
    let bench = Bench::new();
    let overview = bench.says(&["help"]);
    let in_one_line = overview.split_whitespace().collect::<Vec<_>>().join(" ");
    for command in commands::COMMANDS {
        assert!(in_one_line.contains(command.name) && in_one_line.contains(command.summary), "{}", command.name);
        let said = bench.says(&[&format!("{} ?", command.name)]);
        assert!(said.starts_with(command.name), "{} says {said}", command.name);
        assert_eq!(said, bench.says(&[&format!("help {}", command.name)]), "{}", command.name);
    }
    assert_eq!(overview, bench.says(&["?"]));
    assert_eq!(bench.says(&["workflow"]), bench.says(&["?workflow"]));
    assert_eq!(bench.says(&["arg ?"]), bench.says(&["help arg"]));
    assert!(bench.says(&["workflow load ?"]).contains("code.json"));
    assert!(bench.says(&["config set preview ?"]).contains("(auto, kitty, iterm, sixel, blocks, off)"));
    let variables = bench.says(&[LOAD, "arg set ?"]);
    assert!(
        variables.contains("text") && variables.contains("hello") && variables.contains("true, false"),
        "{variables}"
    );
}

#[test]
fn a_script_goes_on_after_a_failure_and_ends_with_its_code() {
    let bench = Bench::new();
    let mut repl = bench.repl("workflow load code\narg set nope=1\nrun\nnonsense\n");
    assert_eq!(repl.run(None).expect("a script"), Exit::Usage);
    assert_eq!(bench.worker.0.borrow().jobs.len(), 1);
    assert!(!bench.worker.0.borrow().running, "the worker is ended with the loop");
    bench.worker.0.borrow_mut().ends.push_back(WorkerError::Cancelled);
    let mut repl = bench.repl("run\nrun\n");
    repl.execute(LOAD).expect("loaded");
    assert_eq!(repl.run(None).expect("a script"), Exit::Cancelled);
    assert_eq!(bench.worker.0.borrow().jobs.len(), 2, "whoever stops a run stops the script");
    let mut repl = bench.repl("exit\nnonsense\n");
    assert_eq!(repl.run(Some(Path::new(&bench.path("code.json")))).expect("a script"), Exit::Done);
    let mut repl = bench.repl("");
    assert_eq!(repl.run(Some(Path::new("nope.json"))).expect("a script"), Exit::Usage);
}
