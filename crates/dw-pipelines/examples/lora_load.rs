//! Measures how long it takes to put a LoRA on the UNet of Stable Diffusion XL: full-size random weights, and a file with
//! every layer of its transformers, as training scripts write them.
//!
//! `cargo run --release -p dw-pipelines --example lora_load -- [f16|bf16|f32] [RANK] [RUNS]`. The file is written to
//! the temporary folder and is in the page cache when it is read.

use std::{collections::HashMap, path::Path, time::Instant};

use candle_core::{CpuStorage, DType, Storage, Tensor};
use dw_core::{cancel::CancellationToken, event::Silent};
use dw_pipelines::{
    Result,
    adapters::{AdapterFile, Lora, file::Place},
    hub::Hub,
    request::{Context, ModelSource},
    weights::Weights,
};
use half::{bf16, f16};
use rayon::prelude::*;

/// The groups of transformers: block, how many of them in it, layers in each, features.
const TRANSFORMERS: [(&str, usize, usize, usize); 5] = [
    ("down_blocks.1", 2, 2, 640),
    ("down_blocks.2", 2, 10, 1280),
    ("mid_block", 1, 10, 1280),
    ("up_blocks.0", 3, 10, 1280),
    ("up_blocks.1", 3, 2, 640),
];

/// Features of the text.
const TEXT: usize = 2048;

/// Every linear layer of the transformers: path, outputs, inputs.
fn layers() -> Vec<(String, usize, usize)> {
    let mut layers = Vec::new();
    for (block, count, depth, width) in TRANSFORMERS {
        for attention in (0..count).map(|number| format!("{block}.attentions.{number}")) {
            layers.push((format!("{attention}.proj_in"), width, width));
            layers.push((format!("{attention}.proj_out"), width, width));
            for layer in (0..depth).map(|number| format!("{attention}.transformer_blocks.{number}")) {
                for (name, features) in [("attn1", width), ("attn2", TEXT)] {
                    layers.push((format!("{layer}.{name}.to_q"), width, width));
                    layers.push((format!("{layer}.{name}.to_k"), width, features));
                    layers.push((format!("{layer}.{name}.to_v"), width, features));
                    layers.push((format!("{layer}.{name}.to_out.0"), width, width));
                }
                layers.push((format!("{layer}.ff.net.0.proj"), 8 * width, width));
                layers.push((format!("{layer}.ff.net.2"), width, 4 * width));
            }
        }
    }
    layers
}

/// Random numbers, about evenly spread around 0 and of the size that weights have.
fn random(shape: (usize, usize), dtype: DType, seed: u64) -> Tensor {
    let number = |at: usize| {
        let mut state = (at as u64 ^ seed << 32).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        state ^= state >> 29;
        (state.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 * (0.1 / (1 << 24) as f32) - 0.05
    };
    let places = (0..shape.0 * shape.1).into_par_iter();
    let numbers = match dtype {
        DType::F16 => CpuStorage::F16(places.map(|at| f16::from_f32(number(at))).collect()),
        DType::BF16 => CpuStorage::BF16(places.map(|at| bf16::from_f32(number(at))).collect()),
        _ => CpuStorage::F32(places.map(number).collect()),
    };
    Tensor::from_storage(Storage::Cpu(numbers), shape, candle_core::op::BackpropOp::none(), false)
}

fn write_file(path: &Path, layers: &[(String, usize, usize)], rank: usize) -> Result<()> {
    let mut tensors = HashMap::new();
    for (number, (layer, outputs, inputs)) in layers.iter().enumerate() {
        let seed = 2 * number as u64;
        tensors.insert(format!("unet.{layer}.lora_A.weight"), random((rank, *inputs), DType::F16, seed));
        tensors.insert(format!("unet.{layer}.lora_B.weight"), random((*outputs, rank), DType::F16, seed + 1));
    }
    Ok(candle_core::safetensors::save(&tensors, path)?)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let dtype = match arguments.next().as_deref() {
        None | Some("f16") => DType::F16,
        Some("bf16") => DType::BF16,
        Some("f32") => DType::F32,
        Some(other) => return Err(format!("`{other}` is no type; use f16, bf16 or f32").into()),
    };
    let rank = arguments.next().map_or(Ok(32), |text| text.parse())?;
    let runs = arguments.next().map_or(Ok(5), |text| text.parse::<usize>())?;
    let layers = layers();
    let path = std::env::temp_dir().join(format!("dw-lora-load-{}.safetensors", std::process::id()));
    write_file(&path, &layers, rank)?;
    let bytes = std::fs::metadata(&path)?.len();
    let tensor = |(number, (layer, outputs, inputs)): (usize, &(String, usize, usize))| {
        Ok((format!("{layer}.weight"), random((*outputs, *inputs), dtype, 1_000_000 + number as u64)))
    };
    let tensors = layers.iter().enumerate().map(tensor).collect::<Result<HashMap<_, _>>>()?;
    let weights = Weights::from_tensors(tensors, "random weights");
    let parameters: usize = layers.iter().map(|(_, outputs, inputs)| outputs * inputs).sum();
    println!("{parameters} parameters in {dtype:?}, file of {bytes} bytes, rank {rank}");

    let hub = Hub { cache: "".into(), endpoint: String::new(), token: None, offline: true };
    let cancel = CancellationToken::default();
    let context = Context { events: &Silent, cancel: &cancel };
    let source = ModelSource::Folder(path.clone());
    for run in 1..=runs {
        let start = Instant::now();
        let file = AdapterFile::find(Place { source: &source, subfolder: None, weight_name: None }, &hub, context)?;
        let lora = Lora::read(&file)?;
        let read = start.elapsed();
        let adapted = lora.put_on("unet", &weights, 0.8, context)?;
        let total = start.elapsed();
        println!("run {run}: read {:.3} s, in all {:.3} s", read.as_secs_f64(), total.as_secs_f64());
        drop(adapted);
    }
    std::fs::remove_file(&path)?;
    Ok(())
}
