//! Compares the fast paths with candle's own operations on the shapes of diffusion models.
//!
//! `cargo run --release --example timings [SECONDS]` prints, for each operation, the least time of both in
//! milliseconds and their ratio. The two take turns, so that other load on the machine meets both.
//! `RAYON_NUM_THREADS` sets the number of threads.

use std::time::{Duration, Instant};

use candle_core::{Device, Module, Result, Tensor};
use candle_nn::{GroupNorm, ops::softmax_last_dim};

/// Least times of both after taking turns for a while.
fn compare(
    name: &str,
    budget: Duration,
    old: impl Fn() -> Result<Tensor>,
    new: impl Fn() -> Result<Tensor>,
) -> Result<()> {
    let timed = |f: &dyn Fn() -> Result<Tensor>| -> Result<Duration> {
        let start = Instant::now();
        std::hint::black_box(f()?);
        Ok(start.elapsed())
    };
    let (mut best_old, mut best_new) = (Duration::MAX, Duration::MAX);
    let (start, mut rounds) = (Instant::now(), 0);
    while rounds < 3 || start.elapsed() < budget {
        best_old = best_old.min(timed(&old)?);
        best_new = best_new.min(timed(&new)?);
        rounds += 1;
    }
    let (old, new) = (best_old.as_secs_f64() * 1e3, best_new.as_secs_f64() * 1e3);
    println!("{name:36} {old:10.2} {new:10.2} {:8.1}x  ({rounds} rounds)", old / new);
    Ok(())
}

fn random(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 1f32, shape, &Device::Cpu)
}

fn main() -> Result<()> {
    let seconds = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(2.0);
    let budget = Duration::from_secs_f64(seconds);
    println!("{:36} {:>10} {:>10} {:>9}", "operation", "candle ms", "here ms", "ratio");
    convolutions(budget)?;
    attentions(budget)?;
    let x = random(&[1, 320, 128, 128])?;
    let (weight, bias) = (random(&[320])?, random(&[320])?);
    let norm = GroupNorm::new(weight.clone(), bias.clone(), 320, 32, 1e-5)?;
    compare(
        "group norm + silu 320 x 128 x 128",
        budget,
        || norm.forward(&x)?.silu(),
        || dw_kernels::group_norm(&x, 32, &weight, &bias, 1e-5, true),
    )?;
    let x = random(&[5_242_880])?;
    compare("silu 5.2 M", budget, || x.silu(), || dw_kernels::silu(&x))?;
    compare("gelu (erf) 5.2 M", budget, || x.gelu_erf(), || dw_kernels::gelu_erf(&x))?;
    compare("gelu (tanh) 5.2 M", budget, || x.gelu(), || dw_kernels::gelu_tanh(&x))?;
    let x = random(&[10, 1024, 4096])?;
    compare("softmax 10 x 1024 x 4096", budget, || softmax_last_dim(&x), || dw_kernels::softmax(&x))
}

fn convolutions(budget: Duration) -> Result<()> {
    for (name, inputs, outputs, size, kernel, stride) in [
        ("conv 3x3 320 -> 320, 64 x 64", 320, 320, 64, 3, 1),
        ("conv 3x3 640 -> 640, 32 x 32", 640, 640, 32, 3, 1),
        ("conv 3x3 1280 -> 1280, 16 x 16", 1280, 1280, 16, 3, 1),
        ("conv 3x3 1280 -> 1280, 8 x 8", 1280, 1280, 8, 3, 1),
        ("conv 3x3 128 -> 128, 512 x 512", 128, 128, 512, 3, 1),
        ("conv 3x3 320 -> 320, 64 x 64, stride 2", 320, 320, 64, 3, 2),
        ("conv 1x1 320 -> 320, 64 x 64", 320, 320, 64, 1, 1),
        ("conv 3x3 4 -> 320, 64 x 64", 4, 320, 64, 3, 1),
        ("conv 3x3 128 -> 3, 512 x 512", 128, 3, 512, 3, 1),
    ] {
        let (x, padding) = (random(&[1, inputs, size, size])?, kernel / 2);
        let (weight, bias) = (random(&[outputs, inputs, kernel, kernel])?, random(&[outputs])?);
        let shaped = bias.reshape((1, outputs, 1, 1))?;
        compare(
            name,
            budget,
            || x.conv2d(&weight, padding, stride, 1, 1)?.broadcast_add(&shaped),
            || dw_kernels::conv2d(&x, &weight, Some(&bias), stride, padding),
        )?;
    }
    Ok(())
}

fn attentions(budget: Duration) -> Result<()> {
    for (name, heads, queries, keys, size) in [
        ("attention 10 heads, 4096 x 4096, 64", 10, 4096, 4096, 64),
        ("attention 20 heads, 1024 x 1024, 64", 20, 1024, 1024, 64),
        ("attention 8 heads, 4096 x 4096, 40", 8, 4096, 4096, 40),
        ("attention 10 heads, 4096 x 77, 64", 10, 4096, 77, 64),
        ("attention 1 head, 4096 x 4096, 512", 1, 4096, 4096, 512),
    ] {
        let q = random(&[1, heads, queries, size])?;
        let (k, v) = (random(&[1, heads, keys, size])?, random(&[1, heads, keys, size])?);
        let scale = 1.0 / (size as f64).sqrt();
        compare(
            name,
            budget,
            || softmax_last_dim(&(q.matmul(&k.t()?)? * scale)?)?.matmul(&v),
            || dw_kernels::attention(&q, &k, &v, scale),
        )?;
    }
    Ok(())
}
