//! How long it takes to read a checkpoint, against copying the same file into memory, and to multiply with quantized
//! weights, against candle's own product of blocks.
//!
//!     cargo run --release -p dw-pipelines --example weights_timings [MEGABYTES]

use std::{
    collections::HashMap,
    error::Error,
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use candle_core::{
    DType, Device, Module, Tensor,
    quantized::{GgmlDType, QMatMul, QTensor},
};
use dw_pipelines::{
    quant::{Format, Quantized},
    weights::Weights,
};

/// Sides of the matrices, as in Flux.
const WIDTH: usize = 3072;

/// Positions of activations: a few, and those of a picture of 512x512 with text.
const POSITIONS: [usize; 2] = [16, 1536];

fn main() -> Result<(), Box<dyn Error>> {
    let megabytes: usize = std::env::args().nth(1).map_or(Ok(1024), |text| text.parse())?;
    let path = std::env::temp_dir().join(format!("dw-weights-timings-{}.safetensors", std::process::id()));
    let read = reading(&path, megabytes);
    fs::remove_file(&path)?;
    read?;
    products()
}

/// The least of several times, in seconds.
fn least<T>(times: usize, mut run: impl FnMut() -> Result<T, Box<dyn Error>>) -> Result<f64, Box<dyn Error>> {
    let mut least = f64::INFINITY;
    for _ in 0..times {
        let started = Instant::now();
        let result = run()?;
        least = least.min(started.elapsed().as_secs_f64());
        drop(result);
    }
    Ok(least)
}

fn reading(path: &PathBuf, megabytes: usize) -> Result<(), Box<dyn Error>> {
    write_checkpoint(path, megabytes)?;
    let bytes = fs::metadata(path)?.len() as f64;
    let copy = least(3, || {
        assert!(!fs::read(path)?.is_empty());
        Ok(())
    })?;
    println!("copy of {:.2} GB into memory: {copy:.3} s, {:.2} GB/s", bytes / 1e9, bytes / 1e9 / copy);
    for dtype in [DType::BF16, DType::F32] {
        let files = std::slice::from_ref(path);
        let seconds = least(3, || {
            let weights = Weights::load(files, dtype, &Device::Cpu, &mut |_| Ok(()))?;
            assert!(weights.bytes() > 0);
            Ok(())
        })?;
        println!(
            "reading bf16 as {}: {seconds:.3} s, {:.2} GB/s, {:.0} % of the copy's speed",
            dtype.as_str(),
            bytes / 1e9 / seconds,
            100.0 * copy / seconds
        );
    }
    Ok(())
}

/// A safetensors file of bf16 matrices.
fn write_checkpoint(path: &Path, megabytes: usize) -> Result<(), Box<dyn Error>> {
    let bytes = WIDTH * WIDTH * 2;
    let count = (megabytes << 20).div_ceil(bytes);
    let entry = |i: usize| {
        let offsets = [i * bytes, (i + 1) * bytes];
        format!(r#""blocks.{i}.weight":{{"dtype":"BF16","shape":[{WIDTH},{WIDTH}],"data_offsets":{offsets:?}}}"#)
    };
    let header = format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","));
    let mut file = std::io::BufWriter::new(fs::File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let matrix: Vec<u8> = (0..bytes).map(|i| if i % 2 == 0 { (i / 2 % 251) as u8 } else { 0x3d }).collect();
    for _ in 0..count {
        file.write_all(&matrix)?;
    }
    file.into_inner()?.sync_all()?;
    Ok(())
}

fn products() -> Result<(), Box<dyn Error>> {
    let dense = Tensor::randn(0f32, 0.02, (WIDTH, WIDTH), &Device::Cpu)?;
    for positions in POSITIONS {
        let x = Tensor::randn(0f32, 1.0, (positions, WIDTH), &Device::Cpu)?;
        let transposed = dense.t()?;
        let plain = least(3, || Ok(x.matmul(&transposed)?))?;
        println!("{positions} x {WIDTH} x {WIDTH}, dense f32: {:.1} ms", plain * 1e3);
        let own: HashMap<&str, GgmlDType> =
            [("q4_0", GgmlDType::Q4_0), ("q4_k", GgmlDType::Q4K), ("q8_0", GgmlDType::Q8_0)].into();
        for name in ["q4_0", "q4_k", "q8_0", "nf4", "int8", "fp8"] {
            let matrix = Quantized::quantize(&dense, Format::parse(name)?, false)?;
            let ours = least(3, || Ok(matrix.product(&x)?))?;
            let exact = x.matmul(&matrix.dequantize(DType::F32)?.t()?)?;
            let difference = |y: &Tensor| -> Result<f32, Box<dyn Error>> {
                Ok((y - &exact)?.abs()?.flatten_all()?.max(0)?.to_scalar()?)
            };
            let mut line = format!("  {name}: {:.1} ms (off by {:.1e})", ours * 1e3, difference(&matrix.product(&x)?)?);
            if let Some(dtype) = own.get(name) {
                let blocks = QMatMul::from_arc(Arc::new(QTensor::quantize(&dense, *dtype)?))?;
                let theirs = least(3, || Ok(blocks.forward(&x)?))?;
                line += &format!(
                    "; candle's own {:.1} ms (off by {:.1e})",
                    theirs * 1e3,
                    difference(&blocks.forward(&x)?)?
                );
            }
            println!("{line}");
        }
    }
    Ok(())
}
