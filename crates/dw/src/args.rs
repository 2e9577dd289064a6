//! The command line as it is typed: every command, option and help text. What the words mean (which
//! device, which files, which colours) is settled later, in [`crate::session`] and the commands.

use std::{ffi::OsString, path::PathBuf, sync::LazyLock};

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use dw_core::seed::Seed;

use crate::{device::DeviceChoice, logging::Level};

/// What this binary was built with, beyond plain CPU code.
pub(crate) const FEATURES: &[&str] = &[
    "cpu",
    #[cfg(feature = "cuda")]
    "cuda",
    #[cfg(feature = "cudnn")]
    "cudnn",
    #[cfg(feature = "metal")]
    "metal",
    #[cfg(feature = "accelerate")]
    "accelerate",
    #[cfg(feature = "mkl")]
    "mkl",
];

static VERSION: LazyLock<String> =
    LazyLock::new(|| format!("{} (features: {})", env!("CARGO_PKG_VERSION"), FEATURES.join(", ")));

/// Run declarative diffusion workflows: a JSON file in, pictures out.
///
/// A workflow is a JSON file that names models, prompts and what to do with the results. dw reads it,
/// loads the models and writes the pictures.
#[derive(Debug, Parser)]
#[command(
    name = "dw",
    version = VERSION.as_str(),
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "Exit codes: 0 done; 1 the workflow failed, or `dw validate` found errors; \
                  2 wrong usage or an invalid workflow; 130 stopped by Ctrl-C.",
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command takes.
#[derive(Args, Debug)]
#[command(next_help_heading = "Output and logging")]
pub(crate) struct Common {
    /// Say more on standard error: -v what dw does, -vv details, -vvv everything
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    pub(crate) verbose: u8,
    /// Say only what went wrong
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// When to use colours; `auto` means on terminals, unless NO_COLOR is set
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub(crate) color: ColorChoice,
    /// Write the log to this file instead of the usual one (`dw doctor` names it)
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) log_file: Option<PathBuf>,
    /// How much goes into the log file [default: `log_level` of the settings, else INFO]
    #[arg(short, long, visible_alias = "log_level", global = true, value_name = "LEVEL", ignore_case = true)]
    pub(crate) log_level: Option<Level>,
}

/// When to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ColorChoice {
    /// On terminals, unless NO_COLOR is set.
    Auto,
    /// Always, even into files and pipes.
    Always,
    /// Never.
    Never,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a workflow and write what it makes
    Run(RunArgs),
    /// Run workflows from a prompt or a script, with models that stay loaded
    Repl(ReplArgs),
    /// Check workflows without running them
    Validate(ValidateArgs),
    /// Print the JSON Schema of a workflow (or of requests to `dw worker --stdio`), for editors and other tools
    Schema(SchemaArgs),
    /// List the pipeline classes of this build, or the arguments of one
    Pipelines(CatalogArgs),
    /// List the schedulers (samplers) of this build, or the options of one
    Schedulers(CatalogArgs),
    /// List the task commands of this build, or the arguments of one
    Tasks(CatalogArgs),
    /// Show what dw found on this machine: devices, memory, caches, settings
    Doctor(DoctorArgs),
    /// Store a model's layers in fewer bits, in a new folder
    Quantize(QuantizeArgs),
    /// Show how a picture was made, from the metadata inside it
    Inspect(InspectArgs),
    /// Make a picture again from the metadata inside it
    Rerun(RerunArgs),
    /// Measure how long each stage of a workflow takes
    Bench(BenchArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Work for another program: requests as lines of JSON on standard input, answers on standard output
    /// (docs/host-programs.md)
    Worker(WorkerArgs),
}

impl Command {
    /// Whether this process itself makes pictures or weights; the prompt leaves that to its worker.
    pub(crate) fn computes(&self) -> bool {
        matches!(self, Self::Run(_) | Self::Rerun(_) | Self::Bench(_) | Self::Quantize(_) | Self::Worker(_))
    }
}

/// How a run computes, shared by `run`, `rerun`, `repl` and `bench`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ComputeArgs {
    /// Seed for the whole run, instead of the workflow's own; N,N,N gives each picture its own
    #[arg(long, value_name = "N", value_parser = parse_seed, allow_hyphen_values = true)]
    pub(crate) seed: Option<Seed>,
    /// Where to compute: cpu, cuda, cuda:N, metal or auto
    #[arg(
        long,
        value_name = "DEVICE",
        long_help = "Where to compute: cpu, cuda, cuda:N, metal or auto. \
        Without it, DW_DEVICE decides, then `device` in the settings, then what the machine has."
    )]
    pub(crate) device: Option<DeviceChoice>,
    /// Never ask the network: use only models that are on this machine
    #[arg(long)]
    pub(crate) offline: bool,
    /// Load models even when there does not seem to be enough memory
    #[arg(long)]
    pub(crate) ignore_fit: bool,
}

/// Where a run's files go and how it reports, shared by `run` and `rerun`.
#[derive(Args, Clone, Debug)]
pub(crate) struct OutputArgs {
    /// Folder for the files; created when missing
    #[arg(short, long, visible_alias = "output_dir", value_name = "DIR", default_value = "outputs")]
    pub(crate) output_dir: PathBuf,
    /// Report as JSON, one event per line on standard output
    #[arg(long)]
    pub(crate) json: bool,
    /// Do not write how a picture was made into PNG files, unless the workflow asks for it
    #[arg(long)]
    pub(crate) no_metadata: bool,
}

/// `dw run`.
#[derive(Args, Debug)]
#[command(after_help = RUN_EXAMPLES)]
pub(crate) struct RunArgs {
    /// The workflow, a JSON file; `-` reads it from standard input
    pub(crate) file: PathBuf,
    /// Values for the workflow's variables
    #[arg(value_name = "NAME=VALUE")]
    pub(crate) variables: Vec<OsString>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    /// Show what would be loaded, run and written, and do none of it
    #[arg(long)]
    pub(crate) dry_run: bool,
}

const RUN_EXAMPLES: &str = "\
Examples:
  dw run landscape.json
  dw run landscape.json prompt=\"a sunset over the sea\" -o pictures --seed 7
  dw run landscape.json --dry-run
  dw run landscape.json --json | jq -r 'select(.event == \"file_written\").path'
  generate-workflow | dw run - prompt=\"a boat\"

Progress and the summary go to standard error. Standard output carries the path of each file as it is \
written, one per line, when it is not a terminal; with --json it carries the events instead, and last \
of all `run_finished` or `run_failed`.

Ctrl-C stops after the current denoising step and keeps the files that are finished; a second Ctrl-C \
stops at once.";

/// `dw repl`.
#[derive(Args, Debug)]
#[command(after_help = REPL_EXAMPLES)]
pub(crate) struct ReplArgs {
    /// A workflow to load at once
    pub(crate) file: Option<PathBuf>,
    /// Folder for the files; created when missing [default: outputs, or what `config save` kept]
    #[arg(short, long, visible_alias = "output_dir", value_name = "DIR")]
    pub(crate) output_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

const REPL_EXAMPLES: &str = "\
Examples:
  dw repl
  dw repl landscape.json
  dw repl < commands.txt

`help` lists the commands. A worker process keeps the models loaded from run to run; Ctrl-C stops a run \
after the current denoising step and keeps both, a second Ctrl-C ends the worker.

Without a terminal, each line of standard input is a command, and the exit code is that of the first \
command that failed.";

/// `dw validate`.
#[derive(Args, Debug)]
#[command(after_help = VALIDATE_EXAMPLES)]
pub(crate) struct ValidateArgs {
    /// Workflow files or quoted patterns (`*`, `?`, `[abc]`, `**`); `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// How findings are printed
    #[arg(long, default_value = "human")]
    pub(crate) format: FindingFormat,
}

const VALIDATE_EXAMPLES: &str = "\
Examples:
  dw validate landscape.json
  dw validate 'workflows/**/*.json'
  dw validate examples/*.json --format github
  dw validate landscape.json --format json | jq '.[].message'

Exit codes: 0 when there are no errors (warnings are allowed), 1 when a workflow has errors, 2 when a \
file cannot be read or a pattern matches nothing.";

/// How findings are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FindingFormat {
    /// With the line of the file and what to do.
    Human,
    /// One JSON array.
    Json,
    /// GitHub workflow commands, shown beside the lines of a pull request.
    Github,
}

/// `dw pipelines`, `dw schedulers`, `dw tasks`.
#[derive(Args, Debug)]
pub(crate) struct CatalogArgs {
    /// Show the arguments of this one
    pub(crate) name: Option<String>,
    /// Print JSON, with the JSON Schema of the arguments
    #[arg(long)]
    pub(crate) json: bool,
}

/// `dw doctor`.
#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `dw quantize`.
#[derive(Args, Debug)]
#[command(after_help = QUANTIZE_EXAMPLES)]
pub(crate) struct QuantizeArgs {
    /// The model: a folder in the diffusers layout, the folder of one component, or a checkpoint in a single file
    pub(crate) model: PathBuf,
    /// The format of its layers: q2_k to q6_k, q4_0 to q8_1, nf4, fp4, int8 or fp8
    #[arg(long, value_name = "FORMAT")]
    pub(crate) to: String,
    /// The new folder; must not exist, or be empty
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// A component to quantize, once for each; of a single file only one [default: the transformer or UNet]
    #[arg(long = "component", value_name = "NAME")]
    pub(crate) components: Vec<String>,
    /// A folder with the configuration of what is in a single file, where the file does not say it
    #[arg(long, value_name = "DIR")]
    pub(crate) config: Option<PathBuf>,
    /// The variant of its weights to read, `fp16` for example
    #[arg(long, value_name = "NAME")]
    pub(crate) variant: Option<String>,
}

const QUANTIZE_EXAMPLES: &str = "\
Examples:
  dw quantize flux-dev --to q4_k -o flux-dev-q4k
  dw quantize flux-dev --to nf4 --component transformer --component text_encoder_2 -o flux-dev-nf4
  dw quantize flux1-dev.safetensors --to q4_k -o flux-dev-transformer-q4k

GGML's formats (q…) are written as GGUF, the others as safetensors in the layout of bitsandbytes. \
Everything else is copied, and the folder appears when it is complete. Of a single file one component is written, to a \
folder of its own, which a step names as the component's `model_name`.";

/// `dw inspect`.
#[derive(Args, Debug)]
pub(crate) struct InspectArgs {
    /// A PNG, JPEG or WebP picture that dw wrote
    pub(crate) image: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `dw rerun`.
#[derive(Args, Debug)]
pub(crate) struct RerunArgs {
    /// A PNG, JPEG or WebP picture that dw wrote
    pub(crate) image: PathBuf,
    /// Other values for the workflow's variables, or for arguments of the step that made the picture
    #[arg(value_name = "NAME=VALUE")]
    pub(crate) variables: Vec<OsString>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

/// `dw bench`.
#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    /// The workflow, a JSON file; `-` reads it from standard input
    #[arg(required_unless_present = "random_weights")]
    pub(crate) file: Option<PathBuf>,
    /// Values for the workflow's variables
    #[arg(value_name = "NAME=VALUE")]
    pub(crate) variables: Vec<OsString>,
    /// Measure a pipeline class in full size with random weights instead of a workflow
    #[arg(
        long,
        value_name = "CLASS",
        long_help = "Measure a pipeline class in full size with random weights instead of a workflow: its publisher's \
        configurations, weights made on the spot. Variables: prompt, height, width, num_inference_steps (4), \
        guidance_scale, torch_dtype (torch.float32)."
    )]
    pub(crate) random_weights: Option<String>,
    /// Keys of the pipeline's `configuration` for --random-weights, as a JSON object
    #[arg(long, value_name = "JSON", requires = "random_weights")]
    pub(crate) configuration: Option<String>,
    /// How many warm runs follow the first, cold one
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub(crate) runs: u32,
    /// Print JSON instead of a table
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

/// `dw completions`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  dw completions bash > ~/.local/share/bash-completion/completions/dw\n  \
                        dw completions zsh > ~/.zfunc/_dw\n  \
                        dw completions fish > ~/.config/fish/completions/dw.fish")]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: Shell,
}

/// `dw worker`.
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("way").required(true).args(["stdio", "connect"]))]
pub(crate) struct WorkerArgs {
    /// Read requests from standard input and answer on standard output, one JSON object a line
    #[arg(long)]
    pub(crate) stdio: bool,
    /// The local socket that the other process listens on; it writes the secret to standard input
    #[arg(long, value_name = "NAME", hide = true, conflicts_with_all = ["device", "offline", "ignore_fit", "output_dir", "cache_budget"])]
    pub(crate) connect: Option<String>,
    /// Where to compute: cpu, cuda, cuda:N, metal or auto
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<DeviceChoice>,
    /// Never ask the network: use only models that are on this machine
    #[arg(long)]
    pub(crate) offline: bool,
    /// Load models even when there does not seem to be enough memory
    #[arg(long)]
    pub(crate) ignore_fit: bool,
    /// Folder for the files of requests that name none; created when missing
    #[arg(short, long, visible_alias = "output_dir", value_name = "DIR", default_value = "outputs")]
    pub(crate) output_dir: PathBuf,
    /// How many megabytes of models may stay loaded between requests [default: 80 % of the device's memory]
    #[arg(long, value_name = "MB")]
    pub(crate) cache_budget: Option<u64>,
}

/// Which schema to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SchemaChoice {
    /// A workflow.
    Workflow,
    /// A request to `dw worker --stdio`.
    HostRequest,
    /// An answer of `dw worker --stdio` to a request.
    HostAnswer,
}

/// `dw schema`.
#[derive(Args, Debug)]
pub(crate) struct SchemaArgs {
    /// Of what
    #[arg(default_value = "workflow")]
    pub(crate) of: SchemaChoice,
}

/// `N` or `N,N,N`, each between the smallest signed and the largest unsigned 64-bit number.
pub(crate) fn parse_seed(text: &str) -> Result<Seed, String> {
    let numbers = text.split(',').map(parse_seed_number).collect::<Result<Vec<_>, _>>()?;
    Ok(match numbers[..] {
        [one] => Seed::One(one),
        _ => Seed::Each(numbers),
    })
}

fn parse_seed_number(text: &str) -> Result<i128, String> {
    let range = i128::from(i64::MIN)..=i128::from(u64::MAX);
    text.trim()
        .parse()
        .ok()
        .filter(|number| range.contains(number))
        .ok_or_else(|| format!("`{text}` is not a 64-bit whole number; write `--seed 42`, or `--seed 1,2,3`"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_and_variables_mix_in_any_order() {
        let parse = |words: &[&str]| match Cli::try_parse_from(words).expect("valid").command {
            Command::Run(run) => (run.file, run.variables, run.output.output_dir, run.compute.seed),
            other => panic!("not a run: {other:?}"),
        };
        let expected = (PathBuf::from("f.json"), vec!["a=1".into(), "b=2".into()], "x".into(), Some(Seed::One(7)));
        for words in [
            ["dw", "run", "f.json", "a=1", "b=2", "-o", "x", "--seed", "7"],
            ["dw", "run", "-o", "x", "f.json", "a=1", "--seed", "7", "b=2"],
            ["dw", "run", "--seed", "7", "f.json", "--output_dir", "x", "a=1", "b=2"],
            ["dw", "run", "f.json", "--output-dir", "x", "a=1", "b=2", "--seed", "7"],
        ] {
            assert_eq!(parse(&words), expected, "{words:?}");
        }
    }

    #[test]
    fn a_seed_is_a_number_or_a_list_and_stays_within_64_bits() {
        assert_eq!(parse_seed("42"), Ok(Seed::One(42)));
        assert_eq!(parse_seed("-1"), Ok(Seed::One(-1)));
        assert_eq!(parse_seed("18446744073709551615"), Ok(Seed::One(u64::MAX.into())));
        assert_eq!(parse_seed("1, 2,3"), Ok(Seed::Each(vec![1, 2, 3])));
        for bad in ["", "x", "1,", "1.5", "18446744073709551616", "-9223372036854775809"] {
            assert!(parse_seed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_negative_seed_can_be_given_after_a_blank() {
        let cli = Cli::try_parse_from(["dw", "run", "f.json", "--seed", "-3"]).expect("valid");
        assert!(matches!(
            cli.command,
            Command::Run(RunArgs { compute: ComputeArgs { seed: Some(Seed::One(-3)), .. }, .. })
        ));
    }

    #[test]
    fn the_old_log_level_spellings_are_understood() {
        for words in [["-l", "debug"], ["--log-level", "DEBUG"], ["--log_level", "Debug"]] {
            let cli = Cli::try_parse_from(["dw", "run", "f.json"].iter().chain(&words)).expect("valid");
            assert_eq!(cli.common.log_level, Some(Level::Debug));
        }
    }
}
