//! The table of sampler classes, and making one from its name and configuration.

use schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::{Scheduler, config, euler_discrete::EulerDiscrete, options};
use crate::{Error, Result};

/// A sampler that is made from a configuration.
pub(super) trait FromConfig: Scheduler + Sized + 'static {
    /// The class name.
    const CLASS: &'static str;
    /// The options of the class.
    type Config: Default + Serialize + DeserializeOwned + JsonSchema;

    /// Checks the options and computes the tables that do not depend on a run.
    fn from_config(config: Self::Config) -> Result<Self>;
}

/// One row of the table.
#[derive(Clone, Copy)]
pub struct SchedulerClass {
    /// The class, as the reference names it.
    pub name: &'static str,
    /// One line on what it is good for.
    pub summary: &'static str,
    /// The JSON Schema of its configuration, with the class's defaults.
    pub schema: fn() -> Value,
    create: fn(&Map<String, Value>) -> Result<Box<dyn Scheduler>>,
}

const fn row<S: FromConfig>(summary: &'static str) -> SchedulerClass {
    SchedulerClass {
        name: S::CLASS,
        summary,
        schema: options::schema::<S::Config>,
        create: |given| Ok(Box::new(S::from_config(config::read(S::CLASS, given)?)?)),
    }
}

static CLASSES: &[SchedulerClass] =
    &[row::<EulerDiscrete>("First-order Euler steps; plain, fast, the default of SDXL")];

/// Every class this build has.
pub fn classes() -> &'static [SchedulerClass] {
    CLASSES
}

/// Makes a sampler of a class. Keys of `config` that the class does not know are passed over, so that one
/// class can be made from another's configuration.
pub fn create(class: &str, config: &Map<String, Value>) -> Result<Box<dyn Scheduler>> {
    match CLASSES.iter().find(|row| row.name == class) {
        Some(row) => (row.create)(config),
        None => Err(unknown(class)),
    }
}

fn unknown(class: &str) -> Error {
    let closest = CLASSES
        .iter()
        .map(|row| (strsim::jaro_winkler(row.name, class), row.name))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(similarity, _)| *similarity > 0.85)
        .map_or(String::new(), |(_, name)| format!(" - did you mean `{name}`?"));
    let names: Vec<&str> = CLASSES.iter().map(|row| row.name).collect();
    Error::Argument {
        name: "scheduler".into(),
        reason: format!("unknown class `{class}`{closest} Known: {}", names.join(", ")),
    }
}
