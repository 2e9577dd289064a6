//! The Flux models and pipelines, on tiny models made from seeds. The numbers are what HuggingFace diffusers computes with
//! the same models (`tests/parity/make_flux.py` prints them).

mod ip_adapter;
mod models;
mod pipelines;
#[path = "../support/mod.rs"]
mod support;

use candle_core::Tensor;
use dw_pipelines::models::FluxConfig;
use serde_json::{Value, json};

use crate::support::tiny;

/// How far rounding in another order of summation may lead, as a part of the largest value.
const TOLERANCE: f32 = 2e-5;

/// The `config.json` of the tiny transformer.
fn transformer_config() -> Value {
    json!({
        "_class_name": "FluxTransformer2DModel", "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6],
        "guidance_embeds": true, "in_channels": 64, "joint_attention_dim": 64, "num_attention_heads": 2,
        "num_layers": 2, "num_single_layers": 3, "patch_size": 1, "pooled_projection_dim": 32
    })
}

fn config() -> FluxConfig {
    serde_json::from_value(transformer_config()).expect("a configuration")
}

/// The same input as the reference's of this name.
fn input(name: &str, shape: &[usize]) -> Tensor {
    tiny::drawn(&format!("input/{name}"), shape).expect("f32 noise")
}

/// Compares the first four numbers, the last two, and the mean size with the reference's.
fn assert_like(what: &str, found: &Tensor, expected: [f32; 7]) {
    let all = found.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("f32 numbers");
    let mean = all.iter().map(|x| x.abs()).sum::<f32>() / all.len() as f32;
    let seen = [all[0], all[1], all[2], all[3], all[all.len() - 2], all[all.len() - 1], mean];
    let largest = all.iter().fold(1f32, |largest, x| largest.max(x.abs()));
    for (found, expected) in seen.iter().zip(expected) {
        assert!((found - expected).abs() <= TOLERANCE * largest, "{what}: {seen:?} are not {expected:?}");
    }
}
