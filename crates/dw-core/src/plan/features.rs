//! What a pipeline step asks for beyond its arguments, against what this build does: nothing that would
//! change the picture is passed over in silence.

use serde_json::Value;

use super::builder::Report;
use crate::{catalog::Catalog, document::child_pointer};

/// Keys that change what a pipeline produces, and what they stand for. Builds name the ones they honour in
/// [`Catalog::features`].
const CHANGES_RESULT: &[(&str, &str)] = &[
    ("/chain", "chains of calls"),
    ("/configuration/configs", "configs of modular pipelines"),
    ("/configuration/generate", "text generation"),
    ("/configuration/inversion", "inversion"),
    ("/configuration/load_components", "modular pipelines"),
    ("/configuration/prompt_weighting", "prompt weighting"),
    ("/ip_adapter", "IP-Adapters"),
    ("/loras", "LoRA files"),
    ("/remote_text_encoder", "remote text encoders"),
    ("/textual_inversions", "textual inversions"),
];

/// Keys that change memory or speed alone, or give up exactness for speed: without them the result is the
/// one the model was made for.
const HINTS: &[&str] = &[
    "/configuration/attention_backend",
    "/configuration/cache",
    "/configuration/components",
    "/configuration/enable_layerwise_casting",
    "/configuration/group_offload",
    "/configuration/offload",
    "/configuration/sdnq_optimize",
    "/configuration/teacache",
    "/configuration/transformer/attn_processor_type",
    "/configuration/transformer/enable_forward_chunking",
    "/configuration/unet/attn_processor_type",
    "/configuration/unet/enable_forward_chunking",
    "/configuration/vae/enable_slicing",
    "/configuration/vae/enable_tiling",
    "/configuration/vae/torch_dtype",
];

/// Notes what the pipeline at `pointer` asks for and this build does not do. A class that this build does
/// not have at all is enough of a finding.
pub(super) fn check(report: &mut Report, catalog: &Catalog, pipeline: &Value, pointer: &str) {
    let class = pipeline.pointer("/configuration/component_type").and_then(Value::as_str).unwrap_or_default();
    if catalog.pipeline(class.strip_prefix("diffusers.").unwrap_or(class)).is_none() {
        return;
    }
    for (key, what) in CHANGES_RESULT {
        if is_asked(pipeline.pointer(key)) && !catalog.honours(key) {
            let message = format!("this build of dw does not do {what} (`{}`)", dotted(key));
            report.unsupported("unsupported-feature", &format!("{pointer}{key}"), message).remedy =
                Some("remove it to run the step without".into());
        }
    }
    for key in HINTS {
        if is_asked(pipeline.pointer(key)) && !catalog.honours(key) {
            let message = format!("`{}` has no effect in this build; only memory and speed differ", dotted(key));
            report.warning("no-effect", &format!("{pointer}{key}"), message);
        }
    }
    check_quantization(report, catalog, pipeline, pointer);
    check_placements(report, pipeline, pointer);
}

/// Keys inside an entry of `configuration.components` that change the component, or its speed alone.
const OF_PLACEMENTS: [(&str, bool); 4] =
    [("truncate_layers", true), ("remove_modules", true), ("attention_backend", false), ("compile", false)];

/// What is said of single components beyond where they are.
fn check_placements(report: &mut Report, pipeline: &Value, pointer: &str) {
    let place = "/configuration/components";
    for (name, placement) in pipeline.pointer(place).and_then(Value::as_object).into_iter().flatten() {
        for (key, changes_result) in OF_PLACEMENTS {
            if !is_asked(placement.get(key)) {
                continue;
            }
            let pointer = child_pointer(&child_pointer(&format!("{pointer}{place}"), name), key);
            let what = format!("`configuration.components.{name}.{key}`");
            if changes_result {
                let message = format!("this build of dw does not take components apart ({what})");
                report.unsupported("unsupported-feature", &pointer, message).remedy =
                    Some("remove it to run the whole component".into());
            } else {
                let message = format!("{what} has no effect in this build; only memory and speed differ");
                report.warning("no-effect", &pointer, message);
            }
        }
    }
}

/// Quantized components give other pictures than plain ones.
fn check_quantization(report: &mut Report, catalog: &Catalog, pipeline: &Value, pointer: &str) {
    for (name, component) in pipeline.as_object().into_iter().flatten() {
        if is_asked(component.get("quantization_config")) && !catalog.honours("/quantization_config") {
            let place = child_pointer(&child_pointer(pointer, name), "quantization_config");
            let message = format!("this build of dw does not quantize (`{name}.quantization_config`)");
            report.unsupported("unsupported-feature", &place, message).remedy =
                Some("remove it to run the component unquantized".into());
        }
        check_place_of_quantization(report, component, &child_pointer(pointer, name));
    }
    check_place_of_quantization(report, pipeline, pointer);
    if is_asked(pipeline.get("quantization_config")) {
        let message = "a pipeline is not quantized as a whole (`quantization_config`)".to_owned();
        report.unsupported("unsupported-feature", &child_pointer(pointer, "quantization_config"), message).remedy =
            Some("name its components in the step, each with a `quantization_config` of its own".into());
    }
}

/// What Python takes as an argument of `from_pretrained`, and a workflow says in another place.
fn check_place_of_quantization(report: &mut Report, component: &Value, pointer: &str) {
    for (key, remedy) in [
        ("quantization_config", "put it beside `configuration` of a component"),
        ("gguf_file", "name the file in `from_single_file`, and the model's folder in `config`"),
    ] {
        let place = format!("/from_pretrained_arguments/{key}");
        if is_asked(component.pointer(&place)) {
            let message = format!("`{key}` has no effect in `from_pretrained_arguments`");
            report.unsupported("unsupported-feature", &format!("{pointer}{place}"), message).remedy =
                Some(remedy.into());
        }
    }
}

/// Whether a value asks for something: it is there and not off or empty.
fn is_asked(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::Object(members)) => !members.is_empty(),
        Some(_) => true,
    }
}

/// A JSON pointer as people write it: `configuration.offload`.
fn dotted(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}
