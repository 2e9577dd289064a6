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
    Weights::from_bytes(bytes, "some/model.safetensors", DType::F32, &Device::Cpu, &mut |_| Ok(()))
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
    let weights = Weights::from_bytes(&bytes, "m", DType::F32, &Device::Cpu, &mut |read| {
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
    let header = r#"{"x":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}"#;
    let message = message(read(&file(header, &[0])));
    assert!(message.contains("`x`") && message.contains("F8_E4M3"), "{message}");
}

#[test]
fn an_error_from_progress_ends_the_reading() {
    let header = r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let result = Weights::from_bytes(&file(header, &[0; 4]), "m", DType::F32, &Device::Cpu, &mut |_| {
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
