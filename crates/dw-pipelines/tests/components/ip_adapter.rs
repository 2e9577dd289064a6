//! Plus and full IP-Adapters (`tests/parity/make_variants.py` rebuilds the fixtures); plain ones are covered by
//! whole calls.

use candle_core::{DType, Device, Tensor};
use dw_pipelines::{
    models::{ImageFeatures, ImagePrompts, IpAdapter, Unet2DConditionModel, UnetConfig, UnetInput, config::OneOrMany},
    weights::Weights,
};

use crate::{Case, assert_close, component_at, fixtures, load};

fn adapter(config: &UnetConfig, name: &str) -> IpAdapter {
    let weights = load(&[fixtures().join("variants/ip-adapters").join(name)]).expect("the fixture is there");
    let adapter = IpAdapter::new(config, &weights).expect("the weights fit");
    assert!(weights.unused().is_empty(), "unused: {:?}", weights.unused());
    adapter
}

#[test]
fn two_adapters_with_several_pictures_each_agree_with_the_reference() {
    let folder = fixtures().join("variants/ip-adapters/unet");
    let case = Case::read(&folder.join("case.safetensors"));
    let (config, weights): (UnetConfig, _) = component_at(&folder);
    let unet = Unet2DConditionModel::new(&config, weights).expect("the weights fit");
    let features = case.get("features");
    let (batch, pictures, _, _) = features.dims4().expect("pictures of a batch");
    let flat = features.flatten(0, 1).expect("four dimensions");
    let mut prompts = ImagePrompts::default();
    for (name, scale) in [("plus.safetensors", 0.7), ("full.safetensors", 0.3)] {
        let adapter = adapter(&config, name);
        assert_eq!((adapter.features(), adapter.width()), (ImageFeatures::Penultimate, 10));
        let tokens = adapter.tokens(&flat).expect("the features fit");
        let (_, per_picture, width) = tokens.dims3().expect("tokens");
        let tokens = tokens.reshape((batch, pictures * per_picture, width)).expect("the same count");
        adapter.prompt(&tokens, &|_| scale, &mut prompts).expect("the tokens fit");
    }
    let (sample, text) = (case.get("sample"), case.get("text"));
    let input = UnetInput { image_prompts: Some(&prompts), ..UnetInput::new(&sample, 421.0, &text) };
    let with = unet.forward(&input).expect("the inputs fit");
    assert_close("prediction", &with, &case.get("out"));

    // Nothing seen is nothing changed, to the bit.
    let bits = |input: &UnetInput| unet.forward(input).and_then(|x| Ok(x.flatten_all()?.to_vec1::<f32>()?));
    let plain = UnetInput::new(&sample, 421.0, &text);
    let nothing = ImagePrompts::default();
    let empty = UnetInput { image_prompts: Some(&nothing), ..plain };
    assert_eq!(bits(&plain).expect("valid"), bits(&empty).expect("valid"));
    assert_ne!(bits(&plain).expect("valid"), bits(&input).expect("valid"));
}

#[test]
fn an_adapter_of_another_family_is_refused_with_the_way_out() {
    let folder = fixtures().join("variants/ip-adapters");
    let (mut config, _): (UnetConfig, _) = component_at(&folder.join("unet"));
    config.cross_attention_dim = OneOrMany::One(24);
    let weights = load(&[folder.join("plus.safetensors")]).expect("the fixture is there");
    let said = IpAdapter::new(&config, &weights).map(|_| ()).expect_err("another width").to_string();
    assert!(said.contains("does not fit this model") && said.contains("shape [4, 12]"), "{said}");
    // Adapters for Flux are told by XLabs' names, and under diffusers' names by the sizes of their layers.
    for (name, expected) in [
        ("double_blocks.1.processor.ip_adapter_double_stream_k_proj.weight", "no IP-Adapter for a UNet"),
        ("ip_adapter.1.to_k_ip.weight", "has shape [32, 64]"),
    ] {
        let layer = Tensor::zeros((32, 64), DType::F32, &Device::Cpu).expect("a tensor");
        let of_flux = Weights::from_tensors([(name.to_owned(), layer)].into(), "flux.safetensors");
        let said = IpAdapter::new(&config, &of_flux).map(|_| ()).expect_err("for Flux").to_string();
        assert!(said.contains("does not fit this model") && said.contains(expected), "{said}");
    }
    let no_adapter = load(&[folder.join("unet/diffusion_pytorch_model.safetensors")]).expect("a fixture");
    let said = IpAdapter::new(&config, &no_adapter).map(|_| ()).expect_err("a UNet").to_string();
    assert!(said.contains("no IP-Adapter"), "{said}");
}
