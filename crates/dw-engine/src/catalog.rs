//! The catalogue of this build, from the registries of `dw-pipelines` and `dw-tasks`.

use dw_core::catalog::{Catalog, CatalogEntry};

/// Everything this build can run.
pub(crate) fn catalog() -> Catalog {
    Catalog {
        pipelines: dw_pipelines::registry::classes()
            .map(|class| entry(class.name, class.summary, (class.schema)()))
            .collect(),
        schedulers: dw_pipelines::schedulers::classes()
            .iter()
            .map(|class| entry(class.name, class.summary, (class.schema)()))
            .collect(),
        tasks: dw_tasks::registry::tasks().iter().map(|task| entry(task.name, task.summary, (task.schema)())).collect(),
        models: dw_pipelines::hub::builtin_models().iter().map(|model| model.name.to_owned()).collect(),
        features: FEATURES.iter().map(|feature| (*feature).to_owned()).collect(),
    }
}

/// Optional keys of a pipeline that this build honours.
const FEATURES: &[&str] = &[
    "/configuration/cache",
    "/configuration/prompt_weighting",
    "/configuration/teacache",
    "/ip_adapter",
    "/loras",
    "/textual_inversions",
];

fn entry(name: &str, summary: &str, schema: serde_json::Value) -> CatalogEntry {
    CatalogEntry { name: name.to_owned(), summary: summary.to_owned(), schema }
}
