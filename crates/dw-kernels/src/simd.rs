//! Loops over f32 numbers, compiled for several instruction sets and chosen when the program runs.
//!
//! The loops are written so that the compiler turns them into vector code: no branches, and sums in
//! [`LANES`] independent lanes whose order does not depend on the instruction set.

#![expect(clippy::inline_always, reason = "a loop body must be part of the function compiled for an instruction set")]

use std::sync::OnceLock;

/// How many partial sums a reduction keeps.
const LANES: usize = 32;

/// The instruction sets that loops are compiled for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

fn instructions() -> Instructions {
    static FOUND: OnceLock<Instructions> = OnceLock::new();
    *FOUND.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx512f") && has!("avx512vl") && has!("avx512dq") && has!("avx512bw") && has!("fma") {
                return Instructions::Avx512;
            }
            if has!("avx2") && has!("fma") {
                return Instructions::Avx2;
            }
        }
        Instructions::Portable
    })
}

/// Whether fused multiply-add is fast without asking the processor.
const PORTABLE_FMA: bool = cfg!(target_arch = "aarch64");

/// Defines a function once for every instruction set. `FMA` says inside the body whether fused
/// multiply-add is there.
macro_rules! vectorised {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $return:ty)? $body:block) => {
        $(#[$meta])*
        pub(crate) fn $name($($arg: $type),*) $(-> $return)? {
            #[inline(always)]
            fn body<const FMA: bool>($($arg: $type),*) $(-> $return)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,fma")]
            fn avx512($($arg: $type),*) $(-> $return)? {
                body::<true>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $type),*) $(-> $return)? {
                body::<true>($($arg),*)
            }

            match instructions() {
                // SAFETY: `instructions` found the features that the function needs.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                Instructions::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                Instructions::Avx2 => unsafe { avx2($($arg),*) },
                Instructions::Portable => body::<PORTABLE_FMA>($($arg),*),
            }
        }
    };
}

#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn polynomial<const FMA: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[0];
    for &coefficient in &coefficients[1..] {
        sum = fma::<FMA>(sum, x, coefficient);
    }
    sum
}

/// `e^x` to about 1e-7 of its size between -87 and 88, the values there outside. NaN stays NaN.
///
/// Powers of two by exponent bits, the rest by the polynomial of Cephes' `expf`.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    /// Adding it leaves the nearest whole number in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, MAGIC);
    let whole = shifted - MAGIC;
    let rest = fma::<FMA>(whole, -0.693359375, x);
    let rest = fma::<FMA>(whole, 2.12194440e-4, rest);
    let coefficients =
        [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1];
    let sum = polynomial::<FMA, 6>(rest, coefficients);
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    (fma::<FMA>(sum, rest * rest, rest) + 1.0) * power
}

/// The error function to about 1e-7. Polynomials fitted for least largest error: of `erf(x) / x` in x² up
/// to 1, of the logarithm of `1 - erf(x)` from there to 4.
#[inline(always)]
fn erf<const FMA: bool>(x: f32) -> f32 {
    let size = x.abs();
    let square = x * x;
    let small = [
        7.88912291e-5,
        -8.02084229e-4,
        5.18953545e-3,
        -2.68544447e-2,
        1.12836002e-1,
        -3.76126271e-1,
        std::f32::consts::FRAC_2_SQRT_PI,
    ];
    let near = x * polynomial::<FMA, 7>(square, small);
    let large =
        [-1.85573983e-4, 2.93960706e-3, -2.18053174e-2, 1.03037367e-1, 6.38225679e-1, 1.12704003, 3.53719760e-4];
    let bounded = if size > 4.0 { 4.0 } else { size };
    let far = (1.0 - exp::<FMA>(-polynomial::<FMA, 7>(bounded, large))).copysign(x);
    if size <= 1.0 { near } else { far }
}

/// Folds numbers in lanes: `$step` takes a lane's sum and a number. The rest that fills no row of lanes
/// goes into the first lanes.
macro_rules! lanes {
    ($numbers:expr, $start:expr, $step:expr, $join:expr) => {{
        let mut lanes = [$start; LANES];
        let (rows, rest) = $numbers.as_chunks::<LANES>();
        for row in rows {
            for i in 0..LANES {
                lanes[i] = $step(lanes[i], row[i]);
            }
        }
        for (lane, &number) in lanes.iter_mut().zip(rest) {
            *lane = $step(*lane, number);
        }
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] = $join(lanes[i], lanes[i + half]);
            }
            half /= 2;
        }
        lanes[0]
    }};
}

vectorised! {
    /// The largest number; minus infinity of none. A NaN may be passed over.
    fn max(numbers: &[f32]) -> f32 {
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        lanes!(numbers, f32::NEG_INFINITY, larger, larger)
    }
}

vectorised! {
    /// The sum of at most some thousand numbers.
    fn sum(numbers: &[f32]) -> f32 {
        let add = |a: f32, b: f32| a + b;
        lanes!(numbers, 0.0_f32, add, add)
    }
}

vectorised! {
    /// The sum of squared distances from `mean`, of at most some thousand numbers.
    fn sum_squares(numbers: &[f32], mean: f32) -> f32 {
        let square = |a: f32, b: f32| fma::<FMA>(b - mean, b - mean, a);
        lanes!(numbers, 0.0_f32, square, |a: f32, b: f32| a + b)
    }
}

vectorised! {
    /// Replaces each number by `e^(number - shift)` and returns the sum.
    fn exp_sum(numbers: &mut [f32], shift: f32) -> f32 {
        let mut lanes = [0.0_f32; LANES];
        let (rows, rest) = numbers.as_chunks_mut::<LANES>();
        for row in rows {
            for i in 0..LANES {
                row[i] = exp::<FMA>(row[i] - shift);
                lanes[i] += row[i];
            }
        }
        for (lane, number) in lanes.iter_mut().zip(rest) {
            *number = exp::<FMA>(*number - shift);
            *lane += *number;
        }
        let add = |a: f32, b: f32| a + b;
        lanes!(lanes, 0.0_f32, add, add)
    }
}

vectorised! {
    /// Multiplies each number by `factor`.
    fn scale(numbers: &mut [f32], factor: f32) {
        for number in numbers {
            *number *= factor;
        }
    }
}

vectorised! {
    /// `output = input * factor + offset`.
    fn scale_shift(output: &mut [f32], input: &[f32], factor: f32, offset: f32) {
        for (output, &input) in output.iter_mut().zip(input) {
            *output = fma::<FMA>(input, factor, offset);
        }
    }
}

vectorised! {
    /// `output = silu(input * factor + offset)`.
    fn scale_shift_silu(output: &mut [f32], input: &[f32], factor: f32, offset: f32) {
        for (output, &input) in output.iter_mut().zip(input) {
            let x = fma::<FMA>(input, factor, offset);
            *output = x / (1.0 + exp::<FMA>(-x));
        }
    }
}

vectorised! {
    /// `output = input * sigmoid(input)`.
    fn silu(output: &mut [f32], input: &[f32]) {
        for (output, &x) in output.iter_mut().zip(input) {
            *output = x / (1.0 + exp::<FMA>(-x));
        }
    }
}

vectorised! {
    /// `output = input * Φ(input)` with the normal distribution function Φ.
    fn gelu_erf(output: &mut [f32], input: &[f32]) {
        for (output, &x) in output.iter_mut().zip(input) {
            *output = 0.5 * x * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2));
        }
    }
}

vectorised! {
    /// Like [`gelu_erf`], with Φ approximated by a hyperbolic tangent.
    fn gelu_tanh(output: &mut [f32], input: &[f32]) {
        // 1/2 (1 + tanh(u)) is 1 / (1 + e^(-2u)).
        const SLOPE: f32 = 1.5957691216057308;
        for (output, &x) in output.iter_mut().zip(input) {
            let twice = SLOPE * fma::<FMA>(0.044715 * x * x, x, x);
            *output = x / (1.0 + exp::<FMA>(-twice));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sweep(from: f32, to: f32) -> Vec<f32> {
        (0..10_007).map(|i| from + (to - from) * i as f32 / 10_006.0).collect()
    }

    #[test]
    fn exp_is_right_to_a_few_roundings_with_and_without_fused_multiply_add() {
        for x in sweep(-86.9, 87.9) {
            let expected = f64::from(x).exp();
            for found in [exp::<true>(x), exp::<false>(x)] {
                assert!((f64::from(found) / expected - 1.0).abs() < 3e-7, "e^{x}: {found}");
            }
        }
        assert!(exp::<true>(f32::NAN).is_nan());
        assert!(exp::<true>(f32::NEG_INFINITY) < 1e-37 && exp::<true>(f32::INFINITY) > 1e38);
    }

    #[test]
    fn erf_is_right_to_a_few_roundings() {
        // Values of the error function from tables.
        for (x, expected) in [
            (0.0, 0.0),
            (0.1, 0.1124629160),
            (0.5, 0.5204998778),
            (1.0, 0.8427007929),
            (1.5, 0.9661051465),
            (3.0, 0.9999779095),
        ] {
            assert!((erf::<true>(x) - expected).abs() < 2e-7, "erf({x})");
            assert_eq!(erf::<false>(-x), -erf::<false>(x));
        }
        assert_eq!(erf::<true>(9.0), 1.0);
        assert!(erf::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_take_every_number_whatever_the_length() {
        for length in [0, 1, 31, 32, 33, 100, 1000] {
            let numbers: Vec<f32> = (0..length).map(|i| (i % 7) as f32 - 2.0).collect();
            let expected: f32 = numbers.iter().sum();
            assert_eq!(sum(&numbers), expected, "{length} numbers");
            let squares: f32 = numbers.iter().map(|x| (x - 0.5) * (x - 0.5)).sum();
            assert!((sum_squares(&numbers, 0.5) - squares).abs() <= 1e-5 * squares);
            assert_eq!(max(&numbers), numbers.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut exponentials = numbers.clone();
            let total = exp_sum(&mut exponentials, 4.0);
            let expected: f64 = numbers.iter().map(|&x| f64::from(x - 4.0).exp()).sum();
            assert!((f64::from(total) - expected).abs() <= 1e-6 * expected, "{length} numbers");
        }
    }
}
