//! What a step's `configuration` says about memory, as the pipelines take it.

use std::collections::BTreeMap;

use dw_core::workflow::{ComponentPlacement, GroupOffload, Offload, PipelineConfiguration, Residency, Tiling};
use dw_pipelines::{
    Error, Result,
    device::pick,
    request::{CallSize, ComponentMemory, MemoryRequest, Offload as OffloadRequest, Paging, TilingRequest},
};
use serde_json::{Map, Value};

use crate::pipelines::dtype;

/// Blocks that come one by one while the one before computes.
const STREAMED: Paging = Paging::Groups { blocks: 1, prefetch: true };
/// What a `components_manager` leaves free where it does not say.
const DEFAULT_MARGIN: &str = "3GB";

/// What a step with these arguments says about memory. `ignores_fit` is the caller's wish to try what does not seem to
/// fit.
pub(crate) fn request(
    configuration: &PipelineConfiguration,
    arguments: &Map<String, Value>,
    ignores_fit: bool,
) -> Result<MemoryRequest> {
    let vae = configuration.vae.as_ref();
    let is_on = |flag: Option<bool>| flag.unwrap_or(false);
    let mut vae_tiling = vae.is_some_and(|vae| is_on(vae.enable_tiling)).then(TilingRequest::default);
    let mut components = BTreeMap::new();
    for (name, placement) in configuration.components.iter().flatten() {
        let entry: &mut ComponentMemory = components.entry(name.clone()).or_default();
        entry.paging = component_paging(name, placement)?;
        entry.device = placement.device.as_deref().map(|device| pick(Some(device))).transpose()?;
        if let Some(tiling) = tiling(name, placement)? {
            vae_tiling = Some(tiling);
        }
    }
    let types = [
        ("vae", vae.and_then(|vae| vae.torch_dtype.as_deref())),
        ("unet", configuration.unet.as_ref().and_then(|unet| unet.torch_dtype.as_deref())),
        ("transformer", configuration.transformer.as_ref().and_then(|module| module.torch_dtype.as_deref())),
        ("text_encoder", configuration.text_encoder.as_ref().and_then(|encoder| encoder.torch_dtype.as_deref())),
    ];
    for (name, text) in types {
        if let Some(text) = text {
            components.entry(name.to_owned()).or_default().dtype = dtype(text)?;
        }
    }
    let modules = [&configuration.unet, &configuration.transformer];
    let chunks = modules.into_iter().flatten().any(|module| is_on(module.enable_forward_chunking));
    let manager = configuration.components_manager.as_ref().filter(|manager| is_on(manager.enable_auto_cpu_offload));
    let margin = manager.map(|manager| manager.memory_reserve_margin.as_deref().unwrap_or(DEFAULT_MARGIN));
    Ok(MemoryRequest {
        offload: offload(configuration)?.or(manager.map(|_| OffloadRequest::Auto)),
        resident: configuration.exclude_from_cpu_offload.clone().unwrap_or_default(),
        components,
        vae_tiling,
        slices_attention: is_on(configuration.enable_attention_slicing)
            && !is_on(configuration.disable_attention_slicing),
        chunks_feed_forward: chunks,
        reserve: margin.map_or(Ok(0), bytes)?,
        ignores_fit,
        call: call(arguments),
    })
}

fn offload(configuration: &PipelineConfiguration) -> Result<Option<OffloadRequest>> {
    let paged = |paging| Some(OffloadRequest::Paged(paging));
    let grouped = configuration.group_offload.as_ref().map(|group| grouped("group_offload", group)).transpose()?;
    Ok(match configuration.offload {
        Some(Offload::Auto) => Some(OffloadRequest::Auto),
        Some(Offload::Model) => paged(Paging::Whole),
        Some(Offload::Sequential) => paged(Paging::Layers),
        Some(Offload::Group) => paged(grouped.unwrap_or(STREAMED)),
        None => grouped.and_then(paged),
    })
}

/// The groups that a `group_offload` at `place` describes. Streams of diffusers are a second thread here.
fn grouped(place: &str, group: &GroupOffload) -> Result<Paging> {
    let bad = |reason: String| Error::Argument { name: place.to_owned(), reason };
    let count = |value: &Value| {
        value
            .as_u64()
            .filter(|count| *count > 0)
            .ok_or_else(|| bad(format!("`num_blocks_per_group` must be a whole number of at least 1, found `{value}`")))
    };
    if let Some(device) =
        group.offload_device.as_deref().filter(|device| !matches!(*device, "cpu" | "torch.device(cpu)"))
    {
        return Err(bad(format!("`offload_device` `{device}` is not supported; layers rest on the host (`cpu`)")));
    }
    let prefetch = group.rest.get("use_stream").and_then(Value::as_bool).unwrap_or(false);
    let blocks = group.rest.get("num_blocks_per_group").filter(|value| !value.is_null()).map(count).transpose()?;
    match group.offload_type.as_str() {
        "leaf_level" => Ok(Paging::Groups { blocks: 0, prefetch }),
        "block_level" => Ok(Paging::Groups { blocks: blocks.unwrap_or(1) as usize, prefetch }),
        other => Err(bad(format!("there is no `offload_type` `{other}`; use `block_level` or `leaf_level`"))),
    }
}

fn component_paging(name: &str, placement: &ComponentPlacement) -> Result<Option<Paging>> {
    let is_on_demand = placement.residency == Some(Residency::OnDemand);
    match &placement.group_offload {
        Some(_) if is_on_demand => Err(Error::Argument {
            name: format!("configuration.components.{name}"),
            reason: "has both `group_offload` and `residency: on_demand`; pick one".into(),
        }),
        Some(group) => grouped(&format!("configuration.components.{name}.group_offload"), group).map(Some),
        None => Ok(is_on_demand.then_some(Paging::Whole)),
    }
}

/// Tiles that the placement of a component asks for.
fn tiling(name: &str, placement: &ComponentPlacement) -> Result<Option<TilingRequest>> {
    let bad = |reason: String| {
        Err(Error::Argument { name: format!("configuration.components.{name}.enable_tiling"), reason })
    };
    let settings = match &placement.enable_tiling {
        None | Some(Tiling::Switch(false)) => return Ok(None),
        Some(Tiling::Switch(true)) => &Map::new(),
        Some(Tiling::Settings(settings)) => settings,
    };
    if name != "vae" {
        return bad(format!("`{name}` does not support tiling; `vae` does"));
    }
    let mut tiling = TilingRequest::default();
    for (key, value) in settings {
        match (key.as_str(), value.as_u64(), value.as_f64()) {
            ("tile_sample_min_size", Some(size), _) => tiling.sample = Some(size as usize),
            ("tile_overlap_factor", _, Some(overlap)) => tiling.overlap = Some(overlap),
            ("tile_sample_min_size" | "tile_overlap_factor", ..) => {
                return bad(format!("`{key}` must be a number, found `{value}`"));
            }
            _ => {
                return bad(format!(
                    "there is no setting `{key}`; use `tile_sample_min_size` (pixels) and `tile_overlap_factor`"
                ));
            }
        }
    }
    Ok(Some(tiling))
}

/// Bytes that text like `3GB` or `500MB` means.
fn bytes(text: &str) -> Result<u64> {
    let trimmed = text.trim();
    let split = trimmed.find(|letter: char| letter.is_ascii_alphabetic()).unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let factor = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => Some(1.0),
        "KB" | "KIB" => Some(1024.0),
        "MB" | "MIB" => Some(1024.0 * 1024.0),
        "GB" | "GIB" => Some(1024.0 * 1024.0 * 1024.0),
        _ => None,
    };
    let number = number.trim().parse::<f64>().ok().filter(|number| *number >= 0.0);
    number.zip(factor).map(|(number, factor)| (number * factor) as u64).ok_or_else(|| Error::Argument {
        name: "components_manager.memory_reserve_margin".into(),
        reason: format!("must be a size like `3GB`, found `{text}`"),
    })
}

/// What the arguments of a step say about the size of a call; what comes from earlier results is not known yet.
fn call(arguments: &Map<String, Value>) -> CallSize {
    let whole = |name: &str| {
        let value = arguments.get(name)?;
        let number = value.as_u64().or_else(|| value.as_str()?.trim().parse().ok());
        number.map(|number| number as usize)
    };
    let prompts = arguments.get("prompt").and_then(Value::as_array).map_or(1, Vec::len);
    let guidance = arguments.get("guidance_scale").and_then(Value::as_f64);
    CallSize {
        height: whole("height"),
        width: whole("width"),
        pictures: prompts * whole("num_images_per_prompt").unwrap_or(1),
        is_guided: guidance.is_none_or(|scale| scale > 1.0),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use serde_json::json;

    use super::*;

    fn configuration(mut value: Value) -> PipelineConfiguration {
        value["component_type"] = json!("StableDiffusionPipeline");
        serde_json::from_value(value).expect("the keys are known")
    }

    fn read(value: Value) -> Result<MemoryRequest> {
        request(&configuration(value), &Map::new(), false)
    }

    fn offload_of(value: Value) -> Option<OffloadRequest> {
        read(value).expect("a valid configuration").offload
    }

    #[test]
    fn every_way_to_offload_is_understood() {
        let paged = |paging| Some(OffloadRequest::Paged(paging));
        let groups = |blocks, prefetch| paged(Paging::Groups { blocks, prefetch });
        assert_eq!(offload_of(json!({})), None);
        assert_eq!(offload_of(json!({"offload": "model"})), paged(Paging::Whole));
        assert_eq!(offload_of(json!({"offload": "sequential"})), paged(Paging::Layers));
        assert_eq!(offload_of(json!({"offload": "auto"})), Some(OffloadRequest::Auto));
        assert_eq!(offload_of(json!({"offload": "group"})), groups(1, true));
        let group = json!({"offload_type": "block_level", "num_blocks_per_group": 4, "use_stream": true});
        assert_eq!(offload_of(json!({"group_offload": group})), groups(4, true));
        assert_eq!(offload_of(json!({"group_offload": {"offload_type": "leaf_level"}})), groups(0, false));
        let manager = json!({"enable_auto_cpu_offload": true, "memory_reserve_margin": "1.5GB"});
        let memory = read(json!({"components_manager": manager})).expect("a valid configuration");
        assert_eq!((memory.offload, memory.reserve), (Some(OffloadRequest::Auto), 3 << 29));
    }

    #[test]
    fn single_components_have_settings_of_their_own() {
        let memory = read(json!({
            "offload": "sequential",
            "exclude_from_cpu_offload": ["vae"],
            "components": {
                "text_encoder": {"residency": "on_demand"},
                "vae": {"enable_tiling": {"tile_sample_min_size": 256}, "device": "cpu"},
            },
            "vae": {"torch_dtype": "torch.float32"},
        }));
        let memory = memory.expect("a valid configuration");
        assert_eq!(memory.resident, ["vae"]);
        assert_eq!(memory.components["text_encoder"].paging, Some(Paging::Whole));
        assert!(memory.components["vae"].device.as_ref().is_some_and(Device::is_cpu));
        assert_eq!(memory.components["vae"].dtype, Some(DType::F32));
        assert_eq!(memory.vae_tiling, Some(TilingRequest { sample: Some(256), overlap: None }));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_place() {
        let message = |value| read(value).expect_err("it makes no sense").to_string();
        let both = json!({"group_offload": {"offload_type": "leaf_level"}, "residency": "on_demand"});
        assert!(message(json!({"components": {"unet": both}})).contains("pick one"));
        let tiled = message(json!({"components": {"unet": {"enable_tiling": true}}}));
        assert!(tiled.contains("`unet` does not support tiling"), "{tiled}");
        let unknown = message(json!({"components": {"vae": {"enable_tiling": {"size": 1}}}}));
        assert!(unknown.contains("`tile_sample_min_size`"), "{unknown}");
        let kind = message(json!({"group_offload": {"offload_type": "row_level"}}));
        assert!(kind.contains("`block_level`"), "{kind}");
        let margin = json!({"enable_auto_cpu_offload": true, "memory_reserve_margin": "lots"});
        assert!(message(json!({"components_manager": margin})).contains("`lots`"));
    }

    #[test]
    fn the_size_of_a_call_is_what_its_arguments_say() {
        let arguments = json!({
            "prompt": ["a", "b"], "num_images_per_prompt": 2, "height": 512, "width": "640", "guidance_scale": 1.0
        });
        let call = call(arguments.as_object().expect("an object"));
        let expected = CallSize { height: Some(512), width: Some(640), pictures: 4, is_guided: false };
        assert_eq!(call, expected);
        assert_eq!(super::call(&Map::new()), CallSize::default());
    }
}
