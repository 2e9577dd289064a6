//! Normal numbers as torch's CPU kernels make them (aten `DistributionTemplates.h` and, for AVX2, the
//! polynomials of `avx_mathfun.h`), with the order of roundings that gives torch's exact bits.
//!
//! Fewer than 16 elements go one by one through the double-precision path; more go through Box-Muller in
//! blocks of 16. What happens to a last block that is not full depends on the type.

use super::mt19937::Mt19937;

const BLOCK: usize = 16;

/// `torch.randn` of `count` f32.
pub(super) fn single(engine: &mut Mt19937, count: usize) -> Vec<f32> {
    if count < BLOCK {
        return (0..count).map(|_| engine.normal_f64() as f32).collect();
    }
    let mut values: Vec<f32> = (0..count).map(|_| engine.uniform_f32()).collect();
    values.as_chunks_mut::<BLOCK>().0.iter_mut().for_each(box_muller);
    if !count.is_multiple_of(BLOCK) {
        // The last 16 elements are drawn anew, over the tail of the block before.
        values[count - BLOCK..].copy_from_slice(&drawn_block(engine));
    }
    values
}

/// `torch.randn` of `count` f16 or bf16 elements, not rounded yet. Unlike [`single`], the uniforms of a
/// tail that is not full are never drawn.
pub(super) fn half(engine: &mut Mt19937, count: usize) -> Vec<f32> {
    if count < BLOCK {
        return (0..count).map(|_| engine.normal_f64() as f32).collect();
    }
    let mut values = vec![0.0; count];
    for block in values.as_chunks_mut::<BLOCK>().0 {
        *block = drawn_block(engine);
    }
    if !count.is_multiple_of(BLOCK) {
        values[count - BLOCK..].copy_from_slice(&drawn_block(engine));
    }
    values
}

/// `torch.randn` of `count` f64.
pub(super) fn double(engine: &mut Mt19937, count: usize) -> Vec<f64> {
    if count < BLOCK {
        return (0..count).map(|_| engine.normal_f64()).collect();
    }
    let mut values: Vec<f64> = (0..count).map(|_| engine.uniform_f64()).collect();
    values.as_chunks_mut::<BLOCK>().0.iter_mut().for_each(box_muller_f64);
    if !count.is_multiple_of(BLOCK) {
        let mut block = std::array::from_fn(|_| engine.uniform_f64());
        box_muller_f64(&mut block);
        values[count - BLOCK..].copy_from_slice(&block);
    }
    values
}

fn drawn_block(engine: &mut Mt19937) -> [f32; BLOCK] {
    let mut block = std::array::from_fn(|_| engine.uniform_f32());
    box_muller(&mut block);
    block
}

/// Turns 16 uniforms into 16 normals: the first 8 give the radii, the last 8 the angles.
fn box_muller(block: &mut [f32; BLOCK]) {
    for i in 0..BLOCK / 2 {
        let radius = (-2.0 * ln(1.0 - block[i])).sqrt();
        let (sin, cos) = sin_cos(std::f32::consts::TAU * block[i + BLOCK / 2]);
        block[i] = radius * cos;
        block[i + BLOCK / 2] = radius * sin;
    }
}

fn box_muller_f64(block: &mut [f64; BLOCK]) {
    for i in 0..BLOCK / 2 {
        let radius = (-2.0 * (1.0 - block[i]).ln()).sqrt();
        let angle = std::f64::consts::TAU * block[i + BLOCK / 2];
        block[i] = radius * angle.cos();
        block[i + BLOCK / 2] = radius * angle.sin();
    }
}

/// Cephes `logf` in the order of operations of `log256_ps`, with the fused multiply-adds a compiler makes
/// of it. `x` is positive and normal.
fn ln(x: f32) -> f32 {
    const COEFFICIENTS: [f32; 9] = [
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ];
    let bits = x.max(f32::MIN_POSITIVE).to_bits();
    let mantissa = f32::from_bits((bits & !0x7f80_0000) | 0.5_f32.to_bits());
    let mut exponent = ((bits >> 23) as i32 - 126) as f32;
    let mut x = mantissa - 1.0;
    if mantissa < std::f32::consts::FRAC_1_SQRT_2 {
        exponent -= 1.0;
        x += mantissa;
    }
    let square = x * x;
    let polynomial = COEFFICIENTS[1..].iter().fold(COEFFICIENTS[0], |sum, &c| sum.mul_add(x, c)) * x;
    let tail = polynomial.mul_add(square, exponent * -2.12194440e-4);
    let tail = (-square).mul_add(0.5, tail);
    exponent.mul_add(0.693359375, x + tail)
}

/// Cephes `sinf` and `cosf` in the order of operations of `sincos256_ps`. `x` is not negative.
fn sin_cos(x: f32) -> (f32, f32) {
    let octant = ((x * 1.27323954473516) as i32 + 1) & !1;
    let turns = octant as f32;
    let x = turns.mul_add(-0.78515625, x);
    let x = turns.mul_add(-2.4187564849853515625e-4, x);
    let x = turns.mul_add(-3.77489497744594108e-8, x);
    let z = x * x;
    let c = 2.443315711809948e-5_f32.mul_add(z, -1.388731625493765e-3).mul_add(z, 4.166664568298827e-2);
    let c = (c * z).mul_add(z, -(z * 0.5)) + 1.0;
    let s = (-1.9515295891e-4_f32).mul_add(z, 8.3321608736e-3).mul_add(z, -1.6666654611e-1);
    let s = (s * z).mul_add(x, x);
    let (sin, cos) = if octant & 2 == 0 { (s, c) } else { (c, s) };
    let negative_sin = octant & 4 != 0;
    let negative_cos = !(octant - 2) & 4 != 0;
    (if negative_sin { -sin } else { sin }, if negative_cos { -cos } else { cos })
}
