//! The models against HuggingFace diffusers, component by component: tiny random models of the real
//! architectures, and what the reference computed with them (`tests/parity/make.py` rebuilds both).

mod clip;
mod controlnet;
mod ip_adapter;
mod unet;
mod vae;
mod variants;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dw_pipelines::{
    Result,
    weights::{Weights, folder::weight_files},
};
use serde::de::DeserializeOwned;

/// How far rounding in another order of summation may lead, as a part of the largest value: the reference itself, run
/// with other kernels or in float64, moves by about a tenth of this.
const TOLERANCE: f32 = 2e-5;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity")
}

fn load(files: &[PathBuf]) -> Result<Weights> {
    Weights::load(files, DType::F32, &Device::Cpu, &mut |_| Ok(()))
}

/// What the reference computed in one case.
struct Case(Weights);

impl Case {
    fn open(name: &str) -> Self {
        Self::read(&fixtures().join("components").join(format!("{name}.safetensors")))
    }

    fn read(file: &Path) -> Self {
        Self(load(&[file.to_owned()]).expect("the fixture is there"))
    }

    fn find(&self, name: &str) -> Option<Tensor> {
        let shape = self.0.shape_of(name)?;
        Some(self.0.get(shape, name).expect("a tensor has its own shape"))
    }

    fn get(&self, name: &str) -> Tensor {
        self.find(name).unwrap_or_else(|| panic!("the fixture has no `{name}`"))
    }
}

/// Configuration and weights of one component of a model.
fn component<C: DeserializeOwned>(model: &str, name: &str) -> (C, Weights) {
    component_at(&fixtures().join("models").join(model).join(name))
}

fn component_at<C: DeserializeOwned>(dir: &Path) -> (C, Weights) {
    let config = std::fs::read_to_string(dir.join("config.json")).expect("the fixture has a configuration");
    let config = serde_json::from_str(&config).expect("the configuration is of this model");
    let files = weight_files(dir, None).expect("the fixture has weights");
    (config, load(&files).expect("the weights are valid"))
}

fn largest(values: &Tensor) -> f32 {
    let largest = values.abs().and_then(|values| values.flatten_all()?.max(0)?.to_scalar::<f32>());
    largest.expect("values are f32")
}

fn assert_close(what: &str, found: &Tensor, expected: &Tensor) {
    assert_within(what, found, expected, TOLERANCE * largest(expected).max(1.0));
}

fn assert_within(what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let found = found.to_dtype(DType::F32).expect("every type widens");
    let difference = largest(&(found - expected).expect("equal shapes"));
    assert!(difference <= tolerance, "{what}: differs by {difference:e}, allowed are {tolerance:e}");
}
