//! Models inside the program: their files, embedded when dw is built.

use crate::{Error, Result};

/// A small model in the diffusers layout whose files are part of the program.
#[derive(Debug)]
pub struct BuiltinModel {
    /// What follows `builtin:`.
    pub name: &'static str,
    /// What it can draw, in a sentence.
    pub summary: &'static str,
    files: &'static [(&'static str, &'static [u8])],
    /// Whether it has configurations only, and weights are made up when they are read.
    pub is_random: bool,
}

impl BuiltinModel {
    /// The bytes of one of its files, by its path inside the model.
    pub fn file(&self, path: &str) -> Option<&'static [u8]> {
        self.files.iter().find(|(name, _)| *name == path).map(|&(_, bytes)| bytes)
    }
}

/// Embeds the named files of `builtin/MODEL/`.
macro_rules! embed {
    ($model:literal, [$($path:literal),+ $(,)?]) => {
        &[$(($path, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/builtin/", $model, "/", $path)).as_slice())),+]
    };
}

/// Pairs of a path inside a model and the file of `builtin/random/` that stands there.
macro_rules! shared {
    ($($path:literal: $file:literal),+ $(,)?) => {
        &[$((
            $path,
            include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/builtin/random/", $file)).as_slice(),
        )),+]
    };
}

static MODELS: [BuiltinModel; 3] = [
    LANDSCAPES,
    BuiltinModel {
        name: "tiny-flux",
        summary: "Flux in miniature with random weights, to try workflows with: its pictures are noise",
        files: shared!(
            "model_index.json": "flux/model_index.json",
            "scheduler/scheduler_config.json": "flux/scheduler.json",
            "text_encoder/config.json": "clip_l_tiny.json",
            "text_encoder_2/config.json": "t5_tiny.json",
            "tokenizer/vocab.json": "clip_tokenizer/vocab.json",
            "tokenizer/merges.txt": "clip_tokenizer/merges.txt",
            "tokenizer/tokenizer_config.json": "clip_tokenizer/tokenizer_config.json",
            "tokenizer_2/tokenizer.json": "t5_tokenizer/tokenizer.json",
            "tokenizer_2/tokenizer_config.json": "t5_tokenizer/tokenizer_config.json",
            "transformer/config.json": "flux/transformer_tiny.json",
            "vae/config.json": "flux/vae_tiny.json",
        ),
        is_random: true,
    },
    BuiltinModel {
        name: "tiny-sd3",
        summary: "Stable Diffusion 3.5 in miniature with random weights, to try workflows with: its pictures are noise",
        files: shared!(
            "model_index.json": "stable-diffusion-3/model_index.json",
            "scheduler/scheduler_config.json": "stable-diffusion-3/scheduler.json",
            "text_encoder/config.json": "clip_l_tiny_projected.json",
            "text_encoder_2/config.json": "clip_big_g_tiny.json",
            "text_encoder_3/config.json": "t5_tiny.json",
            "tokenizer/vocab.json": "clip_tokenizer/vocab.json",
            "tokenizer/merges.txt": "clip_tokenizer/merges.txt",
            "tokenizer/tokenizer_config.json": "clip_tokenizer/tokenizer_config.json",
            "tokenizer_2/vocab.json": "clip_tokenizer/vocab.json",
            "tokenizer_2/merges.txt": "clip_tokenizer/merges.txt",
            "tokenizer_2/tokenizer_config.json": "clip_tokenizer/tokenizer_config.json",
            "tokenizer_3/tokenizer.json": "t5_tokenizer/tokenizer.json",
            "tokenizer_3/tokenizer_config.json": "t5_tokenizer/tokenizer_config.json",
            "transformer/config.json": "stable-diffusion-3/transformer_tiny.json",
            "vae/config.json": "stable-diffusion-3/vae_tiny.json",
        ),
        is_random: true,
    },
];

const LANDSCAPES: BuiltinModel = BuiltinModel {
    name: "landscapes",
    summary: "flat landscapes and coloured shapes, 128 x 128; an SDXL-style model of a few million weights",
    files: embed!(
        "landscapes",
        [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "text_encoder_2/config.json",
            "text_encoder_2/model.safetensors",
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json",
            "tokenizer_2/tokenizer.json",
            "tokenizer_2/tokenizer_config.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        ]
    ),
    is_random: false,
};

/// Models of full size without trained weights, each under the class that runs it: the configurations that their
/// publishers give, and a tokenizer that spells.
static RANDOM_MODELS: [BuiltinModel; 4] = [
    BuiltinModel {
        name: "random/StableDiffusionPipeline",
        summary: "Stable Diffusion 1.5 in full size with random weights, to measure with",
        files: shared!(
            "model_index.json": "stable-diffusion/model_index.json",
            "scheduler/scheduler_config.json": "stable-diffusion/scheduler.json",
            "text_encoder/config.json": "clip_l.json",
            "tokenizer/vocab.json": "clip_tokenizer/vocab.json",
            "tokenizer/merges.txt": "clip_tokenizer/merges.txt",
            "tokenizer/tokenizer_config.json": "clip_tokenizer/tokenizer_config.json",
            "unet/config.json": "stable-diffusion/unet.json",
            "vae/config.json": "stable-diffusion/vae.json",
        ),
        is_random: true,
    },
    BuiltinModel {
        name: "random/StableDiffusionXLPipeline",
        summary: "Stable Diffusion XL in full size with random weights, to measure with",
        files: shared!(
            "model_index.json": "stable-diffusion-xl/model_index.json",
            "scheduler/scheduler_config.json": "stable-diffusion-xl/scheduler.json",
            "text_encoder/config.json": "clip_l.json",
            "text_encoder_2/config.json": "clip_big_g.json",
            "tokenizer/vocab.json": "clip_tokenizer/vocab.json",
            "tokenizer/merges.txt": "clip_tokenizer/merges.txt",
            "tokenizer/tokenizer_config.json": "clip_tokenizer/tokenizer_config.json",
            "tokenizer_2/vocab.json": "clip_tokenizer/vocab.json",
            "tokenizer_2/merges.txt": "clip_tokenizer/merges.txt",
            "tokenizer_2/tokenizer_config.json": "clip_tokenizer/tokenizer_config.json",
            "unet/config.json": "stable-diffusion-xl/unet.json",
            "vae/config.json": "stable-diffusion-xl/vae.json",
        ),
        is_random: true,
    },
    BuiltinModel {
        name: "random/FluxPipeline",
        summary: "FLUX.1 dev in full size with random weights, to measure with",
        files: shared!(
            "model_index.json": "flux/model_index.json",
            "scheduler/scheduler_config.json": "flux/scheduler.json",
            "text_encoder/config.json": "clip_l.json",
            "text_encoder_2/config.json": "t5_xxl.json",
            "tokenizer/vocab.json": "clip_tokenizer/vocab.json",
            "tokenizer/merges.txt": "clip_tokenizer/merges.txt",
            "tokenizer/tokenizer_config.json": "clip_tokenizer/tokenizer_config.json",
            "tokenizer_2/tokenizer.json": "t5_tokenizer/tokenizer.json",
            "tokenizer_2/tokenizer_config.json": "t5_tokenizer/tokenizer_config.json",
            "transformer/config.json": "flux/transformer.json",
            "vae/config.json": "flux/vae.json",
        ),
        is_random: true,
    },
    BuiltinModel {
        name: "random/StableDiffusion3Pipeline",
        summary: "Stable Diffusion 3.5 large in full size with random weights, to measure with",
        files: shared!(
            "model_index.json": "stable-diffusion-3/model_index.json",
            "scheduler/scheduler_config.json": "stable-diffusion-3/scheduler.json",
            "text_encoder/config.json": "clip_l_projected.json",
            "text_encoder_2/config.json": "clip_big_g.json",
            "text_encoder_3/config.json": "t5_xxl.json",
            "tokenizer/vocab.json": "clip_tokenizer/vocab.json",
            "tokenizer/merges.txt": "clip_tokenizer/merges.txt",
            "tokenizer/tokenizer_config.json": "clip_tokenizer/tokenizer_config.json",
            "tokenizer_2/vocab.json": "clip_tokenizer/vocab.json",
            "tokenizer_2/merges.txt": "clip_tokenizer/merges.txt",
            "tokenizer_2/tokenizer_config.json": "clip_tokenizer/tokenizer_config.json",
            "tokenizer_3/tokenizer.json": "t5_tokenizer/tokenizer.json",
            "tokenizer_3/tokenizer_config.json": "t5_tokenizer/tokenizer_config.json",
            "transformer/config.json": "stable-diffusion-3/transformer.json",
            "vae/config.json": "stable-diffusion-3/vae.json",
        ),
        is_random: true,
    },
];

/// The models with random weights.
pub fn random_models() -> &'static [BuiltinModel] {
    &RANDOM_MODELS
}

/// Every model inside the program.
pub fn builtin_models() -> &'static [BuiltinModel] {
    &MODELS
}

/// The model called `name`, with or without the prefix `builtin:`.
pub(super) fn find(name: &str) -> Result<&'static BuiltinModel> {
    let bare = name.strip_prefix("builtin:").unwrap_or(name);
    MODELS.iter().chain(&RANDOM_MODELS).find(|model| model.name == bare).ok_or_else(|| {
        let known: Vec<String> = MODELS.iter().map(|model| format!("`builtin:{}`", model.name)).collect();
        Error::Source(format!("there is no built-in model `{bare}`; there is {}", known.join(", ")))
    })
}
