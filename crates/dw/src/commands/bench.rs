//! `dw bench`: how long each stage of a workflow takes, first with nothing loaded, then with everything.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    sync::Arc,
};

use dw_core::cancel::CancellationToken;
use dw_engine::{Engine, EngineError, PlannedRun, RunRequest, Source};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{
    args::BenchArgs,
    error::{CliError, Exit},
    interrupt,
    render::{
        Reporter,
        record::Record,
        table::Table,
        text::{bytes, duration, print, print_json, say},
    },
    request,
    session::Session,
};

use super::run;

/// The name under which a single denoising step is listed.
const PER_STEP: &str = "denoise, per step";
/// The name under which a whole run is listed.
const TOTAL: &str = "total";

/// One run.
#[derive(Debug, Serialize)]
struct Run {
    /// Whether nothing was loaded before it.
    cold: bool,
    /// Seconds from start to end.
    seconds: f64,
    /// Seconds of each stage.
    stages: Vec<Stage>,
    /// Bytes of memory in use at most, where the system says.
    peak: Option<u64>,
    /// Bytes that were planned.
    planned: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Stage {
    stage: String,
    seconds: f64,
}

/// One stage over all runs.
#[derive(Debug, PartialEq, Serialize)]
struct Row {
    stage: String,
    /// Seconds in the cold run.
    cold: Option<f64>,
    /// Fewest seconds of a warm run.
    min: Option<f64>,
    /// Median seconds of the warm runs.
    median: Option<f64>,
}

/// Everything, for `--json`.
#[derive(Debug, Serialize)]
struct Benchmark<'a> {
    workflow: String,
    stages: &'a [Row],
    runs: &'a [Run],
}

/// Runs `dw bench`.
pub(super) fn bench(args: &BenchArgs, session: &Session) -> Result<Exit, CliError> {
    let folder = tempfile::tempdir()
        .map_err(|error| CliError::Failed(format!("cannot create a temporary folder for the files: {error}")))?;
    let mut engine = session.engine(&args.compute)?;
    let name = name(args);
    let planned = run::plan(&engine, request(args, folder.path())?, &name, false)?;
    let (workflow, runs) = measure(&mut engine, &planned, args, session)?;
    let rows = rows(&runs);
    if args.json {
        print_json(&Benchmark { workflow, stages: &rows, runs: &runs })?;
    } else {
        print(&table(&rows).render())?;
        print(&memory(&runs))?;
    }
    Ok(Exit::Done)
}

fn request(args: &BenchArgs, output_dir: &Path) -> Result<RunRequest, CliError> {
    Ok(RunRequest {
        variables: request::variables(&variables(args))?,
        source: source(args)?,
        seed: args.compute.seed.clone(),
        output_dir: output_dir.to_owned(),
        metadata: true,
    })
}

/// The workflow, as messages call it.
fn name(args: &BenchArgs) -> String {
    match (&args.random_weights, &args.file) {
        (None, Some(file)) => file.display().to_string(),
        (class, _) => format!("random weights of {}", class.as_deref().unwrap_or_default()),
    }
}

/// The values for variables; without a workflow they begin where its file would be.
fn variables(args: &BenchArgs) -> Vec<OsString> {
    let first = args.file.as_ref().filter(|_| args.random_weights.is_some()).map(|file| file.as_os_str().to_owned());
    first.into_iter().chain(args.variables.iter().cloned()).collect()
}

fn source(args: &BenchArgs) -> Result<Source, CliError> {
    match (&args.random_weights, &args.file) {
        (None, Some(file)) => request::source(file),
        (class, _) => random_workflow(class.as_deref().unwrap_or_default(), args.configuration.as_deref()),
    }
}

/// A workflow of one step that runs `class` with random weights.
fn random_workflow(class: &str, configuration: Option<&str>) -> Result<Source, CliError> {
    let asked: Map<String, Value> = serde_json::from_str(configuration.unwrap_or("{}"))
        .map_err(|error| CliError::Usage(format!("`--configuration` is not a JSON object: {error}")))?;
    let mut configuration = json!({ "component_type": class });
    configuration.as_object_mut().into_iter().for_each(|known| known.extend(asked.clone()));
    // Their type is that of their values, so they need some.
    let side = if class == "StableDiffusionPipeline" { 512 } else { 1024 };
    let workflow = json!({
        "id": "random-weights",
        "variables": {
            "prompt": "a house on a hill", "height": side, "width": side, "num_inference_steps": 4,
            "guidance_scale": 5.0, "torch_dtype": "torch.float32",
        },
        "seed": 0,
        "steps": [{
            "name": class,
            "pipeline": {
                "configuration": configuration,
                "from_pretrained_arguments": {
                    "model_name": format!("builtin:random/{class}"), "torch_dtype": "variable:torch_dtype",
                },
                "arguments": {
                    "prompt": "variable:prompt", "height": "variable:height", "width": "variable:width",
                    "num_inference_steps": "variable:num_inference_steps",
                    "guidance_scale": "variable:guidance_scale",
                },
            },
        }],
    });
    Ok(Source::Text { text: workflow.to_string(), base_dir: PathBuf::new() })
}

/// The largest peaks of the cold and the warm runs beside what was planned, in a line.
fn memory(runs: &[Run]) -> String {
    let largest = |cold: bool, of: fn(&Run) -> Option<u64>| {
        let sizes = runs.iter().filter(|run| run.cold == cold).filter_map(of);
        sizes.max().map_or_else(|| "-".into(), bytes)
    };
    let kind = |cold: bool| format!("{} (planned {})", largest(cold, |run| run.peak), largest(cold, |run| run.planned));
    format!("peak memory: cold {}, warm {}\n", kind(true), kind(false))
}

/// One cold run and the warm ones.
fn measure(
    engine: &mut Engine,
    planned: &PlannedRun,
    args: &BenchArgs,
    session: &Session,
) -> Result<(String, Vec<Run>), CliError> {
    let cancel = CancellationToken::default();
    let reporter = Arc::new(Reporter::silent());
    interrupt::cancels(&cancel, &reporter)?;
    let name = name(args);
    let (mut workflow, mut runs) = (String::new(), Vec::new());
    for number in 0..=args.runs {
        let summary = engine.run(planned, &*reporter, &cancel).map_err(|error| match error {
            EngineError::Invalid(found) => run::invalid(&name, found, &planned.request.source, false),
            EngineError::Cancelled => CliError::Cancelled,
            source => CliError::Run { file: name.clone(), source },
        })?;
        let kind = if number == 0 { "cold run".into() } else { format!("warm run {number} of {}", args.runs) };
        if !session.quiet {
            say(&format!("{kind}: {}", duration(summary.seconds)));
        }
        let record = reporter.finish();
        let memory = || record.steps.iter().filter_map(|step| step.memory.as_ref());
        let (peak, planned) = (memory().map(|m| m.peak).max(), memory().map(|m| m.planned).max());
        runs.push(Run { cold: number == 0, seconds: summary.seconds, stages: stages(&record), peak, planned });
        workflow = summary.workflow;
    }
    Ok((workflow, runs))
}

/// The stages of a run; a single denoising step follows its loop.
fn stages(record: &Record) -> Vec<Stage> {
    let steps: usize = record.steps.iter().map(|step| step.denoise_steps).sum();
    let mut stages = Vec::new();
    for (stage, seconds) in record.stages() {
        let is_loop = stage == "denoise" && steps > 0;
        stages.push(Stage { stage, seconds });
        if is_loop {
            stages.push(Stage { stage: PER_STEP.into(), seconds: seconds / steps as f64 });
        }
    }
    stages
}

fn rows(runs: &[Run]) -> Vec<Row> {
    let mut names: Vec<&str> = Vec::new();
    for stage in runs.iter().flat_map(|run| &run.stages) {
        if !names.contains(&stage.stage.as_str()) {
            names.push(&stage.stage);
        }
    }
    let seconds_of = |run: &Run, name: &str| match name {
        TOTAL => Some(run.seconds),
        _ => run.stages.iter().find(|stage| stage.stage == name).map(|stage| stage.seconds),
    };
    let row = |name: &str| {
        let of =
            |cold: bool| runs.iter().filter(move |run| run.cold == cold).filter_map(move |run| seconds_of(run, name));
        let mut warm: Vec<f64> = of(false).collect();
        warm.sort_by(f64::total_cmp);
        Row { stage: name.to_owned(), cold: of(true).next(), min: warm.first().copied(), median: median(&warm) }
    };
    names.into_iter().chain([TOTAL]).map(row).collect()
}

/// The middle of sorted numbers.
fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(["STAGE", "COLD", "WARM, MIN", "WARM, MEDIAN"]);
    let cell = |seconds: Option<f64>| seconds.map_or_else(|| "-".into(), |seconds| format!("{seconds:.3} s"));
    for row in rows {
        table.row([row.stage.clone(), cell(row.cold), cell(row.min), cell(row.median)]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(cold: bool, seconds: f64, stages: &[(&str, f64)]) -> Run {
        let stages = stages.iter().map(|(stage, seconds)| Stage { stage: (*stage).into(), seconds: *seconds });
        Run { cold, seconds, stages: stages.collect(), peak: Some(2_000_000), planned: None }
    }

    #[test]
    fn cold_and_warm_runs_are_counted_apart() {
        let runs = [
            run(true, 5.0, &[("load", 4.0), ("denoise", 1.0)]),
            run(false, 3.0, &[("denoise", 0.5)]),
            run(false, 1.0, &[("denoise", 0.7)]),
        ];
        let row = |stage: &str, cold, min, median| Row { stage: stage.into(), cold, min, median };
        assert_eq!(
            rows(&runs),
            [
                row("load", Some(4.0), None, None),
                row("denoise", Some(1.0), Some(0.5), Some(0.6)),
                row("total", Some(5.0), Some(1.0), Some(2.0)),
            ]
        );
    }

    #[test]
    fn the_largest_peaks_stand_in_a_line() {
        assert_eq!(memory(&[run(true, 5.0, &[])]), "peak memory: cold 2.0 MB (planned -), warm - (planned -)\n");
    }

    #[test]
    fn a_class_becomes_a_workflow_of_one_step() {
        let source = random_workflow("StableDiffusionPipeline", Some(r#"{"offload": "model"}"#));
        let Ok(Source::Text { text, .. }) = source else { panic!("the object is valid") };
        let workflow: Value = serde_json::from_str(&text).expect("JSON");
        let pipeline = &workflow["steps"][0]["pipeline"];
        assert_eq!(pipeline["configuration"], json!({"component_type": "StableDiffusionPipeline", "offload": "model"}));
        assert_eq!(pipeline["from_pretrained_arguments"]["model_name"], "builtin:random/StableDiffusionPipeline");
        assert!(random_workflow("X", Some("[]")).is_err());
    }

    #[test]
    fn the_median_of_an_odd_number_is_its_middle() {
        assert_eq!(median(&[1.0, 2.0, 9.0]), Some(2.0));
        assert_eq!(median(&[]), None);
    }
}
