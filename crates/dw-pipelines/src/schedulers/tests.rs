//! Every sampler against trajectories of the reference: the same random model outputs must lead through
//! the same latents.

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

use super::*;

/// Largest difference, as a share of the largest expected number.
const TOLERANCE: f64 = 3e-6;

struct Trajectory {
    name: String,
    run: Value,
    tensors: HashMap<String, Tensor>,
}

fn trajectories() -> Vec<Trajectory> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/schedulers");
    let mut files: Vec<PathBuf> = fs_err::read_dir(folder)
        .expect("the fixtures are there")
        .map(|entry| entry.expect("the folder is readable").path())
        .collect();
    files.sort();
    files.into_iter().map(read).collect()
}

fn read(path: PathBuf) -> Trajectory {
    let bytes = fs_err::read(&path).expect("the fixture is readable");
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
    let run = header.metadata().as_ref().and_then(|metadata| metadata.get("run")).expect("says what was run");
    Trajectory {
        name: path.file_stem().expect("a file has a name").to_string_lossy().into_owned(),
        run: serde_json::from_str(run).expect("JSON"),
        tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).expect("tensors"),
    }
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).and_then(|t| t.flatten_all()?.to_vec1::<f64>()).expect("f64 holds it")
}

/// The difference as a share of the largest expected number.
fn difference(found: &[f64], expected: &[f64]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let largest = expected.iter().map(|x| x.abs()).fold(f64::MIN_POSITIVE, f64::max);
    let off = found.iter().zip(expected).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() });
    off.map(|x| if x.is_nan() { f64::INFINITY } else { x }).fold(0.0, f64::max) / largest
}

impl Trajectory {
    fn scheduler(&self) -> Box<dyn Scheduler> {
        let config = self.run["config"].as_object().expect("a configuration");
        let class = self.run["class"].as_str().expect("a class");
        let mut scheduler = create(class, config).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        let arguments = &self.run["set_timesteps_kwargs"];
        let list = |key: &str| {
            arguments[key].as_array().map(|values| values.iter().map(|v| v.as_f64().expect("a number")).collect())
        };
        let request = TimestepRequest {
            timesteps: list("timesteps"),
            sigmas: list("sigmas"),
            mu: arguments["mu"].as_f64(),
            ..TimestepRequest::steps(self.run["num_inference_steps"].as_u64().unwrap_or(0) as usize)
        };
        scheduler.set_timesteps(&request).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        scheduler
    }

    fn row(&self, key: &str, i: usize) -> Option<Tensor> {
        self.tensors.get(key).map(|tensor| tensor.get(i).expect("one row for each call"))
    }

    /// Every comparison of the trajectory: what, and how far off.
    fn compare(&self) -> Vec<(String, f64)> {
        let mut found = Vec::new();
        let mut scheduler = self.scheduler();
        found.push(("timesteps".to_owned(), difference(scheduler.timesteps(), &numbers(&self.tensors["timesteps"]))));
        if let Some(expected) = self.tensors.get("sigmas") {
            let sigmas: Vec<f64> = scheduler.sigmas().expect("has sigmas").iter().map(|&s| f64::from(s)).collect();
            let expected = numbers(expected);
            found.push(("sigmas".to_owned(), difference(&sigmas, &expected)));
        }
        let sigma = numbers(&self.tensors["init_noise_sigma"]);
        found.push(("init_noise_sigma".to_owned(), difference(&[scheduler.init_noise_sigma()], &sigma)));
        self.compare_add_noise(scheduler.as_ref(), &mut found);
        self.compare_steps(scheduler.as_mut(), &mut found);
        found
    }

    fn compare_add_noise(&self, scheduler: &dyn Scheduler, found: &mut Vec<(String, f64)>) {
        let timesteps = self.tensors.get("addnoise.timesteps").map(numbers).unwrap_or_default();
        for (i, timestep) in timesteps.into_iter().enumerate() {
            let places: Vec<usize> = (0..scheduler.timesteps().len())
                .filter(|&k| (scheduler.timesteps()[k] - timestep).abs() < 1e-3)
                .collect();
            let index =
                *places.get(1).or(places.first()).unwrap_or_else(|| panic!("{}: no timestep {timestep}", self.name));
            let [clean, noise] = ["addnoise.samples", "addnoise.noise"].map(|key| self.row(key, i).expect("stored"));
            let noisy = scheduler.add_noise(&clean, &noise, index).expect("noise is added");
            let expected = self.row("addnoise.result", i).expect("stored");
            found.push((format!("add_noise at {timestep}"), difference(&numbers(&noisy), &numbers(&expected))));
        }
    }

    fn compare_steps(&self, scheduler: &mut dyn Scheduler, found: &mut Vec<(String, f64)>) {
        let begin = self.run["begin_index"].as_u64().expect("a number") as usize;
        let arguments = &self.run["step_kwargs"];
        let options = StepOptions {
            eta: arguments["eta"].as_f64(),
            use_clipped_model_output: arguments["use_clipped_model_output"].as_bool().unwrap_or(false),
        };
        let initial_noise = &self.tensors["initial_noise"];
        let mut sample = match self.tensors.get("init_latents") {
            Some(clean) => {
                let noisy = scheduler.add_noise(clean, initial_noise, begin).expect("noise is added");
                found.push(("noised".to_owned(), difference(&numbers(&noisy), &numbers(&self.tensors["noised"]))));
                noisy
            }
            None => (initial_noise * scheduler.init_noise_sigma()).expect("a product"),
        };
        let mut drawn = 0;
        for (call, index) in (begin..scheduler.timesteps().len()).enumerate() {
            let mut compare = |what: &str, tensor: &Tensor, key: &str| {
                if let Some(expected) = self.row(key, call) {
                    found.push((format!("{what} {call}"), difference(&numbers(tensor), &numbers(&expected))));
                }
            };
            compare("scaled input", &scheduler.scale_model_input(&sample, index).expect("scaled"), "scaled_inputs");
            let output = self.row("model_outputs", call).expect("one output for each call");
            let mut noise = |shape: &[usize], _: DType| {
                let draw = self.tensors[&format!("noise.rng.{drawn}")].clone();
                drawn += 1;
                assert_eq!(draw.dims(), shape, "{}: draw {drawn}", self.name);
                Ok(draw)
            };
            let step = scheduler.step(&output, index, &sample, &mut noise, &options).expect("a step");
            compare("sample", &step.prev_sample, "prev_samples");
            if let Some(original) = &step.pred_original_sample {
                compare("original", original, "pred_original");
            }
            sample = step.prev_sample;
        }
        let draws = self.tensors.keys().filter(|key| key.starts_with("noise.rng.")).count();
        assert_eq!(drawn, draws, "{}: draws of noise", self.name);
    }
}

#[test]
fn trajectories_are_those_of_the_reference() {
    let mut failures = Vec::new();
    let mut checked = 0;
    for trajectory in trajectories() {
        let comparisons = trajectory.compare();
        checked += comparisons.len();
        if let Some((what, off)) = comparisons.iter().find(|(_, off)| *off > TOLERANCE) {
            failures.push(format!("{}: {what} is off by {off:.1e} of its size", trajectory.name));
        }
    }
    assert!(checked > 2000, "only {checked} comparisons");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_class_has_a_trajectory() {
    let trajectories = trajectories();
    for class in classes() {
        let has = trajectories.iter().any(|trajectory| trajectory.run["class"] == class.name);
        assert!(has, "no trajectory of {}", class.name);
    }
}

#[test]
fn training_schedules_have_the_bits_of_torch() {
    for trajectory in trajectories() {
        let config = &trajectory.run["config"];
        let Some(expected) = trajectory.tensors.get("alphas_cumprod").filter(|table| table.dtype() == DType::F32)
        else {
            continue;
        };
        let number = |key: &str| config[key].as_f64().expect("a number");
        let zero_snr = config["rescale_betas_zero_snr"] == true;
        let options = betas::BetaOptions {
            class: "DDPMScheduler",
            num_train_timesteps: number("num_train_timesteps") as usize,
            beta_start: number("beta_start"),
            beta_end: number("beta_end"),
            beta_schedule: serde_json::from_value(config["beta_schedule"].clone()).expect("a schedule"),
            trained_betas: None,
            rescale_betas_zero_snr: zero_snr,
        };
        let table = if trajectory.run["class"] == "EulerDiscreteScheduler" {
            options.positive_alphas_cumprod()
        } else {
            options.alphas_cumprod()
        };
        let expected = expected.to_vec1::<f32>().expect("numbers");
        let table = table.expect("a schedule");
        // The moved schedule goes through quotients of near numbers, where one rounding shows.
        let allowed = if zero_snr { 2e-7 } else { 0.0 };
        for (i, (found, expected)) in table.iter().zip(&expected).enumerate() {
            let off = (found - expected).abs();
            assert!(off <= allowed * expected, "{} at {i}: {found} instead of {expected}", trajectory.name);
        }
    }
}

fn map(value: Value) -> Map<String, Value> {
    value.as_object().cloned().expect("an object")
}

fn refusal(class: &str, config: Value) -> String {
    match create(class, &map(config)) {
        Ok(_) => panic!("`{class}` took an impossible configuration"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn an_unknown_class_is_answered_with_the_closest_one() {
    let text = refusal("EulerDiscretScheduler", json!({}));
    assert!(text.contains("did you mean `EulerDiscreteScheduler`?"), "{text}");
    assert!(text.contains("UniPCMultistepScheduler"), "{text}");
}

#[test]
fn keys_of_other_classes_are_passed_over() {
    let foreign = json!({
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.42.1", "skip_prk_steps": true,
        "solver_type": "bh2", "algorithm_type": "dpmsolver++", "beta_schedule": "scaled_linear", "trained_betas": null
    });
    for class in classes() {
        let made = create(class.name, &map(foreign.clone())).unwrap_or_else(|error| panic!("{}: {error}", class.name));
        assert_eq!(made.config_json()["_class_name"], class.name);
    }
}

#[test]
fn a_configuration_survives_writing_and_reading() {
    for class in classes() {
        let first = create(class.name, &Map::new()).expect("defaults are possible").config_json();
        let second = create(class.name, &first).expect("its own configuration").config_json();
        assert_eq!(first, second, "{}", class.name);
    }
}

#[test]
fn every_option_is_described() {
    for class in classes() {
        let schema = (class.schema)();
        for (name, property) in schema["properties"].as_object().expect("options") {
            assert!(property["description"].is_string(), "{}: {name}", class.name);
        }
    }
}

#[test]
fn impossible_configurations_are_refused_with_a_remedy() {
    let two_curves = json!({"use_karras_sigmas": true, "use_beta_sigmas": true});
    for class in ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"] {
        let text = refusal(class, two_curves.clone());
        assert!(text.contains("use_karras_sigmas") && text.contains("use_beta_sigmas"), "{text}");
    }
    let text = refusal("DDIMScheduler", json!({"timestep_spacing": "sideways"}));
    assert!(text.contains("timestep_spacing") && text.contains("sideways") && text.contains("leading"), "{text}");
    let text = refusal("DDIMScheduler", json!({"beta_schedule": "sigmoid"}));
    assert!(text.contains("scaled_linear"), "{text}");
    let text = refusal("DPMSolverMultistepScheduler", json!({"algorithm_type": "dpmsolver"}));
    assert!(text.contains("sigma_min"), "{text}");
    let text = refusal("UniPCMultistepScheduler", json!({"solver_type": "bh1"}));
    assert!(text.contains("bh2"), "{text}");
    let text = refusal("DDPMScheduler", json!({"trained_betas": [0.1, 0.2]}));
    assert!(text.contains("num_train_timesteps"), "{text}");
    let text = refusal("DPMSolverMultistepScheduler", json!({"solver_order": 4}));
    assert!(text.contains("1 to 3"), "{text}");
    let text = refusal("FlowMatchEulerDiscreteScheduler", json!({"shift": 0.0}));
    assert!(text.contains("above 0"), "{text}");
}

#[test]
fn impossible_runs_are_refused_with_a_remedy() {
    for class in classes() {
        let mut scheduler = create(class.name, &Map::new()).expect("defaults are possible");
        let error = scheduler.set_timesteps(&TimestepRequest::steps(0)).expect_err("no steps");
        assert!(error.to_string().contains("at least 1"), "{}: {error}", class.name);
        let sample = Tensor::zeros((1, 4, 2, 2), DType::F32, &Device::Cpu).expect("a tensor");
        let mut noise = |shape: &[usize], dtype: DType| Ok(Tensor::zeros(shape, dtype, &Device::Cpu)?);
        let error = scheduler
            .step(&sample, 0, &sample, &mut noise, &StepOptions::default())
            .expect_err("a step before `set_timesteps`");
        assert!(error.to_string().contains("set_timesteps"), "{}: {error}", class.name);
    }
    let mut euler = create("EulerDiscreteScheduler", &Map::new()).expect("defaults are possible");
    let error = euler.set_timesteps(&TimestepRequest::steps(1001)).expect_err("too many steps");
    assert!(error.to_string().contains("at most 1000"), "{error}");
    let both =
        TimestepRequest { timesteps: Some(vec![9.0]), sigmas: Some(vec![1.0, 0.0]), ..TimestepRequest::steps(1) };
    assert!(euler.set_timesteps(&both).is_err());
    let error = euler.set_shift(3.0).expect_err("not a flow");
    assert!(error.to_string().contains("does not take a sigma shift"), "{error}");
    let mut ddim = create("DDIMScheduler", &Map::new()).expect("defaults are possible");
    let given = TimestepRequest { timesteps: Some(vec![999.0, 500.0]), ..TimestepRequest::steps(2) };
    let error = ddim.set_timesteps(&given).expect_err("computes its own");
    assert!(error.to_string().contains("another scheduler"), "{error}");
    let mut flux =
        create("FlowMatchEulerDiscreteScheduler", &map(json!({"use_dynamic_shifting": true}))).expect("possible");
    let error = flux.set_timesteps(&TimestepRequest::steps(4)).expect_err("no mu");
    assert!(error.to_string().contains("mu"), "{error}");
}

#[test]
fn consistency_models_on_a_flow_jump_as_euler_does_with_fresh_noise() {
    let settings = json!({ "shift": 3.0, "use_karras_sigmas": true });
    let mut stochastic = settings.clone();
    stochastic["stochastic_sampling"] = json!(true);
    let drawn = |class: &str, config: Value| {
        let sample = run(&mut *create(class, &map(config)).expect("possible"), 3, DType::F32);
        sample.flatten_all().and_then(|flat| flat.to_vec1::<f32>()).expect("floats")
    };
    let sample = drawn("FlowMatchLCMScheduler", settings);
    assert_eq!(sample, drawn("FlowMatchEulerDiscreteScheduler", stochastic));
    let text = refusal("FlowMatchLCMScheduler", json!({"shift": 0.0}));
    assert!(text.contains("`FlowMatchLCMScheduler`"), "{text}");
    let text = refusal("FlowMatchLCMScheduler", json!({"scale_factors": [0.5, 1.0]}));
    assert!(text.contains("scale_factors") && text.contains("remove it"), "{text}");
}

/// Runs a scheduler on zeros for every step and returns the last sample.
fn run(scheduler: &mut dyn Scheduler, steps: usize, dtype: DType) -> Tensor {
    scheduler.set_timesteps(&TimestepRequest::steps(steps)).expect("a schedule");
    let mut sample = Tensor::ones((2, 4, 3, 5), dtype, &Device::Cpu).expect("a tensor");
    let mut noise = |shape: &[usize], dtype: DType| Ok(Tensor::ones(shape, dtype, &Device::Cpu)?);
    for index in 0..scheduler.timesteps().len() {
        let input = scheduler.scale_model_input(&sample, index).expect("scaled");
        assert_eq!((input.dtype(), input.dims()), (dtype, sample.dims()));
        let output = (input * 0.1).expect("a product");
        sample =
            scheduler.step(&output, index, &sample, &mut noise, &StepOptions::default()).expect("a step").prev_sample;
        assert_eq!(sample.dtype(), dtype);
    }
    sample
}

#[test]
fn runs_of_any_length_stay_finite_in_every_type() {
    for class in classes() {
        for steps in [1, 2, 3, 4, 7, 16, 50] {
            let config = map(json!({"skip_prk_steps": true}));
            for dtype in [DType::F32, DType::BF16] {
                let mut scheduler = create(class.name, &config).expect("defaults are possible");
                let last = run(scheduler.as_mut(), steps, dtype);
                assert!(numbers(&last).iter().all(|x| x.is_finite()), "{} with {steps} steps in {dtype:?}", class.name);
            }
        }
    }
}

#[test]
fn a_second_run_does_not_remember_the_first() {
    for class in classes() {
        let config = map(json!({"skip_prk_steps": true}));
        let mut scheduler = create(class.name, &config).expect("defaults are possible");
        let first = run(scheduler.as_mut(), 5, DType::F32);
        let second = run(scheduler.as_mut(), 5, DType::F32);
        assert_eq!(numbers(&first), numbers(&second), "{}", class.name);
    }
}

#[test]
fn a_set_shift_moves_the_sigmas_of_the_next_run() {
    let mut scheduler = create("FlowMatchEulerDiscreteScheduler", &Map::new()).expect("defaults are possible");
    scheduler.set_timesteps(&TimestepRequest::steps(4)).expect("a schedule");
    let before = scheduler.sigmas().expect("has sigmas")[1];
    scheduler.set_shift(3.0).expect("a flow");
    scheduler.set_timesteps(&TimestepRequest::steps(4)).expect("a schedule");
    assert!(scheduler.sigmas().expect("has sigmas")[1] > before);
}
