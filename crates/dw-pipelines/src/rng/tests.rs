//! The generators against draws of torch itself (CPU) and of its published algorithm (CUDA).

use std::collections::HashMap;

use super::*;

type Fixtures = HashMap<String, Tensor>;

fn fixtures(file: &str) -> Fixtures {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/parity/rng/").to_owned() + file;
    candle_core::safetensors::load(path, &Device::Cpu).expect("the fixture is readable")
}

fn seed_of(name: &str) -> i128 {
    let digits = name.trim_start_matches("seed").split('.').next().expect("a name has parts");
    digits.parse().expect("a seed is a number")
}

/// Equal in every bit; f64 draws may differ in the last bits between C libraries.
fn assert_same(name: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!((found.dtype(), found.dims()), (expected.dtype(), expected.dims()), "{name}");
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F64).and_then(|t| t.flatten_all()?.to_vec1::<f64>());
    let (found, expected) = (wide(found).expect("f64 holds it"), wide(expected).expect("f64 holds it"));
    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
        let same = if name.contains(".f64.") { (a - b).abs() <= 1e-15 * b.abs() } else { a.to_bits() == b.to_bits() };
        assert!(same, "{name}[{i}]: {a} instead of {b}");
    }
}

#[test]
fn every_draw_has_the_bits_of_torch() {
    let mut checked = 0;
    for (name, expected) in &fixtures("cpu.safetensors") {
        let part: Vec<&str> = name.split('.').collect();
        let dtype = match part[1] {
            "f32" => DType::F32,
            "f64" => DType::F64,
            "f16" => DType::F16,
            "bf16" => DType::BF16,
            _ => continue,
        };
        let mut generator = Generator::new(seed_of(name), NoiseDialect::Cpu);
        assert_same(name, &generator.randn(expected.dims(), dtype, &Device::Cpu).expect("a draw"), expected);
        checked += 1;
    }
    assert!(checked > 100, "only {checked} draws in the fixture");
}

#[test]
fn consecutive_draws_continue_the_stream_and_the_cached_normal() {
    let fixtures = fixtures("cpu.safetensors");
    for seed in [0, 42, 4_294_967_301] {
        let mut generator = Generator::new(seed, NoiseDialect::Cpu);
        for i in 0.. {
            let prefix = format!("seed{seed}.sequence.{i}.");
            let Some((name, expected)) = fixtures.iter().find(|(name, _)| name.starts_with(&prefix)) else {
                assert!(i > 10, "the fixture holds the sequence");
                break;
            };
            assert_same(name, &generator.randn(expected.dims(), DType::F32, &Device::Cpu).expect("a draw"), expected);
        }
    }
}

#[test]
fn uniforms_between_normals_leave_the_cached_normal_alone() {
    let fixtures = fixtures("cpu.safetensors");
    for seed in [0_u64, 42, 4_294_967_301] {
        let mut engine = Mt19937::new(seed as u32);
        let expected = |name: &str| {
            let tensor = &fixtures[&format!("seed{seed}.mixed.{name}")];
            tensor.to_dtype(DType::F64).and_then(|t| t.to_vec1::<f64>()).expect("f64 holds it")
        };
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
        assert_eq!(wide(normal::single(&mut engine, 3)), expected("0.randn3"));
        assert_eq!(wide((0..5).map(|_| engine.uniform_f32()).collect()), expected("1.rand5"));
        assert_eq!(wide(normal::single(&mut engine, 2)), expected("2.randn2"));
        assert_eq!((0..6).map(|_| f64::from(engine.word() % 10)).collect::<Vec<_>>(), expected("3.randint10_n6"));
        assert_eq!(wide(normal::single(&mut engine, 19)), expected("4.randn19"));
    }
}

#[test]
fn words_and_uniforms_are_those_of_torch() {
    let fixtures = fixtures("cpu.safetensors");
    let words = fixtures["seed42.raw_u32.first1300"].to_vec1::<i64>().expect("integers");
    let mut engine = Mt19937::new(42);
    assert!(words.iter().all(|&word| i64::from(engine.word()) == word));
    let uniforms = fixtures["seed42.rand_f64.n40"].to_vec1::<f64>().expect("numbers");
    let mut engine = Mt19937::new(42);
    assert!(uniforms.iter().all(|&uniform| engine.uniform_f64() == uniform));
}

#[test]
fn only_the_low_32_bits_of_a_cpu_seed_count() {
    let draw = |seed: i128| {
        let tensor = Generator::new(seed, NoiseDialect::Cpu).randn(20, DType::F32, &Device::Cpu).expect("a draw");
        tensor.to_vec1::<f32>().expect("numbers")
    };
    assert_eq!(draw(5), draw((1 << 32) + 5));
    assert_eq!(draw(-1), draw(0xffff_ffff));
    assert_ne!(draw(5), draw(6));
}

#[test]
fn cuda_draws_agree_with_the_published_algorithm() {
    let mut checked = 0;
    for (name, expected) in &fixtures("cuda_philox.safetensors") {
        let expected = expected.to_vec1::<f32>().expect("numbers");
        let (multiprocessors, threads) = match name.rsplit('.').next() {
            Some("a100_108x2048") => (108, 2048),
            Some("rtx4090_128x1536") => (128, 1536),
            _ => (132, 2048),
        };
        let dialect = NoiseDialect::Cuda { multiprocessors, threads_per_multiprocessor: threads };
        let mut generator = Generator::new(seed_of(name), dialect);
        let mut draw = |count: usize| {
            let tensor = generator.randn(count, DType::F32, &Device::Cpu).expect("a draw");
            tensor.to_vec1::<f32>().expect("numbers")
        };
        let part = name.split('.').nth(1).expect("a name has parts");
        let found = match part {
            "second_draw_after1000" => {
                draw(1000);
                draw(100)
            }
            "n524288" if name.contains("then_n64") => {
                draw(524_288);
                draw(64)
            }
            "n524288" => draw(524_288).into_iter().step_by(64).collect(),
            "n65536" => draw(65_536).into_iter().step_by(16).collect(),
            _ => draw(expected.len()),
        };
        assert_eq!(found.len(), expected.len(), "{name}");
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 6e-7, "{name}: off by {worst}");
        checked += 1;
    }
    assert!(checked > 20, "only {checked} draws in the fixture");
}

#[test]
fn a_generator_for_each_picture_draws_each_picture_alone() {
    let seed = Seed::Each(vec![7, 8]);
    let mut both = Generators::from_seed(&seed, NoiseDialect::Cpu);
    let noise = both.randn(&[2, 4, 8, 8], DType::F32, &Device::Cpu).expect("a draw");
    let second = Generator::new(8, NoiseDialect::Cpu).randn((1, 4, 8, 8), DType::F32, &Device::Cpu).expect("a draw");
    assert_same("picture 2", &noise.narrow(0, 1, 1).expect("two pictures"), &second);
    let whole = Generators::from_seed(&Seed::One(7), NoiseDialect::Cpu)
        .randn(&[2, 4, 8, 8], DType::F32, &Device::Cpu)
        .expect("a draw");
    assert_eq!(whole.dims(), noise.dims());
}

#[test]
fn seeds_and_batch_that_do_not_match_are_named_in_the_error() {
    let mut generators = Generators::from_seed(&Seed::Each(vec![1, 2, 3]), NoiseDialect::Cpu);
    let error = generators.randn(&[2, 4], DType::F32, &Device::Cpu).expect_err("three seeds, two pictures");
    let text = error.to_string();
    assert!(text.contains("3 seeds") && text.contains("batch of 2"), "{text}");
}

#[test]
fn integer_noise_is_refused() {
    let error = Generator::new(0, NoiseDialect::Cpu).randn(4, DType::U8, &Device::Cpu).expect_err("no such noise");
    assert!(error.to_string().contains("`u8`"), "{error}");
}
