//! Which layers stay dense when a component is quantized: those that a step names, found in the way of the library
//! whose configuration names them, and those that the library leaves dense by itself.

/// Whose rules hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Library {
    /// bitsandbytes, through diffusers or transformers.
    #[default]
    BitsAndBytes,
    TorchAo,
    Quanto,
    Sdnq,
}

/// How a name that a step gives leads to modules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Matching {
    /// diffusers with bitsandbytes: a module's own name, its whole path, or text that ends above it.
    #[default]
    EndsAbove,
    /// diffusers with TorchAO: text that ends at the module or above it.
    EndsHere,
    /// diffusers with Quanto: a module's own name.
    OwnName,
    /// SDNQ: a part of the path, the whole path, a beginning after a point, or a pattern with `*`.
    Part,
    /// transformers: a beginning that ends with a part of the path, a pattern with `.*`, or an ending.
    Ends,
}

/// The smallest matrices that are quantized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Smallest {
    pub(super) values: usize,
    pub(super) columns: usize,
}

/// What stays dense.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skip {
    matching: Matching,
    names: Vec<String>,
    smallest: Smallest,
}

/// What SDNQ keeps of a Flux transformer.
const SDNQ_FLUX: [&str; 7] = [
    "single_transformer_blocks.0.norm.linear.weight",
    "time_text_embed",
    "time_embed",
    "context_embedder",
    "x_embedder",
    ".proj_out",
    "norm_out",
];

/// What SDNQ keeps of models that it does not know by name, as far as models of dw have it.
const SDNQ_OTHERS: [&str; 8] =
    [".time_embed", ".context_embedder", ".proj_in", ".proj_out", ".norm_out", "time_text_embed", "pos_embed", "norm"];

impl Skip {
    /// What stays dense of a component of `class`; `named` are the modules that the step names, if it does.
    pub(super) fn new(library: Library, class: &str, named: Option<Vec<String>>) -> Self {
        let (is_named, mut names) = (named.is_some(), named.unwrap_or_default());
        let is_of_transformers = is_of_transformers(class);
        if is_of_transformers {
            names.extend(kept_precise(class).map(str::to_owned));
            // transformers spares the last layer unless other modules are named; SDNQ asks it to in any case.
            if !is_named || library == Library::Sdnq {
                names.extend(last_layer(class).map(str::to_owned));
            }
        }
        if library == Library::Sdnq {
            let kept: &[&str] = if class == "FluxTransformer2DModel" { &SDNQ_FLUX } else { &SDNQ_OTHERS };
            names.extend(kept.iter().map(|name| (*name).to_owned()));
        }
        let matching = match library {
            Library::Sdnq => Matching::Part,
            _ if is_of_transformers => Matching::Ends,
            Library::BitsAndBytes => Matching::EndsAbove,
            Library::TorchAo => Matching::EndsHere,
            Library::Quanto => Matching::OwnName,
        };
        Self { matching, names, smallest: Smallest::default() }
    }

    /// The modules that a step names to SDNQ, and no others.
    pub(super) fn only_named(names: Vec<String>) -> Self {
        Self { matching: Matching::Part, names, smallest: Smallest::default() }
    }

    /// The same, which also spares matrices smaller than this.
    pub(super) fn and_smaller(self, smallest: Smallest) -> Self {
        Self { smallest, ..self }
    }

    /// Whether the layer at `path`, whose weight has this shape, stays dense.
    pub(super) fn includes(&self, path: &str, dims: &[usize]) -> bool {
        let columns = dims.last().copied().unwrap_or(0);
        let is_small = dims.iter().product::<usize>() < self.smallest.values || columns < self.smallest.columns;
        is_small || self.names.iter().any(|name| self.matching.leads(name, path))
    }

    /// Text that differs between those that spare different layers.
    pub(super) fn key(&self) -> String {
        let Smallest { values, columns } = self.smallest;
        let small = if values > 0 || columns > 0 { format!(",<{values}/{columns}") } else { String::new() };
        self.names.iter().map(|name| format!(",-{name}")).collect::<String>() + &small
    }
}

impl Matching {
    /// Whether `name` leads to the module at `path`.
    fn leads(self, name: &str, path: &str) -> bool {
        let own_name = path.rsplit('.').next().unwrap_or(path);
        match self {
            Self::OwnName => name == own_name,
            Self::EndsAbove => name == own_name || name == path || path.contains(&format!("{name}.")),
            Self::EndsHere => format!("{path}.").contains(&format!("{name}.")),
            Self::Part => match name.strip_prefix('.') {
                Some(start) => path.starts_with(start),
                None if name.contains('*') => remainder(name, path).is_some(),
                None => {
                    name.strip_suffix(".weight").unwrap_or(name) == path || path.split('.').any(|part| part == name)
                }
            },
            Self::Ends => {
                let ends_at_part = |rest: &str| rest.is_empty() || rest.starts_with('.') || name.ends_with('.');
                path.ends_with(name)
                    || remainder(&name.replace(".*", "*"), path)
                        .is_some_and(|rest| ends_at_part(rest) || name.ends_with('*'))
            }
        }
    }
}

/// What is left of `text` after a beginning that has the form of `pattern`, in which `*` stands for anything.
fn remainder<'a>(pattern: &str, text: &'a str) -> Option<&'a str> {
    let Some((start, after)) = pattern.split_once('*') else { return text.strip_prefix(pattern) };
    let rest = text.strip_prefix(start)?;
    let starts = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
    starts.into_iter().find_map(|at| remainder(after, &rest[at..]))
}

/// Whether a component is a model of transformers; all others are of diffusers.
fn is_of_transformers(class: &str) -> bool {
    ["T5", "CLIP", "Siglip"].iter().any(|start| class.starts_with(start))
}

/// Layers that transformers never quantizes.
fn kept_precise(class: &str) -> Option<&'static str> {
    class.starts_with("T5").then_some("wo")
}

/// The layer with a model's last parameters.
fn last_layer(class: &str) -> Option<&'static str> {
    match class {
        "CLIPTextModelWithProjection" => Some("text_projection"),
        "CLIPVisionModelWithProjection" => Some("visual_projection"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_leads_where_its_library_has_it_lead() {
        let query = "transformer_blocks.0.attn.to_q";
        for (matching, name, path, expected) in [
            (Matching::EndsAbove, "to_q", query, true),
            (Matching::EndsAbove, "attn", query, true),
            // Unlike the others, a name with points does not lead to the module at its end.
            (Matching::EndsAbove, "attn.to_q", query, false),
            (Matching::EndsAbove, "context", "transformer_blocks.0.ff_context.net.2", true),
            (Matching::EndsAbove, "norm", "transformer_blocks.0.norm1.linear", false),
            (Matching::EndsHere, "attn.to_q", query, true),
            (Matching::EndsHere, "to", query, false),
            (Matching::OwnName, "to_q", query, true),
            (Matching::OwnName, "attn", query, false),
            (Matching::Part, "attn", query, true),
            (Matching::Part, "attn.to_q", query, false),
            (Matching::Part, "transformer_blocks.0.attn.to_q.weight", query, true),
            (Matching::Part, ".proj_out", "proj_out", true),
            (Matching::Part, ".proj_out", "single_transformer_blocks.0.proj_out", false),
            (Matching::Part, "transformer_blocks.*.to_q", query, true),
            (Matching::Ends, "wo", "encoder.block.0.layer.1.DenseReluDense.wo", true),
            (Matching::Ends, "encoder.block.1", "encoder.block.1.layer.0.SelfAttention.q", true),
            (Matching::Ends, "encoder.block.1", "encoder.block.11.layer.0.SelfAttention.q", false),
            (Matching::Ends, "encoder.block.*.q", "encoder.block.11.layer.0.SelfAttention.q", true),
            (Matching::Ends, "encoder.block.*.q", "encoder.block.11.layer.0.SelfAttention.k", false),
        ] {
            assert_eq!(matching.leads(name, path), expected, "{matching:?} {name} {path}");
        }
    }

    #[test]
    fn libraries_spare_layers_of_their_own() {
        let wo = "encoder.block.0.layer.1.DenseReluDense.wo";
        let named = || Some(vec!["layer.0".to_owned()]);
        for (library, class, named, path, expected) in [
            (Library::BitsAndBytes, "T5EncoderModel", None, wo, true),
            (Library::BitsAndBytes, "T5EncoderModel", named(), wo, true),
            (Library::TorchAo, "T5EncoderModel", None, wo, true),
            (Library::BitsAndBytes, "CLIPTextModelWithProjection", None, "text_projection", true),
            (Library::BitsAndBytes, "CLIPTextModelWithProjection", named(), "text_projection", false),
            (Library::Sdnq, "CLIPTextModelWithProjection", named(), "text_projection", true),
            (Library::BitsAndBytes, "FluxTransformer2DModel", None, "proj_out", false),
            (Library::Sdnq, "FluxTransformer2DModel", None, "proj_out", true),
            (Library::Sdnq, "SD3Transformer2DModel", None, "time_text_embed.text_embedder.linear_1", true),
        ] {
            let skip = Skip::new(library, class, named);
            assert_eq!(skip.includes(path, &[64, 64]), expected, "{library:?} {class} {path}");
        }
        let skip = Skip::default().and_smaller(Smallest { values: 4096, columns: 32 });
        assert!(skip.includes("a", &[64, 63]) && skip.includes("a", &[1024, 16]) && !skip.includes("a", &[64, 64]));
    }
}
