//! Plans by example: what a plan holds, and every check with its finding.

use serde_json::json;

use super::*;
use crate::{catalog::CatalogEntry, finding::Severity};

fn entry(name: &str, schema: Value) -> CatalogEntry {
    CatalogEntry { name: name.into(), summary: String::new(), schema }
}

/// All optional keys but those that the test of missing ones is about.
const FEATURES: &[&str] = &[
    "/chain",
    "/configuration/cache",
    "/configuration/components",
    "/configuration/group_offload",
    "/configuration/offload",
    "/configuration/prompt_weighting",
    "/configuration/teacache",
    "/configuration/vae/torch_dtype",
    "/ip_adapter",
    "/loras",
    "/remote_text_encoder",
];

fn catalog() -> Catalog {
    let media = json!({"anyOf": [{"type": "string"}, {"type": "object", "required": ["location"]}]});
    let picture = json!({
        "type": "object", "additionalProperties": false, "required": ["image"], "$defs": {"Media": media},
        "properties": {"image": {"$ref": "#/$defs/Media"}, "height": {"type": "integer"}, "mode": {"enum": ["a", "b"]}}
    });
    Catalog {
        pipelines: vec![entry(
            "StableDiffusionPipeline",
            json!({"type": "object", "additionalProperties": false, "required": ["prompt"], "properties": {
                "prompt": {"type": ["string", "array"]}, "prompt_embeds": {}, "negative_prompt": {"type": "string"},
                "num_inference_steps": {"type": "integer", "minimum": 1}, "guidance_scale": {"type": "number"},
                "output_type": {"enum": ["pil", "latent"]}
            }}),
        )],
        schedulers: vec![entry(
            "EulerDiscreteScheduler",
            json!({"type": "object", "properties": {"beta_start": {"type": "number"}}}),
        )],
        tasks: vec![
            entry("resize", picture),
            entry("gather_inputs", json!({"type": "object", "additionalProperties": true})),
        ],
        models: vec!["landscapes".into()],
        features: FEATURES.iter().map(|feature| (*feature).to_owned()).collect(),
    }
}

const CHILD: &str = r#"{"id": "child", "variables": {"prompt": "x", "steps": 3}, "steps": [{"name": "c", "pipeline": {
    "configuration": {"component_type": "StableDiffusionPipeline"},
    "from_pretrained_arguments": {"model_name": "builtin:landscapes"},
    "arguments": {"prompt": "variable:prompt", "num_inference_steps": "variable:steps"}}}]}"#;

fn builtin(name: &str) -> Option<&'static str> {
    match name {
        "child.json" => Some(CHILD),
        "loop.json" => Some(r#"{"id": "l", "steps": [{"name": "a", "workflow": {"path": "builtin:loop.json"}}]}"#),
        _ => None,
    }
}

fn plan_in(folder: &Path, workflow: &Value, overrides: Value, purpose: Purpose) -> Result<Plan, Vec<Finding>> {
    let text = serde_json::to_string_pretty(workflow).expect("JSON");
    let catalog = catalog();
    let inputs = PlanInputs {
        overrides: overrides.as_object().cloned().expect("an object"),
        seed: None,
        catalog: &catalog,
        builtin_workflow: &builtin,
        ancestors: Vec::new(),
        purpose,
    };
    build(&Document::from_text(&text, folder)?, &inputs)
}

fn plan(workflow: &Value, overrides: Value) -> Result<Plan, Vec<Finding>> {
    plan_in(Path::new("/tmp"), workflow, overrides, Purpose::Run)
}

fn pipeline_step(name: &str) -> Value {
    json!({"name": name, "pipeline": {
        "configuration": {"component_type": "StableDiffusionPipeline"},
        "from_pretrained_arguments": {"model_name": "builtin:landscapes"},
        "arguments": {"prompt": "a boat"}}})
}

fn workflow(steps: Value) -> Value {
    json!({"id": "w", "steps": steps})
}

fn with(mut value: Value, pointer: &str, inserted: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
    value.pointer_mut(parent).expect("the parent is there")[key] = inserted;
    value
}

/// `code pointer: message` of each finding.
fn told(result: Result<Plan, Vec<Finding>>) -> Vec<String> {
    let findings = result.map_or_else(|findings| findings, |plan| plan.warnings);
    findings.iter().map(|finding| format!("{} {}: {}", finding.code, finding.place.pointer, finding.message)).collect()
}

/// Asserts that there is one finding, which begins so.
fn one(workflow: &Value, begins: &str) {
    let told = told(plan(workflow, json!({})));
    assert!(told.len() == 1 && told[0].starts_with(begins), "wanted {begins}\nfound {told:#?}");
}

#[test]
fn a_plan_holds_the_typed_steps_with_variables_bound() {
    let document = json!({
        "$schema": "x", "id": "w", "seed": "variable:seed",
        "variables": {"seed": [7, 8], "prompt": "a", "fps": 12, "offload": "model", "scale": 0.5, "flag": true, "none": null},
        "steps": [
            {"name": "gen", "seed": 5, "release_pipeline": "variable:flag", "pipeline": {
                "seed": 6,
                "configuration": {"component_type": "diffusers.StableDiffusionPipeline", "offload": "variable:offload",
                                  "shared_components": ["vae"]},
                "from_pretrained_arguments": {"model_name": "builtin:landscapes", "torch_dtype": "torch.float16",
                                              "safety_checker": null, "variant": "variable:none"},
                "shared_components": ["unet"],
                "vae": {"configuration": {"component_type": "AutoencoderKL"}, "from_pretrained_arguments": {"model_name": "o/v"}},
                "extra_part": {"configuration": {"component_type": "X"}, "from_pretrained_arguments": {}},
                "controlnet": [{"configuration": {"component_type": "C"}, "from_pretrained_arguments": {"model_name": "o/c"}}],
                "ip_adapter": [{"model_name": "o/i", "scale": "variable:scale"}],
                "loras": [{"model_name": "o/l", "scale": "variable:scale"}],
                "arguments": {"prompt": "variable:prompt", "output_type": "{latent}"}},
             "result": {"content_type": "image/gif", "fps": "variable:fps", "quality": 3}},
            {"name": "again", "pipeline_reference": {"reference_name": "gen", "arguments": {"prompt": "previous_result:gen"}}},
            {"name": "t", "task": {"command": "gather_inputs", "inputs": ["previous_result:nothing", {"a": 1}]}},
            {"name": "sub", "workflow": {"path": "builtin:child.json", "arguments": {"prompt": "previous_result:t"}}}
        ]
    });
    let plan = plan(&document, json!({"prompt": "b", "fps": "24"})).expect("a plan");
    assert_eq!(plan.seed, Some(Seed::Each(vec![7, 8])));
    assert_eq!(plan.steps.len(), 4);
    let gen_step = &plan.steps[0];
    assert_eq!((gen_step.seed.clone(), gen_step.release_pipeline), (Some(Seed::One(6)), true));
    assert_eq!(gen_step.result.as_ref().expect("a result").fps.expect("fps").0, 24);
    assert_eq!(gen_step.result.as_ref().expect("a result").extras["quality"], 3);
    let Action::Pipeline(pipeline) = &gen_step.action else { panic!("a pipeline") };
    assert_eq!(pipeline.class, "StableDiffusionPipeline");
    assert_eq!(pipeline.arguments, *json!({"prompt": "b", "output_type": "latent"}).as_object().expect("an object"));
    assert_eq!(pipeline.omitted, ["safety_checker"]);
    assert_eq!(pipeline.shared_components, ["unet", "vae"]);
    assert_eq!(pipeline.components.keys().collect::<Vec<_>>(), ["controlnet", "extra_part", "vae"]);
    assert_eq!(pipeline.ip_adapters[0].scale, Some(json!(0.5)));
    assert!(matches!(&plan.steps[1].action, Action::Reference(reference) if reference.index == 0));
    assert!(
        matches!(&plan.steps[2].action, Action::Task(TaskStep { input: TaskInput::Inputs(items), .. }) if items.len() == 2)
    );
    assert!(
        matches!(&plan.steps[3].action, Action::Workflow(step) if step.source == WorkflowSource::Builtin("child.json".into()))
    );
    assert_eq!(plan.warnings, []);
}

#[test]
fn seeds_come_from_the_pipeline_then_the_step() {
    let seed = |step: Value| plan(&workflow(json!([step])), json!({})).expect("a plan").steps[0].seed.clone();
    let step = with(pipeline_step("s"), "/seed", json!(222));
    assert_eq!(seed(step.clone()), Some(Seed::One(222)));
    assert_eq!(seed(with(step, "/pipeline/seed", json!(333.0))), Some(Seed::One(333)));
    assert_eq!(seed(pipeline_step("s")), None);
}

#[test]
fn the_same_document_can_be_planned_again_with_other_overrides() {
    let document = json!({"id": "w", "variables": {"p": "a"}, "steps": [pipeline_step("s")]});
    let document = with(document, "/steps/0/pipeline/arguments/prompt", json!("variable:p"));
    let prompt = |overrides: Value| match plan(&document, overrides).expect("a plan").steps.remove(0).action {
        Action::Pipeline(pipeline) => pipeline.arguments["prompt"].clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(prompt(json!({"p": "b"})), "b");
    assert_eq!(prompt(json!({})), "a");
}

#[test]
fn variables_are_checked_where_they_stand() {
    let document = |variables: Value, key: &str, value: Value| {
        let mut step = pipeline_step("s");
        step["pipeline"]["arguments"][key] = value;
        json!({"id": "w", "variables": variables, "steps": [step]})
    };
    let undefined = document(json!({"prompt": "x", "p": 1}), "prompt", json!("variable:promt"));
    let result = plan(&undefined, json!({}));
    let findings = result.expect_err("undefined");
    assert_eq!(findings[0].remedy.as_deref(), Some("did you mean `variable:prompt`?"));
    assert_eq!(
        told(Err(findings)),
        ["undefined-variable /steps/0/pipeline/arguments/prompt: Variable <promt> not found"]
    );
    one(
        &document(json!({"n": "many"}), "num_inference_steps", json!("variable:n")),
        "argument-type /steps/0/pipeline/arguments/num_inference_steps: `num_inference_steps` must be a whole number, \
         found the text `many` (from the variable `n`)",
    );
    let seeded = with(document(json!({"s": "x"}), "prompt", json!("p")), "/seed", json!("variable:s"));
    one(
        &seeded,
        "wrong-type /seed: `seed` must be a whole number or a list, found the text `x` (from the variable `s`)",
    );
    let declared = document(json!({"prompt": "x", "steps": 3}), "prompt", json!(["variable:prompt", "variable:steps"]));
    let findings = plan(&declared, json!({"promt": "y", "steps": "3.5"})).expect_err("two overrides are wrong");
    assert!(findings[0].message.starts_with("Unknown variable 'promt'; declared variables: prompt, steps"));
    assert!(findings[1].message.starts_with("variable `steps` expects a whole number, found the text `3.5`"));
    assert_eq!(findings[1].place.pointer, "/variables/steps");
    let told = told(plan(&workflow(json!([pipeline_step("s")])), json!({"p": 1})));
    assert_eq!(told, ["unknown-variable : Unknown variable 'p'; the workflow declares no variables"]);
}

#[test]
fn without_variables_a_reference_stays_and_is_a_warning() {
    let document =
        with(workflow(json!([pipeline_step("s")])), "/steps/0/pipeline/arguments/prompt", json!("variable:x"));
    let result = plan(&document, json!({})).expect("a plan");
    assert_eq!((result.warnings.len(), result.warnings[0].code), (1, "undefined-variable"));
    let typed = with(workflow(json!([pipeline_step("s")])), "/seed", json!("variable:x"));
    assert!(plan_in(Path::new("/tmp"), &typed, json!({}), Purpose::Validate).is_ok());
    assert!(plan(&typed, json!({})).is_err());
}

#[test]
fn references_name_steps_that_ran_before() {
    let reference = |name: &str| json!({"name": "r", "task": {"command": "gather_inputs", "arguments": {"a": [name]}}});
    let steps = |name: &str| workflow(json!([pipeline_step("v1.0"), reference(name), pipeline_step("later")]));
    for name in ["v1.0", "v1.0.mask", "v1.0.a.b"] {
        assert_eq!(told(plan(&steps(&format!("previous_result:{name}")), json!({}))), Vec::<String>::new(), "{name}");
    }
    assert_eq!(told(plan(&steps("previous_results:v1.0"), json!({}))), Vec::<String>::new());
    let place = "/steps/1/task/arguments/a/0";
    one(
        &steps("previous_result:v1.1"),
        &format!("unknown-step {place}: Previous result 'v1.1' not found. Available results: [v1.0]"),
    );
    one(&steps("previous_result:later"), &format!("later-step {place}: the step `later` runs after"));
    one(&steps("previous_result:r.x"), &format!("later-step {place}: the step `r` refers to its own result"));
    one(&steps("previous_results:gone"), &format!("unknown-step {place}"));
    let twice = workflow(json!([pipeline_step("a"), pipeline_step("a"), reference("previous_result:a")]));
    one(&twice, "ambiguous-step /steps/2/task/arguments/a/0");
    let unreferenced = workflow(json!([pipeline_step("a"), pipeline_step("a")]));
    assert_eq!(told(plan(&unreferenced, json!({}))), Vec::<String>::new());
}

#[test]
fn references_outside_of_arguments_are_errors() {
    let document = with(
        workflow(json!([pipeline_step("a"), pipeline_step("b")])),
        "/steps/1/pipeline/from_pretrained_arguments/model_name",
        json!("previous_result:a"),
    );
    one(&document, "reference-place /steps/1/pipeline/from_pretrained_arguments/model_name");
}

#[test]
fn a_variable_without_a_value_is_an_error_only_to_a_run() {
    let step = with(pipeline_step("s"), "/pipeline/arguments/prompt", json!("variable:prompt"));
    let document = json!({"id": "w", "variables": {"prompt": null}, "steps": [step]});
    assert!(plan_in(Path::new("/tmp"), &document, json!({}), Purpose::Validate).is_ok());
    one(&document, "argument-type /steps/0/pipeline/arguments/prompt");
    assert!(plan(&document, json!({"prompt": "x"})).is_ok());
}

#[test]
fn keys_that_nothing_reads_are_warnings_with_the_name_that_was_meant() {
    let scheduler = json!({ "configuration": { "scheduler_type": "EulerDiscreteScheduler" }, "from_confg_args": {} });
    let step = with(pipeline_step("draw"), "/pipeline/scheduler", scheduler);
    let mut document = workflow(json!([with(step, "/reslt", json!({}))]));
    document["_remark"] = json!("kept");
    let found = plan(&document, json!({})).expect("no error").warnings;
    let warnings: Vec<_> = found.iter().filter(|finding| finding.code == "unknown-key").collect();
    let places: Vec<&str> = warnings.iter().map(|finding| finding.place.pointer.as_str()).collect();
    assert_eq!(places, ["/steps/0/pipeline/scheduler/from_confg_args", "/steps/0/reslt"]);
    assert_eq!(warnings[0].remedy.as_deref(), Some("did you mean `from_config_args`?"));
    assert_eq!(warnings[1].remedy.as_deref(), Some("did you mean `result`?"));
}

#[test]
fn too_many_steps_are_one_finding() {
    let step = json!({"name": "t", "task": {"command": "gather_inputs", "arguments": {}}});
    one(&workflow(vec![step; 10_001].into()), "too-large /steps: too many steps: 10001 > 10000");
}

#[test]
fn pipeline_references_name_earlier_pipeline_steps() {
    let reference =
        |name: &str| json!({"name": "r", "pipeline_reference": {"reference_name": name, "arguments": {"prompt": "x"}}});
    let task = json!({"name": "t", "task": {"command": "gather_inputs", "arguments": {}}});
    let steps = |name: &str| workflow(json!([pipeline_step("gen"), task, reference(name), pipeline_step("later")]));
    assert_eq!(told(plan(&steps("gen"), json!({}))), Vec::<String>::new());
    let place = "unknown-step /steps/2/pipeline_reference/reference_name";
    one(&steps("gne"), &format!("{place}: there is no pipeline step `gne`"));
    one(&steps("t"), &format!("{place}: the step `t` is not a pipeline step"));
    one(&steps("later"), &format!("{place}: the step `later` does not run before"));
    let wrong = with(steps("gen"), "/steps/2/pipeline_reference/arguments/promt", json!("x"));
    one(&wrong, "unknown-argument /steps/2/pipeline_reference/arguments/promt");
}

#[test]
fn arguments_are_checked_against_the_catalog() {
    let call = |arguments: Value| with(workflow(json!([pipeline_step("s")])), "/steps/0/pipeline/arguments", arguments);
    let place = "/steps/0/pipeline/arguments";
    one(&call(json!({})), &format!("missing-argument {place}: `StableDiffusionPipeline` needs the argument `prompt`"));
    one(
        &call(json!({"prompt": "x", "guidence_scale": 1})),
        &format!("unknown-argument {place}/guidence_scale: `StableDiffusionPipeline` has no argument `guidence_scale`"),
    );
    one(
        &call(json!({"prompt": "x", "num_inference_steps": 2.5})),
        &format!(
            "argument-type {place}/num_inference_steps: `num_inference_steps` must be a whole number, found `2.5`"
        ),
    );
    one(
        &call(json!({"prompt": "x", "num_inference_steps": 0})),
        &format!("argument-type {place}/num_inference_steps: `num_inference_steps` must be at least 1"),
    );
    one(&call(json!({"prompt": "x", "prompt_embeds": [1]})), &format!("conflict {place}/prompt_embeds"));
    let late = workflow(json!([pipeline_step("a"), pipeline_step("s")]));
    let late = with(late, "/steps/1/pipeline/arguments/num_inference_steps", json!("previous_result:a.n"));
    assert_eq!(told(plan(&late, json!({}))), Vec::<String>::new());
}

#[test]
fn tasks_are_checked_against_the_catalog() {
    let task = |task: Value| workflow(json!([{"name": "t", "task": task}]));
    let findings = plan(&task(json!({"command": "resise", "arguments": {}})), json!({})).expect_err("unknown");
    assert_eq!(
        findings[0].to_string(),
        "<stdin>:7:20: error[unknown-task]: Unknown task command: 'resise'; did you mean `resize`?"
    );
    let url = "https://example.com/a.png";
    assert!(plan(&task(json!({"command": "resize", "arguments": {"image": url, "device": "cpu"}})), json!({})).is_ok());
    one(
        &task(json!({"command": "resize", "arguments": {"image": url, "mode": "c"}})),
        "argument-type /steps/0/task/arguments/mode",
    );
    one(
        &task(json!({"command": "resize", "arguments": {}})),
        "missing-argument /steps/0/task/arguments: the task `resize`",
    );
    one(
        &task(json!({"command": "resize", "inputs": [{"image": url, "hieght": 1}]})),
        "unknown-argument /steps/0/task/inputs/0/hieght",
    );
    one(
        &task(json!({"command": "resize", "arguments": {"image": 3}})),
        "media /steps/0/task/arguments/image: Image specification must be a string",
    );
    one(
        &task(json!({"command": "resize", "arguments": {"image": "gone.png"}})),
        "media /steps/0/task/arguments/image: Path does not exist",
    );
    one(
        &task(json!({"command": "resize", "arguments": {"image": "../a.png"}})),
        "media /steps/0/task/arguments/image: Path contains dangerous pattern",
    );
}

#[test]
fn what_this_build_lacks_is_a_warning_to_validate_and_an_error_to_run() {
    let unknown = with(
        workflow(json!([pipeline_step("s")])),
        "/steps/0/pipeline/configuration/component_type",
        json!("StableDifusionPipeline"),
    );
    let constant =
        with(workflow(json!([pipeline_step("s")])), "/steps/0/pipeline/arguments/prompt", json!("constant:a.B"));
    let built = json!({"from_arguments": {"x": 1}, "thing_type": "a.B"});
    let built = with(workflow(json!([pipeline_step("s")])), "/steps/0/pipeline/arguments/prompt", built);
    for (document, code) in [(unknown, "unknown-pipeline"), (constant, "needs-python"), (built, "needs-python")] {
        let plan = plan_in(Path::new("/tmp"), &document, json!({}), Purpose::Validate).expect(code);
        assert_eq!((plan.warnings.len(), plan.warnings[0].code), (1, code));
        let findings = plan_in(Path::new("/tmp"), &document, json!({}), Purpose::Run).expect_err(code);
        assert_eq!((findings.len(), findings[0].code, findings[0].severity), (1, code, Severity::Error));
    }
}

#[test]
fn constants_and_constructions_that_are_written_wrongly_are_errors() {
    let cases = [
        (json!("constant:"), "constant /steps/0/task/arguments/a: Constant name cannot be empty"),
        (json!("constant:../../etc/passwd"), "constant /steps/0/task/arguments/a: Invalid constant name"),
        (json!("constant:os.system()"), "constant /steps/0/task/arguments/a: Invalid constant name"),
        (
            json!({"from_file": "s.png", "a_type": "X", "b_type": "Y"}),
            "construction /steps/0/task/arguments/a: an object with `from_file` needs exactly one '_type'",
        ),
        (json!({"from_file": "previous_result:x", "a_type": "X"}), ""),
        (
            json!({"from_arguments": 1, "a_type": "X"}),
            "construction /steps/0/task/arguments/a: `from_arguments` must be an object",
        ),
        (
            json!({"from_arguments": {}, "a_type": "X", "fps": 1}),
            "construction /steps/0/task/arguments/a: `fps` stands beside",
        ),
    ];
    for (value, begins) in cases {
        let document =
            workflow(json!([{"name": "t", "task": {"command": "gather_inputs", "arguments": {"a": value}}}]));
        if begins.is_empty() {
            assert!(plan(&document, json!({})).is_err());
        } else {
            one(&document, begins);
        }
    }
    let plain = json!([{"name": "t", "task": {"command": "gather_inputs", "arguments": {"a": {"from_file": "s.png"}, "b": "a constant: a thing"}}}]);
    assert_eq!(told(plan(&workflow(plain), json!({}))), Vec::<String>::new());
}

#[test]
fn models_files_types_and_schedulers_are_checked() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs_err::create_dir_all(folder.path().join("lora")).expect("a folder");
    let told_for = |key: &str, value: Value| {
        let document = with(workflow(json!([pipeline_step("s")])), &format!("/steps/0/pipeline/{key}"), value);
        told(plan_in(folder.path(), &document, json!({}), Purpose::Run))
    };
    let cases = [
        (
            "from_pretrained_arguments",
            json!({"model_name": "builtin:landscape"}),
            "unknown-model /steps/0/pipeline/from_pretrained_arguments/model_name: there is no built-in model `landscape`",
        ),
        (
            "from_pretrained_arguments",
            json!({"model_name": "./models/sd"}),
            "missing-file /steps/0/pipeline/from_pretrained_arguments/model_name: nothing is at `",
        ),
        (
            "from_pretrained_arguments",
            json!({"from_single_file": "gone.safetensors"}),
            "missing-file /steps/0/pipeline/from_pretrained_arguments/from_single_file",
        ),
        (
            "from_pretrained_arguments",
            json!({"model_name": "o/n", "torch_dtype": "torch.flaot16"}),
            "unknown-dtype /steps/0/pipeline/from_pretrained_arguments/torch_dtype: unknown number type `torch.flaot16`",
        ),
        (
            "loras",
            json!([{"model_name": "lora", "weight_name": "gone.safetensors"}]),
            "missing-file /steps/0/pipeline/loras/0/weight_name",
        ),
        ("loras", json!([{"model_name": "o/l", "scale": "strong"}]), "wrong-type /steps/0/pipeline/loras/0/scale"),
        (
            "scheduler",
            json!({"configuration": {"scheduler_type": "EulerDiscretScheduler"}}),
            "unknown-scheduler /steps/0/pipeline/scheduler/configuration/scheduler_type",
        ),
        (
            "scheduler",
            json!({"configuration": {"scheduler_type": "EulerDiscreteScheduler"}, "from_config_args": {"beta_strat": 1}}),
            "unknown-setting /steps/0/pipeline/scheduler/from_config_args/beta_strat",
        ),
        (
            "reused_components",
            json!(["vae"]),
            "unshared-component /steps/0/pipeline/reused_components/0: Cannot reuse component 'vae' - no earlier step shared it. Shared so far: nothing",
        ),
        (
            "chain",
            json!({"match_audio": false}),
            "conflict /steps/0/pipeline/chain/match_audio: A chain needs exactly one",
        ),
        (
            "chain",
            json!({"segments": "1001"}),
            "wrong-value /steps/0/pipeline/chain/segments: Chain 'segments' must be between 1 and 1000, got 1001",
        ),
        (
            "vae",
            json!({"configuration": {"component_type": "A"}, "from_pretrained_arguments": {"model_name": "/gone/vae"}}),
            "missing-file /steps/0/pipeline/vae/from_pretrained_arguments/model_name",
        ),
        ("extra", json!({"configuration": {}, "from_pretrained_arguments": {}}), "component /steps/0/pipeline/extra"),
        ("remote_text_encoder", json!({"url": "ftp://x"}), "url /steps/0/pipeline/remote_text_encoder/url"),
    ];
    for (key, value, begins) in cases {
        let told = told_for(key, value);
        assert!(told.len() == 1 && told[0].starts_with(begins), "wanted {begins}\nfound {told:#?}");
    }
    let configurations = [
        (json!({"cache": {"type": "faster"}, "teacache": {}}), "conflict /steps/0/pipeline/configuration/teacache"),
        (
            json!({"cache": {"type": "first_block", "threshold": -0.1}}),
            "wrong-value /steps/0/pipeline/configuration/cache/threshold: `threshold` must be at least 0",
        ),
        (
            json!({"teacache": {"rel_l1_thresh": -1}}),
            "wrong-value /steps/0/pipeline/configuration/teacache/rel_l1_thresh",
        ),
        (
            json!({"exclude_from_cpu_offload": ["vae"]}),
            "conflict /steps/0/pipeline/configuration/exclude_from_cpu_offload",
        ),
        (
            json!({"components": {"vae": {"group_offload": {"offload_type": "x"}, "residency": "on_demand"}}}),
            "conflict /steps/0/pipeline/configuration/components/vae",
        ),
        (json!({"vae": {"torch_dtype": "f16"}}), "unknown-dtype /steps/0/pipeline/configuration/vae/torch_dtype"),
    ];
    for (mut configuration, begins) in configurations {
        configuration["component_type"] = json!("StableDiffusionPipeline");
        let told = told_for("configuration", configuration);
        assert!(told.len() == 1 && told[0].starts_with(begins), "wanted {begins}\nfound {told:#?}");
    }
}

#[test]
fn names_that_leave_the_output_folder_are_errors() {
    let document = with(workflow(json!([pipeline_step("../s")])), "/id", json!("a/b"));
    let document = with(document, "/steps/0/result", json!({"content_type": "image/png", "file_base_name": "../x"}));
    let codes: Vec<String> = told(plan(&document, json!({})));
    assert_eq!(codes.len(), 3, "{codes:#?}");
    assert!(codes.iter().all(|told| told.starts_with("output-name")));
}

#[test]
fn sub_workflows_are_planned_with_the_arguments_they_are_given() {
    let step = |path: &str, arguments: Value| {
        workflow(json!([{"name": "s", "workflow": {"path": path, "arguments": arguments}}]))
    };
    assert_eq!(told(plan(&step("builtin:child.json", json!({"prompt": "x"})), json!({}))), Vec::<String>::new());
    one(
        &step("builtin:child.json", json!({"promt": "x"})),
        "unknown-variable /steps/0/workflow/arguments/promt: Unknown variable 'promt'; declared variables: prompt, steps",
    );
    one(&step("builtin:child.json", json!({"steps": "x"})), "variable-type /steps/0/workflow/arguments/steps");
    one(
        &step("builtin:child.json", json!({"steps": 0})),
        "argument-type /steps/0/pipeline/arguments/num_inference_steps",
    );
    one(
        &step("builtin:gone.json", json!({})),
        "missing-file /steps/0/workflow/path: there is no built-in workflow `gone.json`",
    );
    one(&step("builtin:../x.json", json!({})), "sub-workflow /steps/0/workflow/path: Invalid builtin workflow name");
    one(&step("builtin:x.txt", json!({})), "sub-workflow /steps/0/workflow/path: Invalid builtin workflow name");
    one(
        &step("../flux/FluxDev.json", json!({})),
        "sub-workflow /steps/0/workflow/path: Path contains dangerous pattern",
    );
    one(&step("gone.json", json!({})), "missing-file /steps/0/workflow/path: Path does not exist");
    one(
        &workflow(json!([{"name": "s", "workflow": {}}])),
        "missing-key /steps/0/workflow: the sub-workflow has no `path`",
    );
    one(
        &step("builtin:loop.json", json!({})),
        "recursion /steps/0/workflow/path: the workflow runs itself: builtin:loop.json -> builtin:loop.json",
    );
}

#[test]
fn findings_of_a_sub_workflow_name_its_file_and_circles_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, value: &Value| {
        fs_err::write(folder.path().join(name), serde_json::to_string_pretty(value).expect("JSON")).expect("a file");
    };
    let call = |path: &str| json!({"id": "w", "steps": [{"name": "s", "workflow": {"path": path, "arguments": {}}}]});
    write("a.json", &call("b.json"));
    write("b.json", &call("a.json"));
    write("c.json", &call("d.json"));
    write("d.json", &json!({"id": "d", "steps": []}));
    let findings = |name: &str| {
        let catalog = catalog();
        let inputs = PlanInputs {
            overrides: Map::new(),
            seed: None,
            catalog: &catalog,
            builtin_workflow: &builtin,
            ancestors: Vec::new(),
            purpose: Purpose::Run,
        };
        build(&Document::load(&folder.path().join(name)).expect("a document"), &inputs).expect_err(name)
    };
    let circle = findings("a.json");
    assert_eq!(circle.len(), 1);
    assert!(circle[0].message.contains("a.json -> ") && circle[0].message.ends_with("a.json"), "{}", circle[0]);
    let child = findings("c.json");
    assert!(child[0].place.file.as_ref().is_some_and(|file| file.ends_with("d.json")), "{}", child[0]);
}

#[test]
fn everything_wrong_is_told_at_once_in_the_order_of_the_text() {
    let document = json!({
        "id": "w", "variables": {"p": "x", "unused": 1},
        "steps": [
            {"name": "a", "pipeline": {
                "configuration": {"component_type": "StableDiffusionPipeline", "offlaod": "model"},
                "from_pretrained_arguments": {"model_name": "builtin:nope"}, "arguments": {"prompt": "variable:q"}}},
            {"name": "b", "task": {"command": "nope", "arguments": {"x": "previous_result:zz", "image": "gone.png"}}},
            {"name": "c"}
        ],
        "seed": "variable:p"
    });
    let findings = plan(&document, json!({"z": 1})).expect_err("much is wrong");
    let codes: Vec<&str> = findings.iter().map(|finding| finding.code).collect();
    assert_eq!(
        codes,
        [
            "unknown-variable",
            "unknown-key",
            "undefined-variable",
            "unknown-task",
            "unknown-step",
            "media",
            "step-action",
            "wrong-type"
        ]
    );
    assert!(findings.windows(2).all(|pair| pair[0].place.line <= pair[1].place.line));
}

/// A small generator (splitmix64), so that the documents are the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) % below as u64) as usize
    }
}

/// Replaces one value somewhere inside by something odd.
fn mutate(value: &mut Value, noise: &mut Noise) {
    let odd = [
        json!(null),
        json!(-1),
        json!(1e300),
        json!(""),
        json!("variable:v"),
        json!("variable:"),
        json!([]),
        json!({}),
        json!("previous_result:"),
        json!("previous_result:a."),
        json!("constant:x"),
        json!("{}"),
        json!("{"),
        json!([[]]),
        json!({"media_type": 1, "location": 2}),
        json!({"from_arguments": {}, "x_type": 1}),
        json!("builtin:"),
        json!("é\u{0}"),
    ];
    let children = match value {
        Value::Array(items) => items.len(),
        Value::Object(object) => object.len(),
        _ => 0,
    };
    if children == 0 || noise.next(5) == 0 {
        *value = odd[noise.next(odd.len())].clone();
        return;
    }
    let chosen = noise.next(children);
    match value {
        Value::Array(items) => mutate(&mut items[chosen], noise),
        Value::Object(object) => {
            if let Some(child) = object.values_mut().nth(chosen) {
                mutate(child, noise);
            }
        }
        _ => {}
    }
}

#[test]
fn no_document_makes_the_checks_panic() {
    let base = json!({
        "id": "w", "seed": 1, "variables": {"v": "variable:u", "u": [1, "x"], "x_image": {"location": "a.png"}},
        "steps": [
            pipeline_step("a"),
            {"name": "b", "task": {"command": "resize", "arguments": {"image": "variable:x_image", "height": 3}}},
            {"name": "c", "pipeline_reference": {"reference_name": "a", "arguments": {"prompt": "previous_result:a.b"}},
             "result": {"content_type": "image/png", "fps": 3}},
            {"name": "d", "workflow": {"path": "builtin:child.json", "arguments": {"steps": 3}}}
        ]
    });
    let mut noise = Noise(7);
    for round in 0..1500 {
        let mut document = base.clone();
        for _ in 0..=round % 4 {
            mutate(&mut document, &mut noise);
        }
        let mut text = document.to_string();
        if round % 5 == 0 {
            let at = noise.next(text.len());
            let at = (0..=at).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            text.replace_range(at..at, ["{", "]", "\"", ",", ":", "\\", "9"][noise.next(7)]);
        }
        let catalog = catalog();
        let inputs = PlanInputs {
            overrides: Map::new(),
            seed: None,
            catalog: &catalog,
            builtin_workflow: &builtin,
            ancestors: Vec::new(),
            purpose: if round % 2 == 0 { Purpose::Run } else { Purpose::Validate },
        };
        if let Ok(document) = Document::from_text(&text, Path::new("/tmp")) {
            let planned = build(&document, &inputs);
            assert!(
                planned.map_or_else(|findings| !findings.is_empty(), |_| true),
                "an error without a finding: {text}"
            );
        }
    }
}

#[test]
fn quantization_in_a_place_where_nothing_reads_it_is_an_error_that_names_the_right_one() {
    let mut step = pipeline_step("s");
    let quantization = json!({"configuration": {"config_type": "BitsAndBytesConfig"}, "arguments": {}});
    step["pipeline"]["quantization_config"] = quantization.clone();
    step["pipeline"]["text_encoder_2"] = json!({"configuration": {"component_type": "T5EncoderModel"},
        "from_pretrained_arguments": {"model_name": "a/b", "gguf_file": "t5.gguf", "quantization_config": quantization}});
    let findings = plan(&workflow(json!([step])), json!({})).expect_err("three of them change the picture");
    for (place, remedy) in [
        ("/steps/0/pipeline/quantization_config", "each with a `quantization_config`"),
        ("/steps/0/pipeline/text_encoder_2/from_pretrained_arguments/gguf_file", "`from_single_file`"),
        ("/steps/0/pipeline/text_encoder_2/from_pretrained_arguments/quantization_config", "beside `configuration`"),
    ] {
        let found = findings.iter().find(|finding| finding.place.pointer == place).expect(place);
        assert_eq!(found.severity, Severity::Error);
        assert!(found.remedy.as_ref().is_some_and(|said| said.contains(remedy)), "{found:?}");
    }
}

#[test]
fn what_this_build_does_not_do_is_an_error_when_it_changes_the_picture_and_a_warning_when_not() {
    let mut step = pipeline_step("s");
    step["pipeline"]["textual_inversions"] = json!([{"model_name": "a/b"}]);
    step["pipeline"]["loras"] = json!([{"model_name": "a/b"}]);
    step["pipeline"]["configuration"]["vae"] = json!({"enable_tiling": true});
    step["pipeline"]["configuration"]["inversion"] = json!(false);
    step["pipeline"]["unet"] = json!({"configuration": {"component_type": "UNet2DConditionModel"},
        "from_pretrained_arguments": {"model_name": "a/b"},
        "quantization_config": {"configuration": {"config_type": "X"}, "arguments": {}}});
    let findings = plan(&workflow(json!([step])), json!({})).expect_err("two of them change the picture");
    let found: Vec<_> = findings.iter().map(|f| (f.code, f.severity, f.place.pointer.as_str())).collect();
    assert!(
        found.contains(&("unsupported-feature", Severity::Error, "/steps/0/pipeline/textual_inversions")),
        "{found:?}"
    );
    assert!(found.contains(&("unsupported-feature", Severity::Error, "/steps/0/pipeline/unet/quantization_config")));
    assert!(found.contains(&("no-effect", Severity::Warning, "/steps/0/pipeline/configuration/vae/enable_tiling")));
    assert!(!found.iter().any(|(code, _, pointer)| pointer.ends_with("loras") && code.starts_with("unsupported")));
    assert!(!found.iter().any(|(_, _, pointer)| pointer.ends_with("inversion")), "{found:?}");
}
