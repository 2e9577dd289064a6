//! What the formats give back, against numbers from llama.cpp's own Python reader, and what all of them promise.

use candle_core::{DType, Device, Tensor, quantized::GgmlDType};
use half::f16;

use super::{ggml::Blocks, *};

/// Bytes that any program can make again: a linear congruential generator, its upper byte.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 7u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..count).map(|_| next()).collect()
}

/// A `(2, 256)` matrix of noise in blocks whose scales, at these offsets, are these.
fn noisy_blocks(dtype: GgmlDType, scales: &[(usize, f32)]) -> Quantized {
    let mut bytes = noise(512 / dtype.block_size() * dtype.type_size());
    for block in bytes.chunks_mut(dtype.type_size()) {
        for (offset, scale) in scales {
            block[*offset..offset + 2].copy_from_slice(&f16::from_f32(*scale).to_le_bytes());
        }
    }
    Blocks::from_bytes(dtype, (2, 256), &bytes, &Device::Cpu).expect("whole blocks").into()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|flat| flat.to_vec1()).expect("f32 values")
}

fn dense(matrix: &Quantized) -> Vec<f32> {
    values(&matrix.dequantize(DType::F32).expect("it can be dequantized"))
}

/// Numbers that look like weights, `(rows, columns)`.
fn weights(rows: usize, columns: usize) -> Tensor {
    let number = |i: usize| (((i * 7919) % 1009) as f32 / 504.0 - 1.0) * 0.05 + ((i % 13) as f32 - 6.0) * 0.004;
    let numbers: Vec<f32> = (0..rows * columns).map(number).collect();
    Tensor::from_vec(numbers, (rows, columns), &Device::Cpu).expect("a matrix")
}

fn largest_difference(left: &Tensor, right: &Tensor) -> f32 {
    let difference =
        (left.to_dtype(DType::F32).expect("f32") - right.to_dtype(DType::F32).expect("f32")).expect("same shape");
    values(&difference.abs().expect("absolute")).into_iter().fold(0.0, f32::max)
}

/// Each format with the largest error that weights between -0.08 and 0.08 may have in it.
const FORMATS: [(Format, f32); 15] = [
    (Format::Ggml(GgmlDType::Q2K), 0.03),
    (Format::Ggml(GgmlDType::Q3K), 0.02),
    (Format::Ggml(GgmlDType::Q4_0), 0.01),
    (Format::Ggml(GgmlDType::Q4_1), 0.006),
    (Format::Ggml(GgmlDType::Q4K), 0.008),
    (Format::Ggml(GgmlDType::Q5_0), 0.005),
    (Format::Ggml(GgmlDType::Q5_1), 0.003),
    (Format::Ggml(GgmlDType::Q5K), 0.004),
    (Format::Ggml(GgmlDType::Q6K), 0.003),
    (Format::Ggml(GgmlDType::Q8_0), 0.0004),
    (Format::Ggml(GgmlDType::Q8_1), 0.0004),
    (Format::Nf4, 0.0125),
    (Format::Fp4, 0.0135),
    (Format::Int8, 0.0004),
    (Format::Float8, 0.003),
];

#[test]
fn blocks_are_read_as_llama_cpp_reads_them() {
    // Values at 0, 37, 300 and 511, and the sum of all, each times its place modulo 7 plus 1.
    type Case<'a> = (GgmlDType, &'a [(usize, f32)], [f32; 4], f64);
    let cases: [Case<'_>; 10] = [
        (
            GgmlDType::Q4_0,
            &[(0, 0.031)],
            [0.1240234375, 0.093017578125, 0.031005859375, -0.093017578125],
            8.340576171875,
        ),
        (
            GgmlDType::Q4_1,
            &[(0, 0.031), (2, -0.27)],
            [0.10205078125, -0.14599609375, -0.177001953125, 0.1640625],
            -59.103759765625,
        ),
        (
            GgmlDType::Q5_0,
            &[(0, 0.031)],
            [-0.1240234375, -0.031005859375, -0.155029296875, -0.031005859375],
            11.22412109375,
        ),
        (
            GgmlDType::Q5_1,
            &[(0, 0.031), (2, -0.27)],
            [-0.239013671875, 0.133056640625, -0.14599609375, -0.2080078125],
            461.45361328125,
        ),
        (
            GgmlDType::Q8_0,
            &[(0, 0.0031)],
            [-0.30994415283203125, 0.247955322265625, 0.13637542724609375, -0.11157989501953125],
            27.1759033203125,
        ),
        (
            GgmlDType::Q2K,
            &[(80, 0.031), (82, 0.017)],
            [1.158233642578125, 0.591156005859375, -0.135986328125, 0.101043701171875],
            520.425048828125,
        ),
        (
            GgmlDType::Q3K,
            &[(108, 0.0031)],
            [-0.09918212890625, 0.20456314086914062, 0.1766681671142578, 0.05888938903808594],
            -12.128114700317383,
        ),
        (
            GgmlDType::Q4K,
            &[(0, 0.0031), (2, 0.0017)],
            [0.2314462661743164, 0.4854707717895508, 0.2689189910888672, 0.02137279510498047],
            1159.3055448532104,
        ),
        (
            GgmlDType::Q5K,
            &[(0, 0.0031), (2, 0.0017)],
            [0.6033792495727539, 2.410223960876465, 1.6397762298583984, 1.253335952758789],
            1816.652913093567,
        ),
        (
            GgmlDType::Q6K,
            &[(208, 0.00031)],
            [-0.1528024673461914, 0.3056049346923828, -0.08368492126464844, -0.19061565399169922],
            62.106919288635254,
        ),
    ];
    for (dtype, scales, expected, sum) in cases {
        let found = dense(&noisy_blocks(dtype, scales));
        for (at, expected) in [0, 37, 300, 511].into_iter().zip(expected) {
            assert!((found[at] - expected).abs() <= expected.abs() * 1e-6, "{dtype:?} at {at}: {}", found[at]);
        }
        let total: f64 = found.iter().enumerate().map(|(i, x)| f64::from(*x) * (i % 7 + 1) as f64).sum();
        assert!((total - sum).abs() < 1e-3, "{dtype:?}: {total}");
    }
}

#[test]
fn every_format_comes_back_within_its_error_and_takes_fewer_bytes() {
    let matrix = weights(6, 512);
    for (format, bound) in FORMATS {
        let stored = Quantized::quantize(&matrix, format, false).expect("it fits");
        assert_eq!((stored.format(), stored.shape()), (format, (6, 512)));
        let error = largest_difference(&stored.dequantize(DType::F32).expect("dense"), &matrix);
        assert!(error <= bound && error > 0.0, "{format}: {error}");
        assert!(stored.bytes() < 6 * 512 * 2, "{format}: {} bytes", stored.bytes());
    }
}

#[test]
fn a_product_is_the_product_with_the_dense_matrix_in_every_format_and_type() {
    let x = weights(5, 512).affine(20.0, 0.1).expect("activations");
    for (format, _) in FORMATS {
        let stored = Quantized::quantize(&weights(70, 512), format, false).expect("it fits");
        let expected =
            x.matmul(&stored.dequantize(DType::F32).and_then(|w| Ok(w.t()?)).expect("dense")).expect("a product");
        let found = stored.product(&x).expect("a product");
        assert!(largest_difference(&found, &expected) < 1e-5, "{format}");
        let half = stored.product(&x.to_dtype(DType::BF16).expect("bf16")).expect("a product");
        assert_eq!(half.dtype(), DType::BF16);
        assert!(largest_difference(&half, &expected) < 0.05, "{format}");
    }
}

#[test]
fn a_matrix_larger_than_one_piece_is_put_together_again() {
    let stored = Quantized::quantize(&weights(3000, 1024), Format::Nf4, false).expect("it fits");
    let x = weights(2, 1024);
    let expected =
        x.matmul(&stored.dequantize(DType::F32).and_then(|w| Ok(w.t()?)).expect("dense")).expect("a product");
    assert!(largest_difference(&stored.product(&x).expect("a product"), &expected) < 1e-6);
}

#[test]
fn rows_of_a_quantized_matrix_are_the_rows_of_the_dense_one_whatever_the_blocks() {
    // 4-bit groups run over the ends of rows when these have no multiple of 64 values, and pairs when it is odd.
    for (format, columns) in [
        (Format::Nf4, 77),
        (Format::Fp4, 130),
        (Format::Int8, 77),
        (Format::Float8, 33),
        (Format::Ggml(GgmlDType::Q4K), 256),
    ] {
        let stored = Quantized::quantize(&weights(9, columns), format, false).expect("it fits");
        let whole = stored.dequantize(DType::F32).expect("dense");
        let part = stored.rows(&(4..7)).expect("these rows exist");
        assert_eq!(part.shape(), (3, columns));
        let expected = whole.narrow(0, 4, 3).expect("rows");
        assert_eq!(largest_difference(&part.dequantize(DType::F32).expect("dense"), &expected), 0.0, "{format}");
        let inner = part.rows(&(1..2)).expect("rows of rows").dequantize(DType::F32).expect("dense");
        assert_eq!(largest_difference(&inner, &whole.narrow(0, 5, 1).expect("a row")), 0.0, "{format}");
        assert!(stored.rows(&(8..10)).is_err());
    }
}

#[test]
fn codes_on_a_device_are_dequantized_as_on_the_host() {
    for (format, columns) in [(Format::Nf4, 77), (Format::Int8, 77), (Format::Float8, 33)] {
        let stored = Quantized::quantize(&weights(9, columns), format, false).expect("it fits");
        for rows in [0..9, 3..8] {
            let part = stored.rows(&rows).expect("rows");
            let coded = part.coded().expect("codes");
            let by_look_up = coded.dequantize().expect("candle's operations");
            assert_eq!(values(&by_look_up), dense(&part), "{format} {rows:?}");
        }
    }
}

#[test]
fn blocks_of_one_type_are_joined_and_others_are_not() {
    let stored = |format: Format, from: usize| {
        let rows = weights(8, 64).narrow(0, from, 4).expect("rows");
        Quantized::quantize(&rows, format, false).expect("it fits")
    };
    let q8 = Format::Ggml(GgmlDType::Q8_0);
    let joined = Quantized::joined(&[stored(q8, 4), stored(q8, 0)]).expect("readable").expect("of one type");
    let expected = [dense(&stored(q8, 4)), dense(&stored(q8, 0))].concat();
    assert_eq!(dense(&joined), expected);
    assert!(Quantized::joined(&[stored(q8, 4), stored(Format::Nf4, 0)]).expect("readable").is_none());
    let mixed = Weight::joined(&[Weight::Quantized(stored(q8, 4)), Weight::Quantized(stored(Format::Nf4, 0))]);
    assert_eq!(mixed.expect("dense then").format(), None);
}

#[test]
fn blocks_that_do_not_fit_give_way_to_smaller_ones_and_then_to_none() {
    let format = |name: &str| Format::parse(name).expect("a name");
    for (asked, columns, found) in [
        ("q4_k", 512, Some("q4_k")),
        ("q4_k", 96, Some("q5_0")),
        ("q6_k", 96, Some("q8_0")),
        ("q2_k", 96, Some("q4_0")),
        ("q8_0", 77, None),
        ("q5_k", 77, None),
        ("nf4", 77, Some("nf4")),
    ] {
        assert_eq!(format(asked).fitting(columns), found.map(format), "{asked} {columns}");
    }
    let message = Format::parse("q9").expect_err("no such format").to_string();
    assert!(message.contains("`q9`") && message.contains("`q4_k`") && message.contains("`nf4`"), "{message}");
}

#[test]
fn a_scheme_quantizes_layers_and_leaves_what_does_not_fit() {
    let scheme = Scheme::plain(Format::Ggml(GgmlDType::Q4K));
    let format = |name: &str, tensor: Tensor| scheme.apply(name, Weight::Dense(tensor)).expect("it applies").format();
    assert_eq!(format("a.weight", weights(4, 256)), scheme.format);
    assert_eq!(format("a.weight", weights(4, 32)), Some(Format::Ggml(GgmlDType::Q5_0)));
    assert_eq!(format("a.weight", weights(4, 31)), None);
    assert_eq!(format("a.bias", weights(4, 256)), None);
}

#[test]
fn eight_bit_integers_are_those_of_bitsandbytes() {
    // Codes of `int8_vectorwise_quant`. As float16 the third and the fourth lie in the middle of two codes, of which
    // the even one is taken; in f32 they lie nearer to 17 and 27.
    let row = [1.0f32, -0.5, 0.129_931_26, 0.216_525_44, -0.8, 0.0];
    let matrix = Tensor::from_vec(row.to_vec(), (1, 6), &Device::Cpu).expect("a matrix");
    let stored = Quantized::quantize(&matrix, Format::Int8, false).expect("it fits");
    let (codes, scales, _) = stored.coded().expect("codes").parts().expect("readable");
    let codes: Vec<i8> = codes.into_iter().map(u8::cast_signed).collect();
    assert_eq!((codes, scales), (vec![127, -64, 16, 28, -102, 0], vec![1.0 / 127.0]));
}

#[test]
fn scales_in_eight_bits_cost_little() {
    let matrix = weights(32, 512);
    let error = |double: bool| {
        let stored = Quantized::quantize(&matrix, Format::Nf4, double).expect("it fits");
        largest_difference(&stored.dequantize(DType::F32).expect("dense"), &matrix)
    };
    assert!(error(true) != error(false) && error(true) < error(false) + 0.001, "{} {}", error(true), error(false));
}

#[test]
fn parts_that_do_not_make_a_matrix_are_refused() {
    assert!(Blocks::from_bytes(GgmlDType::Q4_0, (1, 64), &[0; 35], &Device::Cpu).is_err());
    assert!(Coded::four_bit((2, 64), FourBit::Nf4, &FourBit::Nf4.values(), vec![0; 64], (vec![1.0], 64)).is_err());
    assert!(Coded::eight_bit((2, 3), EightBit::Integer, vec![0; 6], vec![1.0; 3]).is_err());
}
