//! The text encoders of an original checkpoint. OpenCLIP's names, fused projections and transposed text projection
//! become transformers' (`convert_open_clip_checkpoint` in diffusers' `single_file_utils.py`); encoders that were
//! transformers' already keep their names.

use super::{
    index::{Tensors, count},
    key_map::{Change, KeyMap},
};

/// The parts of an encoder layer: original, canonical. The fused projection is apart.
const LAYER: [(&str, &str); 5] = [
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
];

/// The names of an OpenCLIP text encoder with `layers` layers in the original and in transformers.
pub(crate) fn open_clip_key_map(layers: usize, has_projection: bool) -> KeyMap {
    let mut map = KeyMap::default();
    let position = "text_model.embeddings.position_embedding.weight";
    map.tensor("positional_embedding", position, Change::None);
    map.module("token_embedding", "text_model.embeddings.token_embedding");
    map.module("ln_final", "text_model.final_layer_norm");
    if has_projection {
        map.tensor("text_projection", "text_projection.weight", Change::Transpose);
    }
    for layer in 0..layers {
        let (from, to) = (format!("transformer.resblocks.{layer}"), format!("text_model.encoder.layers.{layer}"));
        for (old, new) in LAYER {
            map.module(format!("{from}.{old}"), format!("{to}.{new}"));
        }
        for (part, name) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
            for kind in ["weight", "bias"] {
                let fused = format!("{from}.attn.in_proj_{kind}");
                map.tensor(fused, format!("{to}.self_attn.{name}.{kind}"), Change::Third(part));
            }
        }
    }
    map
}

/// How many layers an OpenCLIP text encoder has in the file.
pub(crate) fn open_clip_layers(tensors: &Tensors<'_>) -> usize {
    count(|layer| tensors.has(&format!("transformer.resblocks.{layer}.ln_1.weight")))
}

/// How many layers a text encoder under transformers' names has in the file; `root` is empty or `text_model.`.
pub(crate) fn clip_layers(tensors: &Tensors<'_>, root: &str) -> usize {
    count(|layer| tensors.has(&format!("{root}encoder.layers.{layer}.layer_norm1.weight")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_openclip_become_those_of_transformers() {
        let map = open_clip_key_map(2, true);
        for (original, canonical) in [
            ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
            ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
            ("ln_final.bias", "text_model.final_layer_norm.bias"),
            ("transformer.resblocks.1.ln_2.weight", "text_model.encoder.layers.1.layer_norm2.weight"),
            ("transformer.resblocks.0.mlp.c_fc.bias", "text_model.encoder.layers.0.mlp.fc1.bias"),
            ("transformer.resblocks.0.mlp.c_proj.weight", "text_model.encoder.layers.0.mlp.fc2.weight"),
            ("transformer.resblocks.0.attn.out_proj.bias", "text_model.encoder.layers.0.self_attn.out_proj.bias"),
        ] {
            let targets = map.canonical(original);
            assert_eq!((targets.len(), targets[0].name.as_str()), (1, canonical));
            assert_eq!(map.original(canonical).as_deref(), Some(original));
        }
        assert!(map.canonical("transformer.resblocks.2.ln_1.weight").is_empty());
    }

    #[test]
    fn the_fused_projection_is_split_into_query_key_and_value() {
        let map = open_clip_key_map(1, true);
        let targets = map.canonical("transformer.resblocks.0.attn.in_proj_weight");
        let found: Vec<_> = targets.iter().map(|target| (target.name.as_str(), target.change)).collect();
        let layer = "text_model.encoder.layers.0.self_attn";
        let expected = ["q_proj", "k_proj", "v_proj"].map(|name| format!("{layer}.{name}.weight"));
        assert_eq!(
            found,
            [(&*expected[0], Change::Third(0)), (&*expected[1], Change::Third(1)), (&*expected[2], Change::Third(2))]
        );
        assert_eq!(
            map.original(&format!("{layer}.k_proj.bias")).as_deref(),
            Some("transformer.resblocks.0.attn.in_proj_bias")
        );
    }

    #[test]
    fn the_text_projection_is_transposed_where_the_encoder_has_one() {
        let change = |has| open_clip_key_map(1, has).canonical("text_projection").first().map(|target| target.change);
        assert_eq!((change(true), change(false)), (Some(Change::Transpose), None));
    }
}
