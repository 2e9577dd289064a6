//! `workflow load`, `reload`, `status`, `restart` and `save`: which workflow is the current one.

use std::{
    fmt::Write as _,
    io::Write,
    path::{Path, PathBuf},
};

use dw_core::{paths::check_string, variables::Bindings};
use fs_err as fs;
use serde_json::{Map, Value};

use crate::{
    render::{
        findings,
        text::{count, printable},
    },
    request,
};

use super::{
    Repl,
    parse::Word,
    reply::{Failure, Reply},
    results,
    state::Loaded,
};

/// Longest path that can be typed.
const LONGEST_PATH: usize = 1000;

/// `workflow load`.
pub(super) fn load(repl: &mut Repl<'_>, words: &[Word]) -> Result<Reply, Failure> {
    let name = match words {
        [] => return Err(Failure::usage("Error: Please specify a workflow file path or name")),
        [name] => &name.text,
        _ => return Err(Failure::usage("Error: A workflow is one file; put a path with spaces in quotes")),
    };
    check_string(name, LONGEST_PATH).map_err(|error| Failure::usage(format!("Error: Invalid file path: {error}")))?;
    let path = find(name, &repl.config.workflow_dir)
        .map_err(|reason| Failure::usage(format!("Error: Invalid workflow path: {reason}")))?;
    let (loaded, warnings) = Loaded::read(&path).map_err(|found| {
        let kept = repl.state.workflow.as_ref().map(|kept| format!("; still loaded: {}", printable(&kept.id)));
        let message = format!("Error: Workflow validation failed: {}", findings::tally(&found));
        Failure::usage(message + &kept.unwrap_or_default()).findings(&found)
    })?;
    let mut text = format!("Loaded workflow: {}\nWorkflow validated successfully\n", printable(&loaded.id));
    if !repl.state.arguments.is_empty() {
        text += "All workflow arguments cleared\n";
    }
    repl.state.arguments.clear();
    repl.state.workflow = Some(loaded);
    Ok(Reply::answer(text).findings(&warnings))
}

/// The file that somebody means: a path as it is, or a name in the folder of workflows, with or without
/// its ending.
fn find(name: &str, workflow_dir: &Path) -> Result<PathBuf, String> {
    let with_ending = |path: &Path| {
        let mut path = path.as_os_str().to_owned();
        path.push(".json");
        PathBuf::from(path)
    };
    let typed = Path::new(name);
    let named = workflow_dir.join(typed);
    let places = [typed.to_owned(), with_ending(typed), named.clone(), with_ending(&named)];
    match places.into_iter().find(|path| path.is_file()) {
        Some(path) => Ok(path),
        // The reason why the path as typed cannot be used.
        None => request::check_file(typed)
            .map(|()| typed.to_owned())
            .map_err(|reason| format!("{reason} (nor is it in `{}`)", workflow_dir.display())),
    }
}

/// `workflow reload`.
pub(super) fn reload(repl: &mut Repl<'_>, _: &[Word]) -> Result<Reply, Failure> {
    let path = repl.state.loaded()?.path.clone();
    let (loaded, warnings) = Loaded::read(&path).map_err(|found| {
        Failure::usage(format!("Error reloading workflow: {}; the old one is kept", findings::tally(&found)))
            .findings(&found)
    })?;
    let text = format!(
        "Reloading workflow from: {}\nReloaded workflow: {}\nWorkflow validated successfully\n",
        printable(&path.display().to_string()),
        printable(&loaded.id),
    );
    Ok(replace(repl, loaded, Reply::answer(text).findings(&warnings)))
}

/// Makes another version of the current workflow the current one; values of variables that are gone are
/// dropped, with a word about it.
pub(super) fn replace(repl: &mut Repl<'_>, loaded: Loaded, mut reply: Reply) -> Reply {
    let gone: Vec<String> =
        repl.state.arguments.keys().filter(|name| !loaded.variables().contains_key(*name)).cloned().collect();
    for name in gone {
        repl.state.arguments.remove(&name);
        reply = reply.warning(&format!("variable '{name}' is gone from the workflow, and so is the value set for it"));
    }
    repl.state.workflow = Some(loaded);
    reply
}

/// `workflow status`.
#[expect(clippy::unnecessary_wraps, reason = "all commands have this form")]
pub(super) fn status(repl: &mut Repl<'_>, _: &[Word]) -> Result<Reply, Failure> {
    let mut text = match &repl.state.workflow {
        None => "No workflow currently loaded\n".to_owned(),
        Some(loaded) => format!(
            "Current workflow: {}\nFile: {}\n",
            printable(&loaded.id),
            printable(&loaded.path.display().to_string())
        ),
    };
    if !repl.state.arguments.is_empty() {
        let _ = writeln!(text, "Arguments: {} set", repl.state.arguments.len());
    }
    let _ = writeln!(text, "Seed: {}", results::seed_text(repl));
    text += &match (repl.worker.is_running(), repl.worker.process_id()) {
        (true, Some(id)) => format!("Worker: running, process {id}\n"),
        (true, None) => "Worker: running\n".to_owned(),
        (false, _) => "Worker: not running; the next run starts it\n".to_owned(),
    };
    let _ = writeln!(
        text,
        "Finished in this session: {}, {}",
        count(repl.state.runs, "run"),
        count(repl.state.outputs.len(), "file")
    );
    Ok(Reply::answer(text))
}

/// `workflow restart`.
#[expect(clippy::unnecessary_wraps, reason = "all commands have this form")]
pub(super) fn restart(repl: &mut Repl<'_>, _: &[Word]) -> Result<Reply, Failure> {
    if !repl.worker.is_running() {
        return Ok(Reply::answer("No worker process running\nWorker will start on next run"));
    }
    repl.worker.shutdown();
    Ok(Reply::answer("Worker shutdown complete\nWorker will restart on next run"))
}

/// `workflow save`.
pub(super) fn save(repl: &mut Repl<'_>, words: &[Word]) -> Result<Reply, Failure> {
    let loaded = repl.state.loaded()?;
    let target = match words {
        [] => loaded.path.clone(),
        [name] => target(&name.text, &loaded.path)?,
        _ => return Err(Failure::usage("Error: A workflow is one file; put a path with spaces in quotes")),
    };
    let text = serde_json::to_string_pretty(&with_values(repl)?)
        .map_err(|error| Failure::failed(format!("Error: {error}")))?;
    write(&target, &text).map_err(|error| Failure::failed(format!("Error: cannot save the workflow: {error}")))?;
    let reply = Reply::answer(format!("Saved to {}", printable(&target.display().to_string())));
    let moved = target.parent() != loaded.path.parent();
    Ok(if moved { reply.warning("relative paths in the workflow now start from the new file's folder") } else { reply })
}

/// The file to save to. A file that is not the workflow's own is not overwritten.
fn target(name: &str, own: &Path) -> Result<PathBuf, Failure> {
    check_string(name, LONGEST_PATH).map_err(|error| Failure::usage(format!("Error: Invalid file path: {error}")))?;
    let mut path = PathBuf::from(name);
    if path.extension().is_none() {
        path.set_extension("json");
    }
    let path = std::path::absolute(&path).map_err(|error| Failure::failed(format!("Error: {error}")))?;
    if path.exists() && path != own {
        let message = format!("Error: `{}` exists already; choose another name, or remove it", path.display());
        return Err(Failure::usage(message));
    }
    Ok(path)
}

/// The workflow with the values and the seed that are set.
fn with_values(repl: &Repl<'_>) -> Result<Value, Failure> {
    let loaded = repl.state.loaded()?;
    let mut document = loaded.document.clone();
    let (bindings, _) = Bindings::new(Some(loaded.variables()), &repl.state.arguments);
    if let Some(variables) = document.get_mut("variables").and_then(Value::as_object_mut) {
        for name in repl.state.arguments.keys() {
            if let (Some(default), Some(value)) = (variables.get_mut(name), bindings.get(name)) {
                default.clone_from(value);
            }
        }
    }
    if let (Some(seed), Some(document)) = (&repl.state.seed, document.as_object_mut()) {
        let seed = serde_json::to_value(seed).map_err(|error| Failure::failed(format!("Error: {error}")))?;
        insert_before(document, "steps", "seed", seed);
    }
    Ok(document)
}

/// Sets a key; a new one goes before another, where a reader would look for it.
fn insert_before(object: &mut Map<String, Value>, before: &str, key: &str, value: Value) {
    if let Some(old) = object.get_mut(key) {
        *old = value;
    } else {
        let place = object.keys().position(|other| other == before).unwrap_or(object.len());
        object.shift_insert(place, key.to_owned(), value);
    }
}

/// Writes a file, whole or not at all.
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    writeln!(file, "{text}")?;
    if let Ok(metadata) = fs::metadata(path) {
        file.as_file().set_permissions(metadata.permissions())?;
    }
    file.persist(path)?;
    Ok(())
}
