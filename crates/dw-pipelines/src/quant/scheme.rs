//! What a step's `quantization_config` means: which storage format, for which layers.
//!
//! Owns the reading of the classes that Python libraries offer. bitsandbytes' formats are stored as they are; those of
//! TorchAO, Quanto and SDNQ become the nearest storage here, and a message says which. Computing is always done with
//! dequantized weights, so settings about activations and kernels change nothing.

use candle_core::{DType, Tensor, quantized::GgmlDType};
use serde_json::{Map, Value};

use super::{
    Format, Quantized, Skip, Weight,
    skip::{Library, Smallest},
};
use crate::{Error, Result};

/// Whole numbers of 4 bits with a scale and a minimum for each group.
const Q4_1: Format = Format::Ggml(GgmlDType::Q4_1);

/// The arguments of `BitsAndBytesConfig`. Those that are not read act on activations, or on the form of storage.
const BITS_AND_BYTES: [&str; 11] = [
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "compute_dtype",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
];

/// Under this key most libraries take the modules that stay dense.
const SPARED: &str = "modules_to_not_convert";

/// The parts of names behind which there is a table of vectors, not a layer.
const TABLES: [&str; 8] = [
    "token_embedding",
    "position_embedding",
    "embed_tokens",
    "shared",
    "relative_attention_bias",
    "class_embedding",
    "controlnet_mode_embedder",
    "wte",
];

/// `quantization_config` of a component.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizationRequest {
    /// The class, `BitsAndBytesConfig` for example; a module before it plays no part.
    pub class: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
    /// The type that the arguments name for computing.
    pub compute_dtype: Option<DType>,
}

/// How the layers of a component are stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Scheme {
    /// The format dense weights are brought into; none where the file decides (GGUF).
    pub format: Option<Format>,
    /// Whether the scales of 4-bit types are rounded too.
    pub double: bool,
    /// What stays dense.
    pub skip: Skip,
    /// What the user should know about it, if anything.
    pub message: Option<String>,
}

impl Scheme {
    /// All layers in one format.
    pub fn plain(format: Format) -> Self {
        Self { format: Some(format), double: false, skip: Skip::default(), message: None }
    }

    /// The layers of a component of `class` in one format, as its checkpoints hold them: those of bitsandbytes' formats
    /// are read by transformers, which has some layers dense.
    pub fn of_checkpoint(format: Format, class: &str) -> Self {
        let skip = match format {
            Format::Nf4 | Format::Fp4 | Format::Int8 => Skip::new(Library::BitsAndBytes, class, None),
            Format::Ggml(_) | Format::Float8 => Skip::default(),
        };
        Self { skip, ..Self::plain(format) }
    }

    /// What `request` asks for, of a component of the class `component`.
    pub fn of(request: &QuantizationRequest, component: &str) -> Result<Self> {
        let class = request.class.rsplit('.').next().unwrap_or_default();
        let arguments = Arguments(&request.arguments);
        match class {
            "GGUFQuantizationConfig" => Ok(Self { format: None, double: false, skip: Skip::default(), message: None }),
            "BitsAndBytesConfig" => bits_and_bytes(arguments, component),
            "TorchAoConfig" => {
                let skip = Skip::new(Library::TorchAo, component, arguments.texts(SPARED)?);
                nearest(class, ("quant_type", None), arguments, skip, torch_ao)
            }
            "QuantoConfig" => {
                let skip = Skip::new(Library::Quanto, component, arguments.texts(SPARED)?);
                let key = ("weights_dtype", Some("int8"));
                nearest(class, key, arguments, skip, |name| integer_bits(name, false))
            }
            "SDNQConfig" => {
                nearest(class, ("weights_dtype", Some("int8")), arguments, spared_by_sdnq(arguments, component)?, sdnq)
            }
            _ => Err(Error::Unsupported(format!(
                "`{}` is no quantization that dw knows; use `BitsAndBytesConfig`, `GGUFQuantizationConfig` (with \
                 `from_single_file`), `TorchAoConfig`, `QuantoConfig` or `SDNQConfig`",
                request.class
            ))),
        }
    }

    /// Text that differs between schemes that give different weights.
    pub(crate) fn key(&self) -> String {
        let format = self.format.map_or_else(|| String::from("as stored"), |format| format.to_string());
        format!("{format}{}{}", if self.double { ",double" } else { "" }, self.skip.key())
    }

    /// Whether the tensor `name` is the weight of a layer that is quantized.
    pub(crate) fn covers(&self, name: &str, dims: &[usize]) -> bool {
        let Some(path) = name.strip_suffix(".weight") else { return false };
        let last = path.rsplit('.').next().unwrap_or(path);
        dims.len() == 2 && !TABLES.contains(&last) && !self.skip.includes(path, dims)
    }

    /// How many bytes the weight `name` takes in the format of the scheme; none where it stays dense.
    pub(crate) fn bytes(&self, name: &str, dims: &[usize]) -> Option<u64> {
        let (rows, columns) = match *dims {
            [rows, columns] if self.covers(name, dims) => (rows, columns),
            _ => return None,
        };
        Some(self.format?.fitting(columns)?.bytes(rows, columns))
    }

    /// The weight `name` in the format of the scheme, where it covers it; any other as it is.
    pub(crate) fn apply(&self, name: &str, weight: Weight) -> Result<Weight> {
        let (Some(format), Weight::Dense(dense)) = (self.format, &weight) else { return Ok(weight) };
        if !dense.dtype().is_float() || !self.covers(name, dense.dims()) {
            return Ok(weight);
        }
        let Some(format) = format.fitting(dense.dim(1)?) else { return Ok(weight) };
        Ok(Weight::Quantized(Quantized::quantize(&as_float(dense)?, format, self.double)?))
    }
}

/// candle quantizes from f32.
fn as_float(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_dtype(DType::F32)?.contiguous()?)
}

/// The arguments of a configuration class.
#[derive(Clone, Copy)]
struct Arguments<'a>(&'a Map<String, Value>);

impl Arguments<'_> {
    fn is_set(self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| value == &Value::Bool(true))
    }

    /// What to say of arguments that are none of these; nothing when there are no such.
    fn unknown(self, known: &[&str]) -> Option<String> {
        let unknown: Vec<String> =
            self.0.keys().filter(|key| !known.contains(&key.as_str())).map(|key| format!("`{key}`")).collect();
        let text = unknown.join(", ");
        (!unknown.is_empty())
            .then(|| format!("`quantization_config` has no argument {text}; what it says has no effect"))
    }

    /// A text without the braces that keep it from naming a type.
    fn text(self, name: &str) -> Option<String> {
        let value = self.0.get(name)?;
        let text = value.as_str().or_else(|| value.pointer("/type").and_then(Value::as_str))?;
        Some(text.trim().trim_matches(['{', '}']).to_owned())
    }

    /// A whole number that is not negative.
    fn count(self, name: &str) -> Result<Option<usize>> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64().and_then(|count| usize::try_from(count).ok()) {
                Some(count) => Ok(Some(count)),
                None => Err(Error::Argument {
                    name: name.to_owned(),
                    reason: format!("must be a whole number, found `{value}`"),
                }),
            },
        }
    }

    /// A list of texts, or one text; none when there is none.
    fn texts(self, name: &str) -> Result<Option<Vec<String>>> {
        let wrong = |value: &Value| Error::Argument {
            name: name.to_owned(),
            reason: format!("must be a list of module names, found `{value}`"),
        };
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(one)) => Ok(Some(vec![one.clone()])),
            Some(Value::Array(list)) => {
                let text = |item: &Value| item.as_str().map(str::to_owned).ok_or_else(|| wrong(item));
                list.iter().map(text).collect::<Result<_>>().map(Some)
            }
            Some(other) => Err(wrong(other)),
        }
    }
}

fn bits_and_bytes(arguments: Arguments<'_>, component: &str) -> Result<Scheme> {
    let skip = Skip::new(Library::BitsAndBytes, component, arguments.texts("llm_int8_skip_modules")?);
    let format = match (arguments.is_set("load_in_4bit"), arguments.is_set("load_in_8bit")) {
        (true, false) => match arguments.text("bnb_4bit_quant_type").as_deref() {
            Some("nf4") => Format::Nf4,
            // bitsandbytes' default.
            Some("fp4") | None => Format::Fp4,
            Some(other) => {
                return Err(Error::Argument {
                    name: "bnb_4bit_quant_type".into(),
                    reason: format!("is `nf4` or `fp4`, found `{other}`"),
                });
            }
        },
        (false, true) => Format::Int8,
        (both, _) => {
            let found = if both { "both" } else { "neither" };
            return Err(Error::Argument {
                name: "quantization_config".into(),
                reason: format!("`BitsAndBytesConfig` takes one of `load_in_4bit` and `load_in_8bit`, found {found}"),
            });
        }
    };
    let double = format != Format::Int8 && arguments.is_set("bnb_4bit_use_double_quant");
    Ok(Scheme { format: Some(format), double, skip, message: arguments.unknown(&BITS_AND_BYTES) })
}

/// What SDNQ leaves dense: layers by name, and small ones.
fn spared_by_sdnq(arguments: Arguments<'_>, component: &str) -> Result<Skip> {
    let named = arguments.texts(SPARED)?;
    let skip = if arguments.0.get("add_skip_keys") == Some(&Value::Bool(false)) {
        Skip::only_named(named.unwrap_or_default())
    } else {
        Skip::new(Library::Sdnq, component, named)
    };
    Ok(skip.and_smaller(Smallest {
        values: arguments.count("minimum_allowed_numel")?.unwrap_or(1 << 14),
        columns: arguments.count("minimum_allowed_channel_size")?.unwrap_or(32),
    }))
}

/// A configuration that names a type under `key`, or has a usual one, which becomes the format that `known` says.
fn nearest(
    class: &str,
    (key, usual): (&str, Option<&str>),
    arguments: Arguments<'_>,
    skip: Skip,
    known: impl Fn(&str) -> Option<Format>,
) -> Result<Scheme> {
    let wrong = |reason: String| Error::Argument { name: key.to_owned(), reason };
    let Some(name) = arguments.text(key).or(usual.map(str::to_owned)) else {
        return Err(wrong(format!("`{class}` must name the stored type here")));
    };
    let short = name.rsplit('.').next().unwrap_or(&name);
    let format = known(short).ok_or_else(|| {
        let formats = Format::names().collect::<Vec<_>>().join("`, `");
        wrong(format!(
            "`{name}` of `{class}` has no counterpart in dw; name another type, or quantize with `dw quantize` to one \
             of `{formats}`"
        ))
    })?;
    let convolutions = if arguments.is_set("quant_conv") { " Convolutions stay as they are." } else { "" };
    let message = Some(format!(
        "`{class}` with `{short}`: weights of linear layers are stored as `{format}`, the nearest format of dw; \
         activations are not quantized.{convolutions}"
    ));
    Ok(Scheme { format: Some(format), double: false, skip, message })
}

/// TorchAO's configuration classes and their short names, which may name the type of activations before that of
/// weights.
fn torch_ao(name: &str) -> Option<Format> {
    let name = name.trim_end_matches("Config").to_ascii_lowercase().replace('_', "");
    let before_weight = name.rsplit_once("weight").map_or(name.as_str(), |(before, _)| before);
    let types =
        [("float8", Format::Float8), ("fp8", Format::Float8), ("uint4", Q4_1), ("int4", Q4_1), ("int8", Format::Int8)];
    let is_short =
        |known: &str| name.strip_prefix(known).is_some_and(|rest| rest.starts_with("wo") || rest.starts_with("dq"));
    let fits = |(known, _): &&(&str, Format)| before_weight.ends_with(known) || is_short(known);
    types.iter().find(fits).map(|(_, format)| *format)
}

/// Names like `int8`, `uint4` or `float8_e4m3fn`. `minimum` tells whether signed 4-bit types have none.
fn integer_bits(name: &str, signed_without_minimum: bool) -> Option<Format> {
    let is_signed = name.starts_with("int");
    let ggml = |dtype: GgmlDType| Some(Format::Ggml(dtype));
    let name = name.trim_start_matches('q');
    match name.trim_start_matches('u') {
        "int8" | "int7" => Some(Format::Int8),
        "int6" => ggml(GgmlDType::Q6K),
        "int5" => ggml(if is_signed && signed_without_minimum { GgmlDType::Q5_0 } else { GgmlDType::Q5_1 }),
        "int4" => ggml(if is_signed && signed_without_minimum { GgmlDType::Q4_0 } else { GgmlDType::Q4_1 }),
        "int3" => ggml(GgmlDType::Q3K),
        "int2" => ggml(GgmlDType::Q2K),
        float if float.starts_with("float8") => Some(Format::Float8),
        _ => None,
    }
}

/// SDNQ's types: signed ones are symmetric, unsigned ones have a minimum.
fn sdnq(name: &str) -> Option<Format> {
    integer_bits(name, true).or_else(|| (name == "fp8").then_some(Format::Float8))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scheme(class: &str, arguments: Value) -> Result<Scheme> {
        let Value::Object(arguments) = arguments else { panic!("arguments are an object") };
        let request = QuantizationRequest { class: class.to_owned(), arguments, compute_dtype: None };
        Scheme::of(&request, "FluxTransformer2DModel")
    }

    #[test]
    fn bits_and_bytes_is_stored_as_it_is_named() {
        for (arguments, format, double) in [
            (json!({"load_in_4bit": true, "bnb_4bit_quant_type": "{nf4}"}), Format::Nf4, false),
            (json!({"load_in_4bit": true, "bnb_4bit_use_double_quant": true}), Format::Fp4, true),
            (json!({"load_in_8bit": true}), Format::Int8, false),
        ] {
            let found = scheme("transformers.BitsAndBytesConfig", arguments).expect("known");
            assert_eq!((found.format, found.double, found.message), (Some(format), double, None));
        }
    }

    #[test]
    fn other_libraries_become_the_nearest_format_and_say_so() {
        for (class, arguments, format) in [
            ("TorchAoConfig", json!({"quant_type": "torchao.quantization.Int8WeightOnlyConfig"}), "int8"),
            ("TorchAoConfig", json!({"quant_type": "int4_weight_only"}), "q4_1"),
            ("TorchAoConfig", json!({"quant_type": "Float8DynamicActivationFloat8WeightConfig"}), "fp8"),
            ("TorchAoConfig", json!({"quant_type": "Int8DynamicActivationInt4WeightConfig"}), "q4_1"),
            ("TorchAoConfig", json!({"quant_type": "int8dq"}), "int8"),
            ("QuantoConfig", json!({"weights_dtype": "int2"}), "q2_k"),
            ("QuantoConfig", json!({}), "int8"),
            ("SDNQConfig", json!({}), "int8"),
            ("sdnq.SDNQConfig", json!({"weights_dtype": "{int4}"}), "q4_0"),
            ("sdnq.SDNQConfig", json!({"weights_dtype": "uint4", "quant_conv": true}), "q4_1"),
        ] {
            let found = scheme(class, arguments).expect("known");
            assert_eq!(found.format.map(|format| format.to_string()).as_deref(), Some(format));
            let message = found.message.expect("it is said");
            assert!(message.contains(&format!("`{format}`")), "{message}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_what_can() {
        for (class, arguments, said) in [
            ("AwqConfig", json!({}), "BitsAndBytesConfig"),
            ("BitsAndBytesConfig", json!({}), "found neither"),
            ("BitsAndBytesConfig", json!({"load_in_4bit": true, "load_in_8bit": true}), "found both"),
            ("BitsAndBytesConfig", json!({"load_in_4bit": true, "bnb_4bit_quant_type": "int4"}), "`nf4` or `fp4`"),
            ("TorchAoConfig", json!({"quant_type": "Gemlite"}), "has no counterpart"),
            ("TorchAoConfig", json!({}), "must name the stored type"),
            ("SDNQConfig", json!({"minimum_allowed_numel": "few"}), "must be a whole number"),
            ("SDNQConfig", json!({"weights_dtype": "int8", "modules_to_not_convert": 3}), "list of module names"),
        ] {
            let message = scheme(class, arguments).expect_err("refused").to_string();
            assert!(message.contains(said), "{message}");
        }
    }

    #[test]
    fn layers_are_covered_and_tables_norms_and_skipped_modules_are_not() {
        let arguments = json!({"load_in_4bit": true, "llm_int8_skip_modules": ["proj_out", "time.embed"]});
        let scheme = scheme("BitsAndBytesConfig", arguments).expect("known");
        assert!(scheme.covers("blocks.0.to_q.weight", &[8, 4]));
        for (name, dims) in [
            ("blocks.0.to_q.bias", &[8, 4][..]),
            ("norm.weight", &[8]),
            ("conv.weight", &[8, 4, 3, 3]),
            ("text_model.embeddings.token_embedding.weight", &[8, 4]),
            ("shared.weight", &[8, 4]),
            ("blocks.0.proj_out.weight", &[8, 4]),
            ("time.embed.linear.weight", &[8, 4]),
        ] {
            assert!(!scheme.covers(name, dims), "{name}");
        }
    }
}
