//! The worker as a process: the real binary, driven through `Supervisor`, against the built-in model. What is
//! checked is what arrives and what is left behind; never how long it takes.

#[cfg(unix)]
mod deaths;
mod models;
mod runs;
#[cfg(unix)]
mod wire;

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use dw_core::event::Event;
use dw_engine::{
    EngineConfig,
    worker::{CancelSwitch, Finished, Job, Supervisor, Update, WorkerError, WorkerLaunch},
};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// One test at a time has workers, so that what is left behind is its own.
static ALONE: Mutex<()> = Mutex::new(());

/// A folder to work in, which is also the worker's home.
struct Home {
    folder: TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Home {
    fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        Self { folder: tempfile::tempdir().expect("a temporary folder"), _alone: alone }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn launch(&self) -> WorkerLaunch {
        let home = self.folder.path().as_os_str();
        let environment = ["HOME", "USERPROFILE", "XDG_STATE_HOME", "XDG_CONFIG_HOME"];
        WorkerLaunch {
            environment: environment.iter().map(|name| (name.into(), home.into())).collect(),
            engine: EngineConfig { device: Some("cpu".into()), offline: true, ..EngineConfig::default() },
            log_file: Some(self.path("worker.log")),
            ..WorkerLaunch::new(env!("CARGO_BIN_EXE_dw"))
        }
    }

    fn supervisor(&self) -> Supervisor {
        Supervisor::new(self.launch())
    }

    fn write(&self, name: &str, value: &Value) -> PathBuf {
        let path = self.path(name);
        fs_err::write(&path, value.to_string()).expect("written");
        path
    }

    /// A workflow file with a picture of the built-in model.
    fn landscape(&self, name: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
        let mut workflow = landscape();
        change(&mut workflow);
        self.write(name, &workflow)
    }

    fn job(&self, workflow: &Path) -> Job {
        Job {
            workflow: workflow.to_owned(),
            variables: Map::new(),
            seed: None,
            output_dir: self.path("out"),
            metadata: true,
            preview_every: None,
            log_level: "INFO".into(),
        }
    }

    /// The names of the files in the output folder.
    fn files(&self) -> Vec<String> {
        let Ok(entries) = fs_err::read_dir(self.path("out")) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

/// Three steps on a picture of 64 x 64.
fn landscape() -> Value {
    json!({
        "id": "landscape",
        "seed": 7,
        "steps": [{
            "name": "paint",
            "pipeline": {
                "configuration": { "component_type": "StableDiffusionXLPipeline" },
                "from_pretrained_arguments": { "model_name": "builtin:landscapes" },
                "arguments": {
                    "prompt": "mountains at day",
                    "num_inference_steps": 3,
                    "height": 64,
                    "width": 64
                }
            },
            "result": { "content_type": "image/png" }
        }]
    })
}

/// Everything that arrives in a run, and how it ends.
struct Run {
    updates: Vec<Update>,
    result: Result<Finished, WorkerError>,
}

impl Run {
    fn of(supervisor: &mut Supervisor, job: &Job) -> Self {
        Self::watched(supervisor, job, |_, _| {})
    }

    /// Runs with `watch` on everything that arrives; it gets the switch that stops the run.
    fn watched(supervisor: &mut Supervisor, job: &Job, mut watch: impl FnMut(&Update, &CancelSwitch)) -> Self {
        let switch = CancelSwitch::default();
        let mut updates = Vec::new();
        let mut take = |update: Update| {
            watch(&update, &switch);
            updates.push(update);
        };
        let result = supervisor.execute(job, &mut take, &switch);
        Self { updates, result }
    }

    #[track_caller]
    fn succeeds(&self) -> &Finished {
        self.result.as_ref().unwrap_or_else(|error| panic!("{error}\n{:#?}", self.updates))
    }

    fn events(&self) -> impl Iterator<Item = &Event> {
        self.updates.iter().filter_map(|update| match update {
            Update::Event(event) => Some(event),
            _ => None,
        })
    }

    /// The components whose weights were read.
    fn loaded(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self
            .events()
            .filter_map(|event| match event {
                Event::Loading { component, .. } => Some(component.as_str()),
                _ => None,
            })
            .collect();
        names.dedup();
        names
    }

    fn says(&self, text: &str) -> bool {
        self.updates.iter().any(|update| matches!(update, Update::Output(line) if line.contains(text)))
    }

    fn is_new(&self) -> bool {
        self.updates.iter().any(|update| matches!(update, Update::WorkflowLoaded { .. }))
    }
}
