//! What [`super::Weights`] promises about files, names and shapes.

use super::*;

/// The bytes of a safetensors file with this header and data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn read(bytes: &[u8]) -> Result<Weights> {
    Weights::from_bytes(bytes, "some/model.safetensors", DType::F32, &Device::Cpu, None, &mut |_| Ok(()))
}

fn message(result: Result<impl Sized>) -> String {
    result.err().expect("this must fail").to_string()
}

fn two_tensors() -> Weights {
    let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).expect("a small tensor");
    let tensors = [("a.weight", tensor(&[1.0, 2.0])), ("text_model.embeddings.position_ids", tensor(&[0.0]))];
    Weights::from_tensors(tensors.map(|(name, value)| (name.to_owned(), value)).into(), "here")
}

#[test]
fn half_precision_tensors_are_converted_and_counted() {
    let header = r#"{"x":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#;
    let mut seen = Vec::new();
    let bytes = file(header, &[0x00, 0x3c, 0x00, 0xc0]);
    let weights = Weights::from_bytes(&bytes, "m", DType::F32, &Device::Cpu, None, &mut |read| {
        seen.push(read);
        Ok(())
    })
    .expect("the file is valid");
    let values = weights.get(2, "x").and_then(|x| Ok(x.to_vec1::<f32>()?)).expect("x is there");
    assert_eq!(values, [1.0, -2.0]);
    assert_eq!(seen, [4]);
    assert_eq!(weights.bytes(), 8);
}

#[test]
fn a_header_that_lies_is_one_error_with_the_path() {
    let lies: [(&str, Vec<u8>); 6] = [
        ("no header", vec![1, 2, 3]),
        ("header longer than the file", file("{}", &[])[..9].to_vec()),
        ("huge header", [u64::MAX.to_le_bytes().to_vec(), b"{}".to_vec()].concat()),
        ("data past the end", file(r#"{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#, &[0; 4])),
        ("shape against offsets", file(r#"{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}"#, &[0; 4])),
        (
            "overflowing shape",
            file(r#"{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#, &[0; 4]),
        ),
    ];
    for (what, bytes) in lies {
        let message = message(read(&bytes));
        assert!(message.starts_with("`some/model.safetensors`: not a valid safetensors file"), "{what}: {message}");
    }
}

#[test]
fn a_git_lfs_pointer_is_recognised() {
    let message = message(read(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"));
    assert!(message.contains("git lfs pull"), "{message}");
}

#[test]
fn a_type_that_cannot_be_read_is_named() {
    let header = r#"{"x":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}"#;
    let message = message(read(&file(header, &[0])));
    assert!(message.contains("`x`") && message.contains("F8_E8M0"), "{message}");
}

#[test]
fn an_error_from_progress_ends_the_reading() {
    let header = r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let result = Weights::from_bytes(&file(header, &[0; 4]), "m", DType::F32, &Device::Cpu, None, &mut |_| {
        Err(Error::Unsupported("stop".to_owned()))
    });
    assert_eq!(message(result), "stop");
}

#[test]
fn a_missing_or_misshapen_tensor_is_named_with_its_file_and_shapes() {
    let weights = two_tensors();
    let missing = message(weights.pp("b").get((3, 4), "weight"));
    assert!(missing.contains("`here`") && missing.contains("`b.weight`") && missing.contains("[3, 4]"), "{missing}");
    let misshapen = message(weights.pp("a").get(3, "weight"));
    assert!(misshapen.contains("`a.weight`") && misshapen.contains("[2]") && misshapen.contains("[3]"), "{misshapen}");
}

#[test]
fn what_no_model_took_is_reported_except_harmless_leftovers() {
    let weights = two_tensors();
    assert_eq!(weights.unused(), ["a.weight"]);
    weights.pp("a").get(2, "weight").expect("it is there");
    assert!(weights.unused().is_empty());
}

#[test]
fn a_renamed_view_shares_the_account_and_hides_the_old_names() {
    let weights = two_tensors();
    let renamed = weights.clone().renamed(|name| name.strip_prefix("a.").map(|rest| format!("b.{rest}")));
    assert!(renamed.contains("b.weight") && !renamed.contains("a.weight"));
    renamed.get(2, "b.weight").expect("it is there");
    assert!(weights.unused().is_empty());
}

#[test]
fn a_conversion_keeps_names_and_shapes() {
    let half = two_tensors().to_dtype(DType::F16).expect("f32 converts to f16");
    assert_eq!(half.get(2, "a.weight").expect("it is there").dtype(), DType::F16);
    assert_eq!(half.bytes(), 6);
}

/// A safetensors file of these tensors: name, type, shape, bytes.
fn container(tensors: &[(&str, &str, &[usize], &[u8])]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        entries.push(format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":{offsets:?}}}"#));
        data.extend_from_slice(bytes);
    }
    file(&format!("{{{}}}", entries.join(",")), &data)
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn matrix(weights: &Weights, shape: (usize, usize)) -> Vec<f32> {
    let tensor = weights.pp("a").get(shape, "weight").and_then(|x| Ok(x.flatten_all()?.to_vec1::<f32>()?));
    tensor.expect("the matrix is there")
}

const NF4_STATE: &str = r#"{"quant_type": "nf4", "blocksize": 4, "dtype": "bfloat16", "shape": [2, 3]}"#;

#[test]
fn four_bit_codes_with_their_scales_are_one_matrix() {
    // Codes 15 0 7 15 | 7 0, the first of a byte in its upper half: 1, -1, 0, 1 times 2, then 0, -1 times 3.
    let state = NF4_STATE.as_bytes();
    let bytes = container(&[
        ("a.weight", "U8", &[3, 1], &[0xf0, 0x7f, 0x70]),
        ("a.weight.absmax", "F32", &[2], &floats(&[2.0, 3.0])),
        ("a.weight.quant_map", "F32", &[16], &floats(&crate::quant::FourBit::Nf4.values())),
        ("a.weight.quant_state.bitsandbytes__nf4", "U8", &[state.len()], state),
    ]);
    let weights = read(&bytes).expect("it can be read");
    assert_eq!(weights.pp("a").shape_of("weight").expect("a matrix").dims(), [2, 3]);
    assert_eq!(matrix(&weights, (2, 3)), [2.0, -2.0, 0.0, 2.0, 0.0, -3.0]);
    assert!(weights.unused().is_empty(), "scales count with their matrix: {:?}", weights.unused());
}

#[test]
fn scales_that_are_stored_in_eight_bits_are_read_back() {
    let state =
        r#"{"quant_type": "fp4", "blocksize": 4, "shape": [2, 3], "nested_blocksize": 1, "nested_offset": 0.5}"#;
    let map: Vec<f32> = (0..256).map(|i| i as f32 / 255.0).collect();
    // Codes 3 11 0 3 | 0 11: 1, -1, 0, 1 and 0, -1. Scales: 1 * 1.5 + 0.5 and 0 * 7 + 0.5.
    let bytes = container(&[
        ("a.weight", "U8", &[3, 1], &[0x3b, 0x03, 0x0b]),
        ("a.weight.absmax", "U8", &[2], &[255, 0]),
        ("a.weight.nested_absmax", "F32", &[2], &floats(&[1.5, 7.0])),
        ("a.weight.nested_quant_map", "F32", &[256], &floats(&map)),
        ("a.weight.quant_state.bitsandbytes__fp4", "U8", &[state.len()], state.as_bytes()),
    ]);
    assert_eq!(matrix(&read(&bytes).expect("it can be read"), (2, 3)), [2.0, -2.0, 0.0, 2.0, 0.0, -0.5]);
}

#[test]
fn eight_bit_codes_are_read_with_the_scales_of_every_dialect() {
    let codes = [127u8, 0x81, 0, 64, 1, 0xff];
    for (name, shape, scales, expected) in [
        ("a.SCB", vec![2], vec![127.0, 254.0], [127.0, -127.0, 0.0, 128.0, 2.0, -2.0]),
        ("a.weight_scale", vec![2, 1], vec![1.0, 2.0], [127.0, -127.0, 0.0, 128.0, 2.0, -2.0]),
        ("a.weight_scale", vec![], vec![2.0], [254.0, -254.0, 0.0, 128.0, 2.0, -2.0]),
    ] {
        let scales = floats(&scales);
        let bytes = container(&[("a.weight", "I8", &[2, 3], &codes), (name, "F32", &shape, &scales)]);
        assert_eq!(matrix(&read(&bytes).expect("it can be read"), (2, 3)), expected, "{name}");
    }
    // 1, -2, 448, 0.015625, 0, -0.001953125.
    let codes = [0x38u8, 0xc0, 0x7e, 0x08, 0x00, 0x81];
    let plain = [1.0, -2.0, 448.0, 0.015625, 0.0, -0.001953125];
    let bytes = container(&[("a.weight", "F8_E4M3", &[2, 3], &codes)]);
    assert_eq!(matrix(&read(&bytes).expect("it can be read"), (2, 3)), plain);
    let bytes = container(&[
        ("scaled_fp8", "F8_E4M3", &[0], &[]),
        ("a.weight", "F8_E4M3", &[2, 3], &codes),
        ("a.scale_weight", "F32", &[1], &floats(&[0.5])),
        ("a.scale_input", "F32", &[1], &floats(&[9.0])),
    ]);
    let weights = read(&bytes).expect("it can be read");
    assert_eq!(matrix(&weights, (2, 3)), plain.map(|x| x * 0.5));
    assert!(weights.unused().is_empty());
}

#[test]
fn weights_of_other_libraries_are_refused_by_their_name() {
    let codes = [0u8; 6];
    let scale = floats(&[1.0]);
    for (weight, kind, beside, library) in [
        ("a.weight", "F8_E4M3", "a.weight_scale_inv", "scales for blocks"),
        ("a.weight", "U8", "a.weight_scale_2", "NVFP4"),
        ("a._weight_qdata", "I8", "a._weight_scale", "TorchAO"),
        ("a.weight._data", "I8", "a.weight._scale", "Quanto"),
        ("a.weight", "I8", "a.scale", "SDNQ"),
        ("a.qweight", "U8", "a.scales", "GPTQ"),
    ] {
        let bytes = container(&[(weight, kind, &[2, 3], &codes), (beside, "F32", &[1], &scale)]);
        let message = message(read(&bytes));
        assert!(message.contains(library) && message.contains("cannot be read"), "{message}");
    }
    // A scale beside plain numbers is a norm's.
    let norm = container(&[("norm.weight", "F32", &[1], &scale), ("norm.scale", "F32", &[1], &scale)]);
    assert!(read(&norm).is_ok());
    let whole = read(&container(&[("a.weight", "U8", &[2, 3], &codes)])).expect("the file itself is sound");
    let message = whole.get((2, 3), "a.weight").expect_err("no values").to_string();
    assert!(message.contains("`a.weight` holds whole numbers"), "{message}");
}

#[test]
fn quantized_files_that_lie_are_refused_by_name() {
    let state = NF4_STATE.as_bytes();
    let absmax = floats(&[2.0, 3.0]);
    let cases: [(Vec<u8>, &str); 5] = [
        (
            container(&[("a.weight.quant_state.bitsandbytes__nf4", "U8", &[state.len()], state)]),
            "`a.weight`, which is missing",
        ),
        (
            container(&[
                ("a.weight", "U8", &[3, 1], &[0; 3]),
                ("a.weight.quant_state.bitsandbytes__nf4", "U8", &[state.len()], state),
            ]),
            "`absmax` is missing",
        ),
        (
            container(&[
                ("a.weight", "U8", &[2, 1], &[0; 2]),
                ("a.weight.absmax", "F32", &[2], &absmax),
                ("a.weight.quant_state.bitsandbytes__nf4", "U8", &[state.len()], state),
            ]),
            "do not make a [2, 3] matrix",
        ),
        (
            container(&[("a.weight", "U8", &[1], &[0]), ("a.weight.quant_state.bitsandbytes__nf4", "U8", &[2], b"{}")]),
            "does not say how",
        ),
        (
            container(&[("a.weight", "I8", &[2, 3], &[0; 6]), ("a.SCB", "F32", &[3], &floats(&[1.0; 3]))]),
            "has 3 scales",
        ),
    ];
    for (bytes, said) in cases {
        let message = message(read(&bytes));
        assert!(message.starts_with("`some/model.safetensors`") && message.contains(said), "{said}: {message}");
    }
}

#[test]
fn layers_are_quantized_while_they_are_read_and_tables_are_not() {
    let values: Vec<f32> = (0..256).map(|i| i as f32 / 256.0 - 0.5).collect();
    let bytes = container(&[
        ("a.weight", "F32", &[2, 128], &floats(&values)),
        ("token_embedding.weight", "F32", &[2, 128], &floats(&values)),
        ("a.bias", "F32", &[2], &floats(&[1.0, 2.0])),
    ]);
    let scheme = crate::quant::Scheme::plain(crate::quant::Format::Nf4);
    let weights = Weights::from_bytes(&bytes, "m", DType::F16, &Device::Cpu, Some(&scheme), &mut |_| Ok(()));
    let weights = weights.expect("it can be read");
    let format = |name: &str| weights.find_weight(name).expect("readable").and_then(|weight| weight.format());
    assert_eq!(format("a.weight"), scheme.format);
    assert_eq!((format("token_embedding.weight"), format("a.bias")), (None, None));
    assert_eq!(weights.get((2, 128), "a.weight").expect("dense on request").dtype(), DType::F16);
    let layer = weights.pp("a").linear(128, 2, true).expect("a layer");
    let x = Tensor::ones((3, 128), DType::F16, &Device::Cpu).expect("activations");
    assert_eq!(layer.forward(&x).expect("a product").dims(), [3, 2]);
}

#[test]
fn a_branch_beside_a_quantized_weight_is_the_change_of_the_dense_one() {
    let values: Vec<f32> = (0..256).map(|i| ((i * 37) % 101) as f32 / 101.0 - 0.5).collect();
    let bytes = container(&[("a.weight", "F32", &[4, 64], &floats(&values))]);
    let scheme = crate::quant::Scheme::plain(crate::quant::Format::Int8);
    let weights = Weights::from_bytes(&bytes, "m", DType::F32, &Device::Cpu, Some(&scheme), &mut |_| Ok(()));
    let weights = weights.expect("it can be read");
    let small = |shape: (usize, usize)| {
        let values = (0..shape.0 * shape.1).map(|i| (i % 7) as f32 / 7.0 - 0.4).collect::<Vec<_>>();
        Tensor::from_vec(values, shape, &Device::Cpu).expect("a matrix")
    };
    let x = small((3, 64));
    for branch in [Branch::LowRank { down: small((2, 64)), up: small((4, 2)) }, Branch::Full(small((4, 64)))] {
        let base = weights.get((4, 64), "a.weight").expect("dense");
        let merged = (base + branch.delta().expect("a change")).expect("same shape");
        let expected = x.matmul(&merged.t().expect("turned")).expect("a product");
        let branches = HashMap::from([("a.weight".to_owned(), vec![branch])]);
        let adapted = weights.clone().with_branches(&branches).expect("they fit");
        let layer = adapted.pp("a").linear(64, 4, false).expect("a layer");
        let found = layer.forward(&x).expect("a product");
        let difference = (found - expected).and_then(|d| d.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>());
        assert!(difference.expect("a number") < 1e-5);
        assert!(adapted.bytes() > weights.bytes());
    }
}

/// A GGUF file of these tensors: name, sizes with the fastest first, type number, bytes.
fn gguf_file(keys: &[(&str, &str)], tensors: &[(&str, &[u64], u32, &[u8])]) -> Vec<u8> {
    let text = |text: &str| [(text.len() as u64).to_le_bytes().as_slice(), text.as_bytes()].concat();
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        bytes.extend([text(key), 8u32.to_le_bytes().to_vec(), text(value)].concat());
    }
    let mut data: Vec<u8> = Vec::new();
    for (name, sizes, kind, content) in tensors {
        bytes.extend(text(name));
        bytes.extend((sizes.len() as u32).to_le_bytes());
        sizes.iter().for_each(|size| bytes.extend(size.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend((data.len() as u64).to_le_bytes());
        data.extend_from_slice(content);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend(data);
    bytes
}

/// A folder with one GGUF file, which mapping aligns.
fn read_gguf(test: &str, bytes: &[u8]) -> Result<Weights> {
    let path = std::env::temp_dir().join(format!("dw-gguf-{test}-{}.gguf", std::process::id()));
    fs_err::write(&path, bytes).expect("the temporary folder is writable");
    let read = Weights::load(std::slice::from_ref(&path), DType::F32, &Device::Cpu, &mut |_| Ok(()));
    fs_err::remove_file(&path).expect("it was written");
    read
}

#[test]
fn a_gguf_file_gives_blocks_and_dense_tensors_with_the_slowest_size_first() {
    // Two rows of one Q8_0 block each: scale 1 and 0.5, then 32 numbers.
    let row = |scale: [u8; 2], first: u8| [scale.to_vec(), (0..32).map(|i| first.wrapping_add(i)).collect()].concat();
    let blocks = [row([0x00, 0x3c], 1), row([0x00, 0x38], 0xf0)].concat();
    let bytes = gguf_file(
        &[("general.architecture", "flux")],
        &[("a.weight", &[32, 2], 8, &blocks), ("a.bias", &[2], 0, &floats(&[1.5, -1.0]))],
    );
    let weights = read_gguf("good", &bytes).expect("it can be read");
    let values = matrix(&weights, (2, 32));
    assert_eq!((values[0], values[31], values[32], values[63]), (1.0, 32.0, -8.0, 7.5));
    assert_eq!(weights.get(2, "a.bias").and_then(|x| Ok(x.to_vec1::<f32>()?)).expect("a bias"), [1.5, -1.0]);
}

#[test]
fn gguf_files_that_cannot_be_read_say_what_is_wrong() {
    let block = [0u8; 34];
    let good = gguf_file(&[], &[("a.weight", &[32, 1], 8, &block)]);
    let mut version = good.clone();
    version[4] = 9;
    let mut swapped = good.clone();
    swapped[4..8].reverse();
    let mut many = good.clone();
    many[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut overlapping = gguf_file(&[], &[("a", &[8], 0, &[0; 32]), ("b", &[8], 0, &[0; 32])]);
    // The place of the second tensor is the last number of the header, which fills up to a multiple of 32.
    let at = overlapping.windows(8).rposition(|bytes| bytes == 32u64.to_le_bytes()).expect("it is written");
    overlapping[at..at + 8].copy_from_slice(&0u64.to_le_bytes());
    let cases: [(&str, Vec<u8>, &str); 11] = [
        ("overlap", overlapping, "`a` and `b` overlap"),
        ("empty-blocks", gguf_file(&[], &[("a", &[33], 8, &block)]), "no whole number of blocks of `Q8_0`"),
        ("unknown-type", gguf_file(&[], &[("a.weight", &[32, 1], 20, &block)]), "`a.weight` is of the type `IQ4_NL`"),
        ("new-type", gguf_file(&[], &[("a.weight", &[32, 1], 77, &block)]), "`a.weight` is of the type number 77"),
        ("cut-data", good[..good.len() - 40].to_vec(), "takes 34 bytes"),
        ("cut-header", good[..40].to_vec(), "ends within its header"),
        ("version", version, "version 9"),
        ("swapped", swapped, "the other order"),
        ("many", many, "claims 18446744073709551615 tensors"),
        ("columns", gguf_file(&[], &[("a.weight", &[31, 1], 8, &block)]), "no whole number"),
        ("twice", gguf_file(&[], &[("a", &[1], 0, &[0; 4]), ("a", &[1], 0, &[0; 4])]), "tensor `a` twice"),
    ];
    for (test, bytes, said) in cases {
        let message = message(read_gguf(test, &bytes));
        assert!(message.contains(".gguf`") && message.contains(said), "{test}: {message}");
    }
}

#[test]
fn generated_weights_are_made_under_the_name_and_shape_that_are_asked_for() {
    let make = |name: &str, shape: &Shape| Ok(Tensor::full(name.len() as f32, shape, &Device::Cpu)?);
    let weights = Weights::generated(make, DType::BF16, &Device::Cpu);
    let made = weights.pp("block").get((2, 3), "weight").expect("everything is there");
    assert_eq!((made.dims(), made.dtype()), (&[2, 3][..], DType::BF16));
    let values = made.to_dtype(DType::F32).and_then(|made| made.flatten_all()?.to_vec1::<f32>());
    assert_eq!(values.expect("bf16 widens"), [12.0; 6]);
    assert!(!weights.contains("block.weight"));
    assert_eq!(weights.bytes(), 12);
}
