//! The original names of a UNet's modules (CompVis `openaimodel.py`, as SGM kept them for SDXL): every residual block,
//! resampling and attention has a number in one of two lists, `input_blocks` and `output_blocks`.
//!
//! The numbers follow from how many blocks the model has, which is read off the model's own names; no size is
//! assumed.

use std::collections::BTreeSet;

/// Modules outside the numbered lists.
const ENDS: &[(&str, &str)] = &[
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("class_embedding.linear_1", "label_emb.0.0"),
    ("class_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];

/// Modules inside a residual block.
const RESNET: &[(&str, &str)] = &[
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

/// The original names of `modules` (paths with dots), each with the module it names.
pub(crate) fn names<'a>(modules: &BTreeSet<&'a str>) -> Vec<(String, &'a str)> {
    let blocks = numbered_blocks(modules);
    let block_of = |module: &str| {
        blocks.iter().find_map(|(block, original)| {
            let rest = module.strip_prefix(block.as_str())?;
            if rest.is_empty() {
                return Some(original.clone());
            }
            Some(format!("{original}.{}", inner_name(block, rest.strip_prefix('.')?)))
        })
    };
    modules.iter().filter_map(|module| Some((block_of(module)?, *module))).collect()
}

/// A module's name inside its block; transformers are named alike on both sides.
fn inner_name<'a>(block: &str, name: &'a str) -> &'a str {
    let is_resnet = block.contains(".resnets.");
    RESNET.iter().find(|(inner, _)| is_resnet && *inner == name).map_or(name, |(_, original)| original)
}

/// Each block's path and its original one.
fn numbered_blocks(modules: &BTreeSet<&str>) -> Vec<(String, String)> {
    let has = |block: &str| {
        let inside = format!("{block}.");
        modules.range(inside.as_str()..).next().is_some_and(|module| module.starts_with(&inside))
    };
    let mut blocks: Vec<(String, String)> =
        ENDS.iter().map(|(block, original)| ((*block).to_owned(), (*original).to_owned())).collect();
    // The first entry of the list is the first convolution.
    let mut number = 1;
    for level in (0..).map(|level| format!("down_blocks.{level}")).take_while(|level| has(level)) {
        for layer in (0..).take_while(|layer| has(&format!("{level}.resnets.{layer}"))) {
            blocks.push((format!("{level}.resnets.{layer}"), format!("input_blocks.{number}.0")));
            blocks.push((format!("{level}.attentions.{layer}"), format!("input_blocks.{number}.1")));
            number += 1;
        }
        if has(&format!("{level}.downsamplers.0")) {
            blocks.push((format!("{level}.downsamplers.0.conv"), format!("input_blocks.{number}.0.op")));
            number += 1;
        }
    }
    number = 0;
    for level in (0..).map(|level| format!("up_blocks.{level}")).take_while(|level| has(level)) {
        for layer in (0..).take_while(|layer| has(&format!("{level}.resnets.{layer}"))) {
            blocks.push((format!("{level}.resnets.{layer}"), format!("output_blocks.{number}.0")));
            blocks.push((format!("{level}.attentions.{layer}"), format!("output_blocks.{number}.1")));
            number += 1;
        }
        // The upsampling shares the entry of the last residual block, behind its attention if there is one.
        let place = if has(&format!("{level}.attentions.0")) { 2 } else { 1 };
        let last = number - 1;
        blocks.push((format!("{level}.upsamplers.0.conv"), format!("output_blocks.{last}.{place}.conv")));
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The modules of a model with these levels: `(residual blocks on the way down, has attention)`.
    fn modules(levels: &[(usize, bool)]) -> Vec<String> {
        let mut modules: Vec<String> = ["conv_in", "time_embedding.linear_2", "conv_out"].map(str::to_owned).into();
        let mut add = |way: &str, level: usize, layers: usize, attends: bool| {
            for layer in 0..layers {
                modules.push(format!("{way}.{level}.resnets.{layer}.conv1"));
                if attends {
                    modules.push(format!("{way}.{level}.attentions.{layer}.proj_in"));
                }
            }
        };
        for (level, &(layers, attends)) in levels.iter().enumerate() {
            add("down_blocks", level, layers, attends);
            add("up_blocks", levels.len() - 1 - level, layers + 1, attends);
        }
        for level in 0..levels.len() - 1 {
            modules.push(format!("down_blocks.{level}.downsamplers.0.conv"));
            modules.push(format!("up_blocks.{level}.upsamplers.0.conv"));
        }
        modules
    }

    fn original(levels: &[(usize, bool)], module: &str) -> Option<String> {
        let modules = modules(levels);
        let modules: BTreeSet<&str> = modules.iter().map(String::as_str).collect();
        names(&modules).into_iter().find(|(_, of)| *of == module).map(|(original, _)| original)
    }

    fn are(levels: &[(usize, bool)], expected: &[(&str, &str)]) {
        for (module, name) in expected {
            assert_eq!(original(levels, module).as_deref(), Some(*name), "{module}");
        }
    }

    #[test]
    fn blocks_of_a_model_like_sdxl_have_the_numbers_of_its_files() {
        are(
            &[(2, false), (2, true), (2, true)],
            &[
                ("conv_in", "input_blocks.0.0"),
                ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
                ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
                ("down_blocks.2.resnets.1.conv1", "input_blocks.8.0.in_layers.2"),
                ("up_blocks.0.attentions.2.proj_in", "output_blocks.2.1.proj_in"),
                ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
                ("up_blocks.2.resnets.2.conv1", "output_blocks.8.0.in_layers.2"),
                ("time_embedding.linear_2", "time_embed.2"),
            ],
        );
    }

    #[test]
    fn blocks_of_a_model_like_sd15_have_the_numbers_of_its_files() {
        are(
            &[(2, true), (2, true), (2, true), (2, false)],
            &[
                ("down_blocks.0.attentions.0.proj_in", "input_blocks.1.1.proj_in"),
                ("down_blocks.3.resnets.1.conv1", "input_blocks.11.0.in_layers.2"),
                ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
                ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
                ("up_blocks.3.attentions.2.proj_in", "output_blocks.11.1.proj_in"),
            ],
        );
    }

    #[test]
    fn numbers_follow_the_number_of_residual_blocks() {
        are(
            &[(1, false), (3, true)],
            &[
                ("down_blocks.1.attentions.2.proj_in", "input_blocks.5.1.proj_in"),
                ("up_blocks.1.resnets.0.conv1", "output_blocks.4.0.in_layers.2"),
            ],
        );
    }
}
