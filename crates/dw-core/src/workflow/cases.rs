//! Structure by table: which documents are valid, and what is said about the others.

use std::path::Path;

use serde_json::{Value, json};

use super::{check, schema};
use crate::{document::Document, finding::Finding};

fn base() -> Value {
    json!({"id": "w", "steps": [{"name": "s", "pipeline": {
        "configuration": {"component_type": "FluxPipeline"},
        "from_pretrained_arguments": {"model_name": "m"},
        "arguments": {"prompt": "x"}}}]})
}

/// The base document with the value at `pointer` set; `Null` after `-` removes it.
fn with(pointer: &str, value: Value) -> Value {
    let mut document = base();
    if pointer.is_empty() {
        return value;
    }
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
    let parent = document.pointer_mut(parent).expect("the parent is there");
    if let Some(key) = key.strip_prefix('-') {
        parent.as_object_mut().expect("an object").remove(key);
    } else if let Ok(index) = key.parse::<usize>() {
        parent[index] = value;
    } else {
        parent[key] = value;
    }
    document
}

const P: &str = "/steps/0/pipeline";

fn in_pipeline(key: &str, value: Value) -> Value {
    with(&format!("{P}/{key}"), value)
}

fn in_configuration(key: &str, value: Value) -> Value {
    in_pipeline(&format!("configuration/{key}"), value)
}

fn step(value: Value) -> Value {
    with("/steps/0", value)
}

fn task(value: Value) -> Value {
    step(json!({"name": "s", "task": value}))
}

fn findings(document: &Value) -> Vec<Finding> {
    let text = serde_json::to_string_pretty(document).expect("JSON");
    check(&Document::from_text(&text, Path::new("/tmp")).expect("JSON"))
}

/// Both the messages and the published schema have to agree with the table.
fn judge(cases: Vec<(&str, Value)>, valid: bool) {
    let published = jsonschema::draft202012::new(schema()).expect("a schema");
    for (label, document) in cases {
        let found = findings(&document);
        let listed: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found.is_empty(), valid, "{label}: {listed:#?}");
        assert_eq!(published.is_valid(&document), valid, "{label}: the published schema disagrees");
        for finding in found {
            assert!(!finding.message.contains("not valid under"), "{label}: {}", finding.message);
        }
    }
}

#[test]
fn documents_that_the_format_allows_are_valid() {
    let reference = |arguments: Value| step(json!({"name": "s", "pipeline_reference": arguments}));
    judge(
        vec![
            ("base", base()),
            ("J6 float seed", with("/seed", json!(42.0))),
            ("J6 negative seed", with("/seed", json!(-1))),
            ("J7 seed variable", with("/seed", json!("variable:seed"))),
            ("list of seeds", with("/seed", json!([1, 2]))),
            ("list of seed variables", with("/seed", json!([1, "variable:b"]))),
            ("J8 extra key", with("/extra", json!(1))),
            ("J8 extra step key", with("/steps/0/extra", json!(1))),
            ("$schema", with("/$schema", json!(7))),
            ("J9 null variable", with("/variables", json!({"a": null}))),
            ("J9 nested", with("/variables", json!({"a": {"b": [1, {}]}}))),
            ("J9 odd name", with("/variables", json!({"a b!": 1}))),
            ("J14 same name twice", {
                let mut document = base();
                let step = document["steps"][0].clone();
                document["steps"].as_array_mut().expect("steps").push(step);
                document
            }),
            ("release by variable", with("/steps/0/release_pipeline", json!("variable:r"))),
            ("J17 arguments", task(json!({"command": "c", "arguments": {}}))),
            ("J17 inputs", task(json!({"command": "c", "inputs": ["a", 1, 1.5, {}, true]}))),
            ("J17 no inputs", task(json!({"command": "c", "inputs": []}))),
            ("J20 unknown command", task(json!({"command": "nope", "arguments": {}}))),
            ("arguments by variable", task(json!({"command": "c", "arguments": "variable:a"}))),
            ("J21 empty workflow", step(json!({"name": "s", "workflow": {}}))),
            ("reference", reference(json!({"reference_name": "r", "arguments": {}}))),
            ("J24 empty source", in_pipeline("from_pretrained_arguments", json!({}))),
            ("omitted component", in_pipeline("from_pretrained_arguments/text_encoder", json!(null))),
            ("null subfolder", in_pipeline("from_pretrained_arguments/subfolder", json!(null))),
            ("J27 unknown pipeline key", in_pipeline("vocoder", json!(5))),
            ("J29 model", in_configuration("offload", json!("model"))),
            ("J29 sequential", in_configuration("offload", json!("sequential"))),
            ("J29 group", in_configuration("offload", json!("group"))),
            ("J29 auto", in_configuration("offload", json!("auto"))),
            ("J29 variable", in_configuration("offload", json!("variable:o"))),
            ("J31 threshold", in_configuration("cache", json!({"type": "mag", "threshold": "variable:t"}))),
            ("J31 extra", in_configuration("cache", json!({"type": "mag", "x": 1}))),
            ("J31 preset", in_configuration("cache", json!({"type": "mag", "mag_ratios": "flux"}))),
            ("J31 ratios", in_configuration("cache", json!({"type": "mag", "mag_ratios": [1, 0.5]}))),
            ("J32 five", in_configuration("teacache", json!({"coefficients": [1, 2, 3, 4, 5]}))),
            ("J33 group", in_configuration("group_offload", json!({"offload_type": "leaf_level", "use_stream": true}))),
            ("J36 tiling", in_configuration("components", json!({"vae": {"enable_tiling": {"a": 1}, "x": 2}}))),
            (
                "J36 both",
                in_configuration(
                    "components",
                    json!({"v": {"group_offload": {"offload_type": "b"}, "residency": "on_demand"}}),
                ),
            ),
            ("J37 configs", in_configuration("configs", json!({"a": 1, "b": null, "c": [1], "d": "x"}))),
            ("J39 scale", in_pipeline("loras", json!([{"model_name": "m", "scale": "variable:s"}]))),
            ("J40 subfolder", in_pipeline("ip_adapter", json!({"model_name": "m", "subfolder": null}))),
            ("IP-Adapters", in_pipeline("ip_adapter", json!([{"model_name": "m", "scale": [0.5]}]))),
            ("scale by block", in_pipeline("ip_adapter", json!({"model_name": "m", "scale": {"up": 1}}))),
            ("scale by variable", in_pipeline("ip_adapter", json!({"model_name": "m", "scale": "variable:s"}))),
            (
                "J41 ControlNets",
                in_pipeline(
                    "controlnet",
                    json!([{"configuration": {"component_type": "C", "offload": "variable:o"}, "from_pretrained_arguments": {}}]),
                ),
            ),
            ("textual inversion", in_pipeline("textual_inversions", json!([{"model_name": "m", "token": "<x>"}]))),
            ("J42 shift", in_pipeline("scheduler", json!({"shift": "variable:s"}))),
            ("J42 type", in_pipeline("scheduler", json!({"configuration": {"scheduler_type": "D"}}))),
            ("J44 segments", in_pipeline("chain", json!({"segments": "variable:n"}))),
            ("J44 match_audio", in_pipeline("chain", json!({"match_audio": false}))),
            (
                "J44 last_segment",
                in_pipeline(
                    "chain",
                    json!({"segments": 3, "continuity": "last_segment", "segment_argument": "references",
                       "carry_frames": 48, "carry_audio": true}),
                ),
            ),
            ("J45 fps variable", with("/steps/0/result", json!({"content_type": "a/b", "fps": "variable:fps"}))),
            ("J46 type", with("/steps/0/result", json!({"content_type": "foo/bar", "format": "x"}))),
        ],
        true,
    );
}

#[test]
fn documents_that_the_format_forbids_are_invalid() {
    let component = json!({"configuration": {"component_type": "A"}, "from_pretrained_arguments": {}});
    let quantized = |quantization: Value| {
        let mut component = component.clone();
        component["quantization_config"] = quantization;
        in_pipeline("vae", component)
    };
    let source = |value: Value| in_pipeline("from_pretrained_arguments", value);
    let part = |value: Value| in_configuration("components", json!({"vae": value}));
    let chain = |value: Value| in_pipeline("chain", value);
    let result = |value: Value| with("/steps/0/result", value);
    judge(
        vec![
            ("J1", with("/-id", json!(null))),
            ("J2", with("/-steps", json!(null))),
            ("J3", with("/steps", json!([]))),
            ("J4", json!("text")),
            ("J5", with("/id", json!(1))),
            ("J7 fraction", with("/seed", json!(42.5))),
            ("J7 text", with("/seed", json!("42"))),
            ("J7 null", with("/seed", json!(null))),
            ("empty seeds", with("/seed", json!([]))),
            ("J10", with("/variables", json!([1]))),
            ("variables by variable", with("/variables", json!("variable:v"))),
            ("steps by variable", with("/steps", json!("variable:v"))),
            ("step by variable", with("/steps/0", json!("variable:v"))),
            ("task by variable", step(json!({"name": "s", "task": "variable:t"}))),
            ("J11", with("/steps/0/-name", json!(null))),
            ("J12", step(json!({"name": "s"}))),
            ("J13", with("/steps/0/task", json!({"command": "c", "arguments": {}}))),
            ("J15", with("/steps/0/release_pipeline", json!("yes"))),
            ("J15 models", with("/steps/0/release_models", json!("yes"))),
            ("J16", task(json!({"command": "c"}))),
            ("J18 null", task(json!({"command": "c", "inputs": [null]}))),
            ("J18 list", task(json!({"command": "c", "inputs": [["a"]]}))),
            ("J19", task(json!({"command": "c", "inputs": [], "arguments": {}}))),
            ("J22", step(json!({"name": "s", "pipeline_reference": {"reference_name": "r"}}))),
            ("J23 source", in_pipeline("-from_pretrained_arguments", json!(null))),
            ("J23 arguments", in_pipeline("-arguments", json!(null))),
            ("J23 class", in_configuration("-component_type", json!(null))),
            ("J25 file", source(json!({"model_name": "m", "from_single_file": "f"}))),
            ("J25 task", source(json!({"model_name": "m", "task": "t"}))),
            ("J26 class", in_pipeline("vae", json!({"configuration": {}, "from_pretrained_arguments": {}}))),
            ("J26 source", in_pipeline("vae", json!({"configuration": {"component_type": "A"}}))),
            ("J28 typo", in_configuration("offlaod", json!("model"))),
            ("J28 old", in_configuration("do_not_send_to_device", json!(true))),
            ("J29", in_configuration("offload", json!("disk"))),
            ("J30 type", in_configuration("cache", json!({"type": "nope"}))),
            ("J30 none", in_configuration("cache", json!({"threshold": 0.1}))),
            ("J30 ratios", in_configuration("cache", json!({"type": "mag", "mag_ratios": 1}))),
            ("J32 four", in_configuration("teacache", json!({"coefficients": [1, 2, 3, 4]}))),
            ("J32 text", in_configuration("teacache", json!({"rel_l1_thresh": "0.6"}))),
            ("J33", in_configuration("group_offload", json!({}))),
            ("J34", in_configuration("enable_layerwise_casting", json!({"storage_dtype": "torch.float16"}))),
            ("J35 residency", part(json!({"residency": "lazy"}))),
            ("J35 tiling", part(json!({"enable_tiling": "yes"}))),
            ("J35 layers", part(json!({"truncate_layers": {"a": 0}}))),
            ("J35 compile", part(json!({"compile": {"fullgraph": "yes"}}))),
            ("J37", in_configuration("configs", json!({"a": {}}))),
            ("J38", quantized(json!({"configuration": {"config_type": "C"}}))),
            ("J39 name", in_pipeline("loras", json!([{}]))),
            ("J39 object", in_pipeline("loras", json!({"model_name": "m"}))),
            ("J40", in_pipeline("ip_adapter", json!({"model_name": "m", "scale": "0.5"}))),
            ("J41 item", in_pipeline("controlnet", json!([{"configuration": {}, "from_pretrained_arguments": {}}]))),
            ("J42 empty", in_pipeline("scheduler", json!({}))),
            ("J42 zero", in_pipeline("scheduler", json!({"shift": 0}))),
            ("J42 negative", in_pipeline("scheduler", json!({"shift": -1}))),
            ("J42 no type", in_pipeline("scheduler", json!({"configuration": {}}))),
            ("J43 empty", chain(json!({}))),
            ("J43 segments", chain(json!({"segments": 0}))),
            ("J43 both", chain(json!({"segments": 2, "match_audio": false}))),
            ("J43 extra", chain(json!({"segments": 2, "x": 1}))),
            ("J43 prompts", chain(json!({"segments": 2, "prompts": []}))),
            ("J43 crossfade", chain(json!({"segments": 2, "crossfade_ms": -1}))),
            ("J43 fps", chain(json!({"segments": 2, "fps": 0}))),
            ("J43 trim", chain(json!({"segments": 2, "trim_frames": -1}))),
            ("J43 carry", chain(json!({"segments": 2, "carry_frames": 0}))),
            ("J43 continuity", chain(json!({"segments": 2, "continuity": "teleport"}))),
            ("J43 snap", chain(json!({"segments": 2, "frame_snap": {"modulus": 8}}))),
            ("J43 snap extra", chain(json!({"segments": 2, "frame_snap": {"modulus": 8, "remainder": 1, "x": 1}}))),
            ("J45 empty", result(json!({}))),
            ("J45 save", result(json!({"save": false}))),
            ("J45 fps", result(json!({"content_type": "a/b", "fps": 23.976}))),
            ("J45 bitrate", result(json!({"content_type": "a/b", "bitrate_mode": "CBR"}))),
            ("J45 compression", result(json!({"content_type": "a/b", "compression_level": 2}))),
            ("J45 null", result(json!({"content_type": "a/b", "x": null}))),
        ],
        false,
    );
}

#[test]
fn messages_say_what_is_wrong_and_what_to_do() {
    let cases = [
        (with("/-id", json!(null)), "", "`id` is a required property of the workflow", ""),
        (with("/seed", json!("42")), "/seed", "`seed` must be a whole number or a list, found the text `42`", "quotes"),
        (step(json!({"name": "s"})), "/steps/0", "step `s` has no action", "`task`, `pipeline`"),
        (step(json!({"name": "s", "pipelin": {}})), "/steps/0", "step `s` has no action", "did you mean `pipeline`"),
        (
            with("/steps/0/task", json!({"command": "c", "arguments": {}})),
            "/steps/0",
            "step `s` has 2 actions: `task` and `pipeline`",
            "exactly one",
        ),
        (task(json!({"command": "c"})), "/steps/0/task", "the task has neither `arguments` nor `inputs`", "either"),
        (
            in_configuration("offlaod", json!("model")),
            "/steps/0/pipeline/configuration/offlaod",
            "`configuration` has no key `offlaod`",
            "did you mean `offload`?",
        ),
        (
            in_configuration("offload", json!("modle")),
            "/steps/0/pipeline/configuration/offload",
            "`offload` must be `model`, `sequential`, `group` or `auto`, found the text `modle`",
            "did you mean `model`?",
        ),
        (
            in_pipeline("controlnet", json!([{"configuration": {}, "from_pretrained_arguments": {}}])),
            "/steps/0/pipeline/controlnet/0/configuration",
            "`component_type` is a required property of `configuration`",
            "",
        ),
        (
            in_pipeline("chain", json!({"segments": 0})),
            "/steps/0/pipeline/chain/segments",
            "`segments` must be at least 1, found `0`",
            "",
        ),
        (step(json!(3)), "/steps/0", "item 0 of `steps` must be an object, found `3`", ""),
    ];
    for (document, pointer, message, remedy) in cases {
        let found = findings(&document);
        assert_eq!(found.len(), 1, "{message}: {found:#?}");
        assert_eq!((found[0].place.pointer.as_str(), found[0].message.as_str()), (pointer, message));
        assert!(found[0].remedy.as_deref().unwrap_or("").contains(remedy), "{:?}", found[0]);
        assert!(found[0].place.line >= 1);
    }
}

#[test]
fn everything_wrong_is_found_at_once() {
    let mut document = with("/seed", json!("x"));
    document["steps"] = json!([{"name": "a"}, {"task": {"command": 1, "arguments": {}}}]);
    let codes: Vec<&str> = findings(&document).iter().map(|finding| finding.code).collect();
    assert_eq!(codes, ["step-action", "missing-key", "wrong-type", "wrong-type"]);
}
