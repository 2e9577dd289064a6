//! The names that llama.cpp gives the tensors of a T5 encoder, in transformers' names.

/// Modules beside the blocks.
const OUTSIDE: [(&str, &str); 2] = [("token_embd", "shared"), ("enc.output_norm", "encoder.final_layer_norm")];

/// Modules of a block.
const INSIDE: [(&str, &str); 10] = [
    ("attn_norm", "layer.0.layer_norm"),
    ("attn_q", "layer.0.SelfAttention.q"),
    ("attn_k", "layer.0.SelfAttention.k"),
    ("attn_v", "layer.0.SelfAttention.v"),
    ("attn_o", "layer.0.SelfAttention.o"),
    ("attn_rel_b", "layer.0.SelfAttention.relative_attention_bias"),
    ("ffn_norm", "layer.1.layer_norm"),
    ("ffn_gate", "layer.1.DenseReluDense.wi_0"),
    ("ffn_up", "layer.1.DenseReluDense.wi_1"),
    ("ffn_down", "layer.1.DenseReluDense.wo"),
];

/// What a tensor of llama.cpp is called in transformers; none for one that is no part of an encoder. `is_gated` says
/// whether the feed-forward has two inner layers, as in version 1.1.
pub(super) fn canonical(name: &str, is_gated: bool) -> Option<String> {
    let (module, ending) = name.rsplit_once('.')?;
    let find = |table: &[(&'static str, &'static str)], name: &str| {
        table.iter().find(|(known, _)| *known == name).map(|(_, canonical)| *canonical)
    };
    if let Some(canonical) = find(&OUTSIDE, module) {
        return Some(format!("{canonical}.{ending}"));
    }
    let (block, inside) = module.strip_prefix("enc.blk.")?.split_once('.')?;
    let canonical = match find(&INSIDE, inside)? {
        "layer.1.DenseReluDense.wi_1" if !is_gated => "layer.1.DenseReluDense.wi",
        canonical => canonical,
    };
    Some(format!("encoder.block.{block}.{canonical}.{ending}"))
}

/// Whether these are the names of a T5 encoder in llama.cpp, and whether its feed-forward is gated.
pub(super) fn recognise(has: impl Fn(&str) -> bool) -> Option<bool> {
    (has("enc.blk.0.attn_q.weight") && has("token_embd.weight")).then(|| has("enc.blk.0.ffn_gate.weight"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tensor_of_an_encoder_has_its_name() {
        for (name, expected) in [
            ("token_embd.weight", "shared.weight"),
            ("enc.output_norm.weight", "encoder.final_layer_norm.weight"),
            ("enc.blk.0.attn_rel_b.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
            ("enc.blk.23.attn_q.weight", "encoder.block.23.layer.0.SelfAttention.q.weight"),
            ("enc.blk.3.ffn_up.weight", "encoder.block.3.layer.1.DenseReluDense.wi_1.weight"),
            ("enc.blk.3.ffn_down.weight", "encoder.block.3.layer.1.DenseReluDense.wo.weight"),
        ] {
            assert_eq!(canonical(name, true).as_deref(), Some(expected));
        }
        assert_eq!(
            canonical("enc.blk.3.ffn_up.weight", false).as_deref(),
            Some("encoder.block.3.layer.1.DenseReluDense.wi.weight")
        );
        assert_eq!(canonical("dec.blk.0.attn_q.weight", true), None);
        assert_eq!(recognise(|name| name != "enc.blk.0.ffn_gate.weight"), Some(false));
        assert_eq!(recognise(|name| name == "token_embd.weight"), None);
    }
}
