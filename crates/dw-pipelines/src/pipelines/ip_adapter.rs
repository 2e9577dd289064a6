//! The IP-Adapters of a pipeline: finding their files and image encoder, and how strongly each acts where.
//!
//! What pictures say to them in a call is [`super::image_prompt`]'s part.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device};
use serde_json::{Map, Value};

use super::{clip_pixels::ClipPixels, text_to_image::refuse};
use crate::{
    Error, Result,
    hub::{Hub, ModelFiles, Need, sub},
    models::{ClipVisionConfig, ImageFeatures, IpAdapter, UnetConfig},
    request::{Context, IpAdapterRequest, IpAdapterScale},
    weights::{Listed, Weights, list_files},
};

/// The IP-Adapters of a pipeline, and how pictures are prepared for their image encoder.
pub(crate) struct IpAdapters {
    pub(crate) adapters: Vec<ScaledAdapter>,
    pub(crate) pixels: ClipPixels,
}

/// An adapter with its strength in each part of the UNet.
pub(crate) struct ScaledAdapter {
    pub(crate) adapter: IpAdapter,
    scale: Scale,
}

impl ScaledAdapter {
    /// The strength in the layer called `name`.
    pub(crate) fn scale(&self, name: &str) -> f64 {
        match &self.scale {
            Scale::Everywhere(scale) => *scale,
            Scale::ByPrefix(list) => {
                list.iter().find(|(prefix, _)| name.starts_with(prefix.as_str())).map_or(0.0, |(_, scale)| *scale)
            }
        }
    }
}

/// An adapter's file, found but not yet read.
pub(crate) struct Found<'a> {
    pub(crate) request: &'a IpAdapterRequest,
    pub(crate) files: Arc<ModelFiles>,
    file: PathBuf,
}

impl<'a> Found<'a> {
    /// Finds the file, or says what is wrong with its name.
    pub(crate) fn find(request: &'a IpAdapterRequest, hub: &Hub, context: Context<'_>) -> Result<Self> {
        if let Some(name) = request.weight_name.as_deref().filter(|name| !is_safetensors(name)) {
            let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
            return Err(Error::Unsupported(format!(
                "IP-Adapter file `{name}` is no safetensors file; pickles can run code when they are read and are \
                 refused: use `{stem}.safetensors`, which most repositories hold beside it, or convert the file"
            )));
        }
        let files = Arc::new(hub.open(&request.source, context)?);
        let folder = folder(request);
        let name = match &request.weight_name {
            Some(name) => name.clone(),
            None => only_file(&files.place(folder))?,
        };
        files.fetch(folder, Need::File(&name), context)?;
        let file = files.place(&sub(folder, &name));
        if !file.is_file() {
            let reason = "is missing; correct `model_name`, `subfolder` or `weight_name` of the IP-Adapter";
            return Err(Error::BadFile { path: file, reason: reason.into() });
        }
        Ok(Self { request, files, file })
    }

    /// The folder of the image encoder that comes with the adapter; none when the request wants none.
    pub(crate) fn image_encoder(&self) -> Option<String> {
        let name = self.request.image_encoder_folder.as_deref()?.trim_matches('/');
        // As the reference has it: a path counts from the top, a plain name from the adapter's folder.
        Some(if name.contains('/') { name.to_owned() } else { sub(folder(self.request), name) })
    }

    /// What errors call the file.
    pub(crate) fn origin(&self) -> String {
        self.file.display().to_string()
    }

    /// What the header of the file lists.
    pub(crate) fn list(&self) -> Result<Vec<Listed>> {
        list_files(std::slice::from_ref(&self.file), None)
    }

    /// The shapes of its tensors by name; values are not read.
    pub(crate) fn shapes(&self) -> Result<BTreeMap<String, Vec<usize>>> {
        Ok(self.list()?.into_iter().map(|tensor| (tensor.name.clone(), tensor.dims().to_vec())).collect())
    }

    /// Reads the file.
    pub(crate) fn weights(&self, (dtype, device): (DType, &Device), context: Context<'_>) -> Result<Weights> {
        let mut progress = |_| Ok(context.cancel.check()?);
        Weights::load(std::slice::from_ref(&self.file), dtype, device, &mut progress)
    }

    /// Reads the adapter.
    pub(crate) fn read(
        &self,
        unet: &UnetConfig,
        placement: (DType, &Device),
        context: Context<'_>,
    ) -> Result<ScaledAdapter> {
        let scale = Scale::new(&self.request.scale, unet)?;
        let weights = self.weights(placement, context)?;
        Ok(ScaledAdapter { adapter: IpAdapter::new(unet, &weights)?, scale })
    }

    /// How strongly it is to act.
    pub(crate) fn scale(&self) -> &IpAdapterScale {
        &self.request.scale
    }
}

fn folder(request: &IpAdapterRequest) -> &str {
    request.subfolder.as_deref().unwrap_or_default().trim_matches('/')
}

fn is_safetensors(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|ending| ending.eq_ignore_ascii_case("safetensors"))
}

/// The one safetensors file of a folder.
fn only_file(folder: &Path) -> Result<String> {
    let mut names = Vec::new();
    if folder.is_dir() {
        for entry in fs_err::read_dir(folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            names.extend(is_safetensors(&name).then_some(name));
        }
    }
    names.sort();
    match names.as_slice() {
        [name] => Ok(name.clone()),
        names => Err(Error::BadFile {
            path: folder.to_owned(),
            reason: format!(
                "holds {} safetensors files; name the IP-Adapter's as `weight_name` (`ip-adapter_sd15.safetensors`)",
                names.len()
            ),
        }),
    }
}

/// Refuses an image encoder whose states are not what the adapter was trained with.
pub(crate) fn check_encoder(adapter: &IpAdapter, encoder: &ClipVisionConfig) -> Result<()> {
    let width = match adapter.features() {
        ImageFeatures::Pooled => encoder.projection_dim,
        ImageFeatures::Penultimate => encoder.hidden_size,
    };
    if width == adapter.width() {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "the image encoder gives {width} features, but the IP-Adapter reads {}; name the encoder it was trained with as \
         `image_encoder_folder` (in h94/IP-Adapter `models/image_encoder`, or `sdxl_models/image_encoder` for \
         `ip-adapter_sdxl`), or load it as component `image_encoder`",
        adapter.width()
    )))
}

/// How strongly an adapter acts.
enum Scale {
    Everywhere(f64),
    /// The first prefix of a layer's name decides; layers without one see nothing.
    ByPrefix(Vec<(String, f64)>),
}

impl Scale {
    fn new(scale: &IpAdapterScale, unet: &UnetConfig) -> Result<Self> {
        match scale {
            IpAdapterScale::Usual => Ok(Self::Everywhere(1.0)),
            IpAdapterScale::Everywhere(scale) => Ok(Self::Everywhere(*scale)),
            IpAdapterScale::ByBlock(blocks) => by_block(blocks, unet).map(Self::ByPrefix),
            IpAdapterScale::ByLayer(numbers) => by_layer(numbers, unet).map(Self::ByPrefix),
        }
    }
}

/// Scales of all transformers from the UNet's input to its output.
fn by_layer(numbers: &[f64], unet: &UnetConfig) -> Result<Vec<(String, f64)>> {
    let mut prefixes = Vec::new();
    let layers = unet.cross_attention_layers()?;
    for side in ["down", "mid", "up"] {
        for layer in layers.iter().filter(|layer| layer.block.starts_with(side)) {
            let prefix = format!("{}.attentions.{}.", layer.block, layer.transformer);
            if prefixes.last() != Some(&prefix) {
                prefixes.push(prefix);
            }
        }
    }
    if prefixes.len() != numbers.len() {
        let reason = format!(
            "has {} numbers, but the UNet has {} transformers; give one number, or one for each",
            numbers.len(),
            prefixes.len()
        );
        return Err(refuse("ip_adapter.scale", reason));
    }
    Ok(prefixes.into_iter().zip(numbers.iter().copied()).collect())
}

/// Scales by block as the reference writes them: `{"down": {"block_2": [0.0, 1.0]}, "mid": 1, "up": 0.5}`; what
/// is not named is 0.
fn by_block(blocks: &Map<String, Value>, unet: &UnetConfig) -> Result<Vec<(String, f64)>> {
    let layers = unet.cross_attention_layers()?;
    if let Some(name) = blocks.keys().find(|name| !["down", "mid", "up"].contains(&name.as_str())) {
        return Err(refuse("ip_adapter.scale", format!("has no part `{name}`; use `down`, `mid` and `up`")));
    }
    let mut scales = Vec::new();
    if let Some(mid) = blocks.get("mid") {
        scales.push(("mid_block.".to_owned(), numbers("mid", mid, 1)?[0]));
    }
    for side in ["down", "up"] {
        let Some(value) = blocks.get(side) else { continue };
        // Each block with attention, and how many transformers it has.
        let mut counts: Vec<(&str, usize)> = Vec::new();
        for layer in layers.iter().filter(|layer| layer.block.starts_with(side)) {
            match counts.last_mut().filter(|(block, _)| *block == layer.block) {
                Some((_, count)) => *count = layer.transformer + 1,
                None => counts.push((&layer.block, layer.transformer + 1)),
            }
        }
        side_scales(side, value, &counts, &mut scales)?;
    }
    Ok(scales)
}

/// The scales of one side of the UNet.
fn side_scales(side: &str, value: &Value, counts: &[(&str, usize)], scales: &mut Vec<(String, f64)>) -> Result<()> {
    let short = |block: &str| format!("block_{}", block.rsplit('.').next().unwrap_or_default());
    if let Some(map) = value.as_object() {
        let known: Vec<String> = counts.iter().map(|(block, _)| short(block)).collect();
        if let Some(name) = map.keys().find(|name| !known.contains(name)) {
            let reason = format!("has no block `{name}` with attention in `{side}`; it has `{}`", known.join("`, `"));
            return Err(refuse("ip_adapter.scale", reason));
        }
    }
    for &(block, count) in counts {
        let of_block = match value.as_object() {
            None => numbers(side, value, count)?,
            Some(map) => match map.get(&short(block)) {
                None => continue,
                Some(value) => numbers(&format!("{side}.{}", short(block)), value, count)?,
            },
        };
        let named = of_block.into_iter().enumerate();
        scales.extend(named.map(|(i, scale)| (format!("{block}.attentions.{i}."), scale)));
    }
    Ok(())
}

/// A number for each of `count` transformers: one for all, or a list.
fn numbers(name: &str, value: &Value, count: usize) -> Result<Vec<f64>> {
    let list = value.as_array().map_or_else(|| std::slice::from_ref(value), Vec::as_slice);
    let numbers: Option<Vec<f64>> = list.iter().map(Value::as_f64).collect();
    match numbers {
        Some(numbers) if numbers.len() == 1 => Ok(vec![numbers[0]; count]),
        Some(numbers) if numbers.len() == count => Ok(numbers),
        _ => {
            Err(refuse("ip_adapter.scale", format!("`{name}` must be a number, or a list of {count}, found `{value}`")))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn unet() -> UnetConfig {
        serde_json::from_value(json!({
            "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1
        }))
        .expect("a configuration")
    }

    fn prefixes(blocks: Value) -> Result<Vec<(String, f64)>, String> {
        let Value::Object(blocks) = blocks else { panic!("an object") };
        by_block(&blocks, &unet()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_scale_by_block_reaches_its_transformers_only() {
        let found = prefixes(json!({ "mid": 0.5, "up": { "block_0": [0.0, 1.0] } })).expect("valid");
        let found: Vec<(&str, f64)> = found.iter().map(|(prefix, scale)| (prefix.as_str(), *scale)).collect();
        assert_eq!(
            found,
            [("mid_block.", 0.5), ("up_blocks.0.attentions.0.", 0.0), ("up_blocks.0.attentions.1.", 1.0)]
        );
        let found = prefixes(json!({ "down": 0.25 })).expect("valid");
        assert_eq!(found, [("down_blocks.1.attentions.0.".to_owned(), 0.25)]);
    }

    #[test]
    fn a_list_for_a_side_gives_each_of_its_blocks_one_scale_per_transformer() {
        let found = prefixes(json!({ "up": [0.25, 0.75] })).expect("valid");
        let up = |transformer: usize| format!("up_blocks.0.attentions.{transformer}.");
        assert_eq!(found, [(up(0), 0.25), (up(1), 0.75)]);
    }

    #[test]
    fn a_list_by_layer_goes_from_the_input_to_the_output() {
        let found = by_layer(&[0.1, 0.2, 0.3, 0.4], &unet()).expect("valid");
        let found: Vec<(&str, f64)> = found.iter().map(|(prefix, scale)| (prefix.as_str(), *scale)).collect();
        assert_eq!(
            found,
            [
                ("down_blocks.1.attentions.0.", 0.1),
                ("mid_block.attentions.0.", 0.2),
                ("up_blocks.0.attentions.0.", 0.3),
                ("up_blocks.0.attentions.1.", 0.4)
            ]
        );
        let said = by_layer(&[0.1, 0.2], &unet()).expect_err("too few").to_string();
        assert!(said.contains("has 2 numbers, but the UNet has 4 transformers"), "{said}");
    }

    #[test]
    fn wrong_blocks_and_lists_are_named() {
        for (blocks, expected) in [
            (json!({ "left": 1 }), "no part `left`"),
            (json!({ "down": { "block_0": 1 } }), "no block `block_0` with attention in `down`; it has `block_1`"),
            (json!({ "up": { "block_0": [1, 2, 3] } }), "`up.block_0` must be a number, or a list of 2"),
            (json!({ "mid": "strong" }), "`mid` must be a number"),
        ] {
            let said = prefixes(blocks).expect_err("wrong");
            assert!(said.contains(expected), "{said}");
        }
    }
}
