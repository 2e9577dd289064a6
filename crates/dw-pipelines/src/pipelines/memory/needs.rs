//! How much memory a component needs, read off the headers of its weight files and its configuration.
//!
//! Weights are exact. Activations are estimates: the size of the largest feature map, times how many of that size exist
//! at a time, which was measured (docs/memory.md says how).

use std::collections::BTreeMap;

use candle_core::{DType, Device};
use serde_json::Value;

use crate::{
    Result,
    hub::WeightFiles,
    quant::Scheme,
    request::{CallSize, TilingRequest},
    weights::{Listed, Paging, paging::group_key},
};

/// The stage in which everything that predicts noise is on the device together.
const DENOISE: &str = "denoise";

/// How many feature maps of a UNet's first level exist at a time, skip connections and feed-forward layers included.
const UNET_MAPS: f64 = 30.0;
/// How many feature maps of the size that enters an autoencoder's last level exist at a time.
const VAE_MAPS: f64 = 3.5;
/// How many rows of a transformer's width exist for each token at a time, feed-forward layers included.
const TRANSFORMER_ROWS: f64 = 24.0;
/// The same for a text encoder.
const ENCODER_ROWS: f64 = 32.0;
/// Height and width in latents of the pictures that Flux was trained on, which its configuration does not say.
const FLUX_SAMPLE_SIZE: u64 = 128;
/// Tokens of the longest prompt.
const TEXT_TOKENS: u64 = 512;
/// Bytes of an activation: layers compute in f32 where it matters.
const ACTIVATION_BYTES: f64 = 4.0;

/// What one component needs.
#[derive(Clone, Debug)]
pub(crate) struct Need {
    pub(crate) name: String,
    /// The stage of a call in which it computes.
    pub(crate) stage: String,
    /// How most of its weights are stored there: a type (`bf16`) or a format of quantized weights (`q4_k`).
    pub(crate) storage: String,
    /// Bytes of its weights on the device.
    pub(crate) bytes: u64,
    /// Bytes of each layer, by its path.
    layers: BTreeMap<String, u64>,
    /// Bytes of the results of its layers.
    pub(crate) activations: u64,
    /// The same in tiles.
    pub(crate) tiled_activations: u64,
    /// Whether it is in memory already.
    pub(crate) is_loaded: bool,
    /// Whether it is on the device all the time, whatever is said of components.
    stays: bool,
}

/// The stage of a call in which the component `name` computes.
pub(crate) fn stage_of(name: &str) -> &str {
    let predicts = ["unet", "transformer", "controlnet"].iter().any(|start| name.starts_with(start));
    if predicts { DENOISE } else { name }
}

impl Need {
    /// What a component with these weights and this `config.json` needs in a call of this size.
    pub(crate) fn new(
        name: &str,
        (files, scheme): (&WeightFiles, Option<&Scheme>),
        config: &Value,
        (dtype, device): (DType, &Device),
        call: &Call,
    ) -> Result<Self> {
        let (mut layers, mut quantized, mut to_quantize) = (BTreeMap::new(), 0, 0);
        for listed in files.list(scheme)? {
            let layer = listed.name.rsplit_once('.').map_or("", |(layer, _)| layer);
            let bytes = listed.bytes(dtype, device.is_cpu());
            *layers.entry(layer.to_owned()).or_insert(0) += bytes;
            quantized += if listed.is_quantized() { bytes } else { 0 };
            to_quantize += if listed.is_to_quantize() { bytes } else { 0 };
        }
        let bytes: u64 = layers.values().sum();
        let format = scheme.and_then(|scheme| scheme.format).map_or("quantized".into(), |format| format.to_string());
        let map = |(height, width)| activations(stage_of(name), config, call, (height, width));
        let tile = (call.tile.min(call.height), call.tile.min(call.width));
        let is_vae = config.get("latent_channels").is_some();
        let whole = map((call.height, call.width));
        Ok(Self {
            name: name.to_owned(),
            stage: stage_of(name).to_owned(),
            storage: if quantized > bytes / 2 { format } else { dtype.as_str().to_owned() },
            bytes,
            layers,
            activations: whole,
            tiled_activations: if is_vae { map(tile) } else { whole },
            is_loaded: false,
            // What is quantized while it is read rests in host memory, so that it is quantized once.
            stays: device.is_cpu() && to_quantize > bytes / 2,
        })
    }

    /// What an adapter beside the denoiser needs, which is no component and does not come and go.
    pub(crate) fn of_adapter(name: &str, tensors: &[Listed], dtype: DType) -> Self {
        // Its layers are linear, so none has a kernel beside its weight.
        let bytes = tensors.iter().map(|listed| listed.bytes(dtype, false)).sum();
        Self {
            name: name.to_owned(),
            stage: DENOISE.to_owned(),
            storage: dtype.as_str().to_owned(),
            bytes,
            layers: BTreeMap::new(),
            activations: 0,
            tiled_activations: 0,
            is_loaded: false,
            stays: true,
        }
    }

    /// When its layers come and go, where a request says `asked` of components like it.
    pub(crate) fn paging(&self, asked: Option<Paging>) -> Option<Paging> {
        asked.filter(|_| !self.stays)
    }

    /// Bytes of its weights that are on the device at a time.
    pub(crate) fn at_once(&self, paging: Option<Paging>) -> u64 {
        match paging {
            None | Some(Paging::Whole) => self.bytes,
            Some(Paging::Layers) => self.largest_groups(0, 1),
            Some(Paging::Groups { blocks, prefetch }) => self.largest_groups(blocks, 1 + usize::from(prefetch)),
        }
    }

    /// Bytes of the `count` largest groups of `blocks`.
    fn largest_groups(&self, blocks: usize, count: usize) -> u64 {
        let mut groups: BTreeMap<String, u64> = BTreeMap::new();
        for (path, bytes) in &self.layers {
            *groups.entry(group_key(path, blocks)).or_default() += bytes;
        }
        let mut sizes: Vec<u64> = groups.into_values().collect();
        sizes.sort_unstable_by(|left, right| right.cmp(left));
        sizes.iter().take(count).sum()
    }
}

/// The size of a call, settled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) height: usize,
    pub(crate) width: usize,
    /// Rows of the denoiser's batch.
    rows: usize,
    /// Height and width of the autoencoder's tiles in pixels.
    tile: usize,
    /// Pixels per latent and side.
    scale: usize,
}

impl Call {
    /// The size of the call, or the one that the model was made for: `denoiser` and `vae` are their configurations.
    pub(crate) fn new(asked: CallSize, tiling: Option<TilingRequest>, denoiser: &Value, vae: &Value) -> Self {
        let scale = list(vae, "block_out_channels").map_or(8, |channels| 1 << channels.len().saturating_sub(1));
        // Flux takes the guidance scale as an input, and predicts without the prompt in a pass of its own.
        let is_flux = denoiser.get("guidance_embeds").is_some();
        let usual = if is_flux { FLUX_SAMPLE_SIZE } else { 64 };
        let side = number(denoiser, "sample_size").unwrap_or(usual) as usize * scale;
        let trained = number(vae, "sample_size").unwrap_or(512) as usize;
        Self {
            height: asked.height.unwrap_or(side),
            width: asked.width.unwrap_or(side),
            rows: asked.pictures.max(1) * if asked.is_guided && !is_flux { 2 } else { 1 },
            tile: tiling.and_then(|tiling| tiling.sample).unwrap_or(trained),
            scale,
        }
    }
}

/// Bytes of the results of layers in one evaluation.
fn activations(stage: &str, config: &Value, call: &Call, (height, width): (usize, usize)) -> u64 {
    let pixels = (height * width) as f64;
    let rows = call.rows as f64;
    let channels = |at: usize| list(config, "block_out_channels").and_then(|list| list.get(at)?.as_f64());
    let values = if config.get("latent_channels").is_some() {
        // The last level of the decoder starts with the channels of the one before it, at full size. Pictures go one by
        // one.
        pixels * channels(1).or(channels(0)).unwrap_or(256.0) * VAE_MAPS
    } else if let Some(first) = channels(0) {
        rows * pixels / (call.scale * call.scale) as f64 * first * UNET_MAPS
    } else if stage == DENOISE {
        let heads = number(config, "num_attention_heads").unwrap_or(24) as f64;
        let width = heads * number(config, "attention_head_dim").unwrap_or(64) as f64;
        // Transformers see patches of two by two latents.
        let tokens = pixels / (4 * call.scale * call.scale) as f64 + TEXT_TOKENS as f64;
        rows * tokens * width * TRANSFORMER_ROWS
    } else {
        let width = number(config, "hidden_size").or(number(config, "d_model")).unwrap_or(1024) as f64;
        rows * TEXT_TOKENS as f64 * width * ENCODER_ROWS
    };
    (values * ACTIVATION_BYTES) as u64
}

fn list<'a>(config: &'a Value, key: &str) -> Option<&'a Vec<Value>> {
    config.get(key)?.as_array()
}

/// A number, or the first of a list of them.
fn number(config: &Value, key: &str) -> Option<u64> {
    let value = config.get(key)?;
    value.as_u64().or_else(|| value.get(0)?.as_u64())
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::quant::Format;

    /// A component of layers of these sizes, one for each block.
    pub(in super::super) fn need(name: &str, blocks: &[u64], activations: u64) -> Need {
        let layers = blocks.iter().enumerate().map(|(at, bytes)| (format!("blocks.{at}.linear"), *bytes)).collect();
        Need {
            name: name.into(),
            stage: stage_of(name).into(),
            storage: "f32".into(),
            bytes: blocks.iter().sum(),
            layers,
            activations,
            tiled_activations: if name == "vae" { activations / 4 } else { activations },
            is_loaded: false,
            stays: false,
        }
    }

    #[test]
    fn what_is_there_at_a_time_follows_from_the_largest_layers_and_groups() {
        let need = need("unet", &[10, 40, 20, 30], 0);
        let groups = |blocks, prefetch| need.at_once(Some(Paging::Groups { blocks, prefetch }));
        assert_eq!((need.at_once(None), need.at_once(Some(Paging::Whole))), (100, 100));
        assert_eq!(need.at_once(Some(Paging::Layers)), 40);
        assert_eq!((groups(1, false), groups(1, true)), (40, 70));
        // Two blocks each: 10 + 40 and 20 + 30.
        assert_eq!((groups(2, false), groups(2, true)), (50, 100));
    }

    #[test]
    fn what_is_quantized_while_it_is_read_stays_in_host_memory() {
        let tensors = vec![("blocks.0.linear.weight".to_owned(), vec![64, 64])];
        let files = WeightFiles::Random { name: "model".into(), tensors: Arc::new(tensors) };
        let call = Call::new(CallSize::default(), None, &json!({}), &json!({}));
        let scheme = Scheme::plain(Format::parse("nf4").expect("a format"));
        let paging = |scheme| {
            let need = Need::new("unet", (&files, scheme), &json!({}), (DType::F32, &Device::Cpu), &call);
            need.expect("nothing is read").paging(Some(Paging::Whole))
        };
        assert_eq!((paging(None), paging(Some(&scheme))), (Some(Paging::Whole), None));
    }

    #[test]
    fn a_call_without_a_size_has_that_of_the_model() {
        let (unet, vae) =
            (json!({"sample_size": 128}), json!({"block_out_channels": [1, 2, 3, 4], "sample_size": 1024}));
        let call = Call::new(CallSize::default(), None, &unet, &vae);
        assert_eq!((call.height, call.width, call.rows, call.tile), (1024, 1024, 2, 1024));
        let flux = json!({"guidance_embeds": false});
        let call = Call::new(CallSize::default(), None, &flux, &vae);
        assert_eq!((call.height, call.rows), (1024, 1), "one pass after the other");
        let asked = CallSize { width: Some(512), pictures: 3, is_guided: false, ..CallSize::default() };
        let call = Call::new(asked, Some(TilingRequest { sample: Some(256), overlap: None }), &unet, &vae);
        assert_eq!((call.height, call.width, call.rows, call.tile), (1024, 512, 3, 256));
    }

    #[test]
    fn activations_grow_with_the_picture_and_the_batch() {
        let config = json!({"block_out_channels": [320, 640]});
        let vae = json!({"block_out_channels": [128, 256, 512, 512], "sample_size": 512});
        let call =
            |pictures| Call::new(CallSize { pictures, ..CallSize::default() }, None, &json!({"sample_size": 64}), &vae);
        let of = |pictures, size| activations(DENOISE, &config, &call(pictures), size);
        assert_eq!(of(1, (1024, 1024)), 4 * of(1, (512, 512)));
        assert_eq!(of(2, (512, 512)), 2 * of(1, (512, 512)));
    }
}
