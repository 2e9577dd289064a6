//! What codes stand for: the 16 values of bitsandbytes' 4-bit types, the 256 of the 8-bit types, and the map with
//! which it stores the scales themselves in 8 bits.

/// Values of 4-bit normal floats: quantiles of the normal distribution, with 0 among them (bitsandbytes
/// `get_4bit_type`).
#[rustfmt::skip]
const NF4: [f32; 16] = [
    -1.0, -0.696_192_8, -0.525_073_05, -0.394_917_5, -0.284_441_38, -0.184_773_43, -0.091_050_036, 0.0,
    0.079_580_3, 0.160_930_2, 0.246_112_3, 0.337_915_24, 0.440_709_83, 0.562_617, 0.722_956_84, 1.0,
];

/// Values of 4-bit floating point (sign, 2 bits of exponent, 1 of mantissa), as bitsandbytes orders and scales them.
#[rustfmt::skip]
const FP4: [f32; 16] = [
    0.0, 0.0625 / 12.0, 8.0 / 12.0, 1.0, 4.0 / 12.0, 6.0 / 12.0, 2.0 / 12.0, 3.0 / 12.0,
    0.0, -0.0625 / 12.0, -8.0 / 12.0, -1.0, -4.0 / 12.0, -6.0 / 12.0, -2.0 / 12.0, -3.0 / 12.0,
];

/// The largest value of 8-bit floating point with 4 bits of exponent.
pub(super) const FLOAT8_MAX: f32 = 448.0;

/// How many values share a scale in bitsandbytes' 4-bit types.
pub(crate) const FOUR_BIT_BLOCK: usize = 64;

/// How many scales share a scale of their own when they are stored in 8 bits.
const SCALE_BLOCK: usize = 256;

/// A 4-bit type of bitsandbytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FourBit {
    Nf4,
    Fp4,
}

impl FourBit {
    /// What each code stands for, before scaling.
    pub(crate) fn values(self) -> [f32; 16] {
        match self {
            Self::Nf4 => NF4,
            Self::Fp4 => FP4,
        }
    }

    /// The code whose value is nearest to `x`, which lies between -1 and 1.
    pub(super) fn code(self, x: f32) -> u8 {
        nearest(&self.values(), x) as u8
    }
}

/// An 8-bit type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EightBit {
    /// Whole numbers from -128 to 127.
    Integer,
    /// Floating point, 4 bits of exponent, no infinity (`float8_e4m3fn`).
    E4m3,
    /// Floating point, 5 bits of exponent (`float8_e5m2`).
    E5m2,
}

/// What each byte of an 8-bit type stands for.
pub(crate) fn eight_bit_table(kind: EightBit) -> Vec<f32> {
    let value = |byte: u8| match kind {
        EightBit::Integer => f32::from(byte.cast_signed()),
        EightBit::E4m3 => float8(byte, 4, 3, 7),
        EightBit::E5m2 => float8(byte, 5, 2, 15),
    };
    (0..=u8::MAX).map(value).collect()
}

/// A number of 8 bits: sign, `exponent` bits with this `bias`, `mantissa` bits.
fn float8(byte: u8, exponent: u32, mantissa: u32, bias: i32) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (bits, fraction) = (i32::from((byte & 0x7f) >> mantissa), f32::from(byte & ((1 << mantissa) - 1)));
    let is_top = bits == (1 << exponent) - 1;
    let unit = 1.0 / (1 << mantissa) as f32;
    match (exponent, is_top) {
        (4, true) if byte & 0x7f == 0x7f => f32::NAN,
        (5, true) if fraction == 0.0 => sign * f32::INFINITY,
        (5, true) => f32::NAN,
        _ if bits == 0 => sign * fraction * unit * 2f32.powi(1 - bias),
        _ => sign * (1.0 + fraction * unit) * 2f32.powi(bits - bias),
    }
}

/// The byte of the `float8_e4m3fn` number nearest to `x`, ties to even; beyond the largest it is the largest.
pub(super) fn to_float8(x: f32, positive: &[f32]) -> u8 {
    let magnitude = x.abs().min(FLOAT8_MAX);
    let above = positive.partition_point(|value| *value < magnitude);
    let code = match above {
        0 => 0,
        above if above == positive.len() => above - 1,
        above => {
            let (low, high) = (magnitude - positive[above - 1], positive[above] - magnitude);
            if low < high || (low == high && above % 2 == 1) { above - 1 } else { above }
        }
    };
    code as u8 | if x.is_sign_negative() { 0x80 } else { 0 }
}

/// The numbers that bytes 0 to 0x7e of `float8_e4m3fn` stand for, which rise.
pub(super) fn positive_float8() -> Vec<f32> {
    (0..0x7f).map(|byte| float8(byte, 4, 3, 7)).collect()
}

/// The scales after they were stored in 8 bits and read back (bitsandbytes' "double quantization").
pub(super) fn through_eight_bits(scales: &[f32]) -> Vec<f32> {
    if scales.is_empty() {
        return Vec::new();
    }
    let offset = (scales.iter().map(|scale| f64::from(*scale)).sum::<f64>() / scales.len() as f64) as f32;
    let map = dynamic_map();
    let block = |block: &[f32]| {
        let centred: Vec<f32> = block.iter().map(|scale| scale - offset).collect();
        let largest = centred.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let inverse = if largest > 0.0 { 1.0 / largest } else { 0.0 };
        let stored = |x: f32| map[nearest(&map, x * inverse)] * largest + offset;
        centred.into_iter().map(stored).collect::<Vec<f32>>()
    };
    scales.chunks(SCALE_BLOCK).flat_map(block).collect()
}

/// The 256 values with which bitsandbytes stores scales: seven powers of ten, cut finer the larger they are
/// (`create_dynamic_map`), rising.
fn dynamic_map() -> Vec<f32> {
    let mut map = vec![0.0, 1.0];
    for exponent in 0..7u32 {
        let (pieces, power) = (1 << exponent, 10f64.powi(exponent as i32 - 6));
        for piece in 0..pieces {
            let middle = 0.1 + 0.9 * (f64::from(piece) + 0.5) / f64::from(pieces);
            map.extend([(power * middle) as f32, (-power * middle) as f32]);
        }
    }
    map.sort_by(f32::total_cmp);
    map
}

/// The place of the value nearest to `x`; the first of several.
fn nearest(values: &[f32], x: f32) -> usize {
    let mut best = (f32::INFINITY, 0);
    for (at, value) in values.iter().enumerate() {
        let distance = (value - x).abs();
        if distance < best.0 {
            best = (distance, at);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_floating_point_are_what_the_standard_says() {
        let e4m3 = eight_bit_table(EightBit::E4m3);
        for (byte, value) in
            [(0x00, 0.0), (0x01, 0.001953125), (0x08, 0.015625), (0x38, 1.0), (0x7e, 448.0), (0xb8, -1.0)]
        {
            assert_eq!(e4m3[byte], value, "{byte:#x}");
        }
        assert!(e4m3[0x7f].is_nan() && e4m3[0xff].is_nan());
        let e5m2 = eight_bit_table(EightBit::E5m2);
        for (byte, value) in [(0x01, 2f32.powi(-16)), (0x3c, 1.0), (0x7b, 57344.0), (0xfc, f32::NEG_INFINITY)] {
            assert_eq!(e5m2[byte], value, "{byte:#x}");
        }
        assert_eq!(eight_bit_table(EightBit::Integer)[0x80], -128.0);
    }

    #[test]
    fn every_float8_number_is_its_own_nearest_and_ties_go_to_even() {
        let positive = positive_float8();
        for byte in (0..0x7f).chain(0x80..0xff) {
            assert_eq!(to_float8(float8(byte, 4, 3, 7), &positive), byte);
        }
        // 17 lies between 16 (0x58) and 18 (0x59), 19 between 18 and 20 (0x5a).
        assert_eq!((to_float8(17.0, &positive), to_float8(19.0, &positive)), (0x58, 0x5a));
        assert_eq!(to_float8(1e9, &positive), 0x7e);
    }

    #[test]
    fn the_map_of_scales_has_256_rising_values() {
        let map = dynamic_map();
        assert_eq!((map.len(), map[255]), (256, 1.0));
        assert!(map.windows(2).all(|pair| pair[0] < pair[1]));
        // From the definition: the middle of the last of 64 pieces between 0.1 and 1.
        assert!((map[254] - 0.99296874).abs() < 1e-7 && (map[0] + 0.99296874).abs() < 1e-7);
    }
}
