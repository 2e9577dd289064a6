//! Names and shapes of the published checkpoints, built the way the original code builds its modules
//! (latent-diffusion's `openaimodel.py` and `model.py`, OpenCLIP, transformers' CLIP). Knows nothing of key maps.

use super::index::Shapes;

/// A UNet of the original code.
pub(super) struct Unet {
    pub(super) in_channels: usize,
    pub(super) model_channels: usize,
    pub(super) multipliers: &'static [usize],
    /// Layers of the transformers on each level; 0 for a level without.
    pub(super) depths: &'static [usize],
    pub(super) middle_depth: usize,
    pub(super) context: usize,
    pub(super) is_linear: bool,
    /// Features of the added conditions.
    pub(super) added: Option<usize>,
}

pub(super) const SD15: Unet = Unet {
    in_channels: 4,
    model_channels: 320,
    multipliers: &[1, 2, 4, 4],
    depths: &[1, 1, 1, 0],
    middle_depth: 1,
    context: 768,
    is_linear: false,
    added: None,
};

pub(super) const SD21: Unet = Unet { context: 1024, is_linear: true, ..SD15 };

pub(super) const XL: Unet = Unet {
    multipliers: &[1, 2, 4],
    depths: &[0, 2, 10],
    middle_depth: 10,
    context: 2048,
    is_linear: true,
    added: Some(2816),
    ..SD15
};

pub(super) const REFINER: Unet = Unet {
    model_channels: 384,
    depths: &[0, 4, 4, 0],
    middle_depth: 4,
    context: 1280,
    is_linear: true,
    added: Some(2560),
    ..SD15
};

/// Collects tensors below a prefix.
struct Sink<'a> {
    shapes: &'a mut Shapes,
    prefix: &'a str,
}

impl Sink<'_> {
    fn put(&mut self, name: &str, shape: &[usize]) {
        self.shapes.insert(format!("{}{name}", self.prefix), shape.to_vec());
    }

    fn linear(&mut self, name: &str, out: usize, input: usize) {
        self.put(&format!("{name}.weight"), &[out, input]);
        self.put(&format!("{name}.bias"), &[out]);
    }

    fn conv(&mut self, name: &str, out: usize, input: usize, kernel: usize) {
        self.put(&format!("{name}.weight"), &[out, input, kernel, kernel]);
        self.put(&format!("{name}.bias"), &[out]);
    }

    fn norm(&mut self, name: &str, channels: usize) {
        self.put(&format!("{name}.weight"), &[channels]);
        self.put(&format!("{name}.bias"), &[channels]);
    }

    fn residual(&mut self, name: &str, input: usize, out: usize, time: usize) {
        self.norm(&format!("{name}.in_layers.0"), input);
        self.conv(&format!("{name}.in_layers.2"), out, input, 3);
        self.linear(&format!("{name}.emb_layers.1"), out, time);
        self.norm(&format!("{name}.out_layers.0"), out);
        self.conv(&format!("{name}.out_layers.3"), out, out, 3);
        if input != out {
            self.conv(&format!("{name}.skip_connection"), out, input, 1);
        }
    }

    fn transformer(&mut self, name: &str, channels: usize, depth: usize, unet: &Unet) {
        self.norm(&format!("{name}.norm"), channels);
        for end in ["proj_in", "proj_out"] {
            let end = format!("{name}.{end}");
            if unet.is_linear { self.linear(&end, channels, channels) } else { self.conv(&end, channels, channels, 1) }
        }
        for block in (0..depth).map(|layer| format!("{name}.transformer_blocks.{layer}")) {
            for (attention, source) in [("attn1", channels), ("attn2", unet.context)] {
                self.put(&format!("{block}.{attention}.to_q.weight"), &[channels, channels]);
                self.put(&format!("{block}.{attention}.to_k.weight"), &[channels, source]);
                self.put(&format!("{block}.{attention}.to_v.weight"), &[channels, source]);
                self.linear(&format!("{block}.{attention}.to_out.0"), channels, channels);
            }
            self.linear(&format!("{block}.ff.net.0.proj"), 8 * channels, channels);
            self.linear(&format!("{block}.ff.net.2"), channels, 4 * channels);
            for norm in ["norm1", "norm2", "norm3"] {
                self.norm(&format!("{block}.{norm}"), channels);
            }
        }
    }
}

/// The ControlNet that is a copy of `unet`, below `prefix` (ControlNet's `cldm.py`).
pub(super) fn controlnet(shapes: &mut Shapes, prefix: &str, copied: &Unet) {
    let mut whole = Shapes::new();
    unet(&mut whole, "", copied);
    let is_way_down = |name: &str| !name.starts_with("output_blocks.") && !name.starts_with("out.");
    let inputs: Vec<(usize, usize)> = whole
        .iter()
        .filter_map(|(name, shape)| {
            let (block, rest) = name.strip_prefix("input_blocks.")?.split_once('.')?;
            let is_output = ["0.weight", "0.out_layers.3.weight", "0.op.weight"].contains(&rest);
            is_output.then_some((block.parse().ok()?, shape[0]))
        })
        .collect();
    let mut sink = Sink { shapes, prefix };
    for (name, shape) in whole.iter().filter(|(name, _)| is_way_down(name)) {
        sink.put(name, shape);
    }
    for (block, channels) in inputs {
        sink.conv(&format!("zero_convs.{block}.0"), channels, channels, 1);
    }
    let last = copied.model_channels * copied.multipliers[copied.multipliers.len() - 1];
    sink.conv("middle_block_out.0", last, last, 1);
    let widths = [3, 16, 16, 32, 32, 96, 96, 256, copied.model_channels];
    for (at, pair) in widths.windows(2).enumerate() {
        sink.conv(&format!("input_hint_block.{}", 2 * at), pair[1], pair[0], 3);
    }
}

/// The UNet below `prefix`.
pub(super) fn unet(shapes: &mut Shapes, prefix: &str, unet: &Unet) {
    let mut sink = Sink { shapes, prefix };
    let (width, time) = (unet.model_channels, 4 * unet.model_channels);
    for (name, input) in [("time_embed.0", width), ("time_embed.2", time)] {
        sink.linear(name, time, input);
    }
    if let Some(added) = unet.added {
        sink.linear("label_emb.0.0", time, added);
        sink.linear("label_emb.0.2", time, time);
    }
    sink.conv("input_blocks.0.0", width, unet.in_channels, 3);
    let (mut skips, mut channels, mut number) = (vec![width], width, 1);
    for (level, multiplier) in unet.multipliers.iter().enumerate() {
        for _ in 0..2 {
            sink.residual(&format!("input_blocks.{number}.0"), channels, multiplier * width, time);
            channels = multiplier * width;
            if unet.depths[level] > 0 {
                sink.transformer(&format!("input_blocks.{number}.1"), channels, unet.depths[level], unet);
            }
            skips.push(channels);
            number += 1;
        }
        if level + 1 < unet.multipliers.len() {
            sink.conv(&format!("input_blocks.{number}.0.op"), channels, channels, 3);
            skips.push(channels);
            number += 1;
        }
    }
    sink.residual("middle_block.0", channels, channels, time);
    sink.transformer("middle_block.1", channels, unet.middle_depth, unet);
    sink.residual("middle_block.2", channels, channels, time);
    number = 0;
    for (level, multiplier) in unet.multipliers.iter().enumerate().rev() {
        for layer in 0..3 {
            let input = channels + skips.pop().expect("as many as blocks on the way down");
            sink.residual(&format!("output_blocks.{number}.0"), input, multiplier * width, time);
            channels = multiplier * width;
            let mut place = 1;
            if unet.depths[level] > 0 {
                sink.transformer(&format!("output_blocks.{number}.1"), channels, unet.depths[level], unet);
                place = 2;
            }
            if level > 0 && layer == 2 {
                sink.conv(&format!("output_blocks.{number}.{place}.conv"), channels, channels, 3);
            }
            number += 1;
        }
    }
    sink.norm("out.0", width);
    sink.conv("out.2", unet.in_channels.min(4), width, 3);
}

/// The autoencoder of all published models below `prefix`.
pub(super) fn vae(shapes: &mut Shapes, prefix: &str) {
    let mut sink = Sink { shapes, prefix };
    let (width, multipliers, latent) = (128, [1, 2, 4, 4], 4);
    let block = |sink: &mut Sink<'_>, name: &str, input: usize, out: usize| {
        sink.norm(&format!("{name}.norm1"), input);
        sink.conv(&format!("{name}.conv1"), out, input, 3);
        sink.norm(&format!("{name}.norm2"), out);
        sink.conv(&format!("{name}.conv2"), out, out, 3);
        if input != out {
            sink.conv(&format!("{name}.nin_shortcut"), out, input, 1);
        }
    };
    let deepest = width * multipliers[3];
    for side in ["encoder", "decoder"] {
        for middle in ["mid.block_1", "mid.block_2"] {
            block(&mut sink, &format!("{side}.{middle}"), deepest, deepest);
        }
        sink.norm(&format!("{side}.mid.attn_1.norm"), deepest);
        for name in ["q", "k", "v", "proj_out"] {
            sink.conv(&format!("{side}.mid.attn_1.{name}"), deepest, deepest, 1);
        }
    }
    sink.conv("encoder.conv_in", width, 3, 3);
    let mut channels = width;
    for (level, multiplier) in multipliers.iter().enumerate() {
        for layer in 0..2 {
            block(&mut sink, &format!("encoder.down.{level}.block.{layer}"), channels, multiplier * width);
            channels = multiplier * width;
        }
        if level < 3 {
            sink.conv(&format!("encoder.down.{level}.downsample.conv"), channels, channels, 3);
        }
    }
    sink.norm("encoder.norm_out", deepest);
    sink.conv("encoder.conv_out", 2 * latent, deepest, 3);
    sink.conv("quant_conv", 2 * latent, 2 * latent, 1);
    sink.conv("post_quant_conv", latent, latent, 1);
    sink.conv("decoder.conv_in", deepest, latent, 3);
    for (level, multiplier) in multipliers.iter().enumerate().rev() {
        for layer in 0..3 {
            block(&mut sink, &format!("decoder.up.{level}.block.{layer}"), channels, multiplier * width);
            channels = multiplier * width;
        }
        if level > 0 {
            sink.conv(&format!("decoder.up.{level}.upsample.conv"), channels, channels, 3);
        }
    }
    sink.norm("decoder.norm_out", width);
    sink.conv("decoder.conv_out", 3, width, 3);
}

/// OpenAI's text encoder as transformers names it, below `prefix`.
pub(super) fn clip(shapes: &mut Shapes, prefix: &str) {
    let mut sink = Sink { shapes, prefix };
    let hidden = 768;
    sink.put("text_model.embeddings.token_embedding.weight", &[49408, hidden]);
    sink.put("text_model.embeddings.position_embedding.weight", &[77, hidden]);
    for layer in (0..12).map(|layer| format!("text_model.encoder.layers.{layer}")) {
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            sink.linear(&format!("{layer}.self_attn.{name}"), hidden, hidden);
        }
        sink.linear(&format!("{layer}.mlp.fc1"), 4 * hidden, hidden);
        sink.linear(&format!("{layer}.mlp.fc2"), hidden, 4 * hidden);
        sink.norm(&format!("{layer}.layer_norm1"), hidden);
        sink.norm(&format!("{layer}.layer_norm2"), hidden);
    }
    sink.norm("text_model.final_layer_norm", hidden);
}

/// OpenCLIP's text encoder below `prefix`.
pub(super) fn open_clip(shapes: &mut Shapes, prefix: &str, hidden: usize, layers: usize) {
    let mut sink = Sink { shapes, prefix };
    sink.put("token_embedding.weight", &[49408, hidden]);
    sink.put("positional_embedding", &[77, hidden]);
    sink.put("text_projection", &[hidden, hidden]);
    sink.put("logit_scale", &[]);
    for layer in (0..layers).map(|layer| format!("transformer.resblocks.{layer}")) {
        sink.put(&format!("{layer}.attn.in_proj_weight"), &[3 * hidden, hidden]);
        sink.put(&format!("{layer}.attn.in_proj_bias"), &[3 * hidden]);
        sink.linear(&format!("{layer}.attn.out_proj"), hidden, hidden);
        sink.linear(&format!("{layer}.mlp.c_fc"), 4 * hidden, hidden);
        sink.linear(&format!("{layer}.mlp.c_proj"), hidden, 4 * hidden);
        sink.norm(&format!("{layer}.ln_1"), hidden);
        sink.norm(&format!("{layer}.ln_2"), hidden);
    }
    sink.norm("ln_final", hidden);
}
