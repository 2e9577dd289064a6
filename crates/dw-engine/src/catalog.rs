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
        models: dw_pipelines::hub::builtin_models()
            .iter()
            .chain(dw_pipelines::hub::random_models())
            .map(|model| model.name.to_owned())
            .collect(),
        features: FEATURES.iter().map(|feature| (*feature).to_owned()).collect(),
    }
}

/// Optional keys of a pipeline that this build honours.
const FEATURES: &[&str] = &[
    "/configuration/cache",
    "/configuration/components",
    "/configuration/group_offload",
    "/configuration/offload",
    "/configuration/prompt_weighting",
    "/configuration/teacache",
    "/configuration/transformer/enable_forward_chunking",
    "/configuration/unet/enable_forward_chunking",
    "/configuration/vae/enable_slicing",
    "/configuration/vae/enable_tiling",
    "/configuration/vae/torch_dtype",
    "/ip_adapter",
    "/loras",
    "/quantization_config",
    "/textual_inversions",
];

fn entry(name: &str, summary: &str, schema: serde_json::Value) -> CatalogEntry {
    CatalogEntry { name: name.to_owned(), summary: summary.to_owned(), schema }
}
