//! What a step's `quantization_config` means: which storage format, for which layers.
//!
//! Owns the reading of the classes that Python libraries offer. bitsandbytes' formats are stored as they are; those of
//! TorchAO, Quanto and SDNQ become the nearest storage here, and a message says which. Computing is always done with
//! dequantized weights, so settings about activations and kernels change nothing.

use candle_core::{DType, Tensor, quantized::GgmlDType};
use serde_json::{Map, Value};

use super::{Format, Quantized, Weight};
use crate::{Error, Result};

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
    /// Paths of modules that stay dense.
    pub skip: Vec<String>,
    /// What the user should know about it, if anything.
    pub message: Option<String>,
}

impl Scheme {
    /// All layers in one format.
    pub fn plain(format: Format) -> Self {
        Self { format: Some(format), double: false, skip: Vec::new(), message: None }
    }

    /// What `request` asks for.
    pub fn of(request: &QuantizationRequest) -> Result<Self> {
        let class = request.class.rsplit('.').next().unwrap_or_default();
        let arguments = Arguments(&request.arguments);
        match class {
            "GGUFQuantizationConfig" => Ok(Self { format: None, double: false, skip: Vec::new(), message: None }),
            "BitsAndBytesConfig" => bits_and_bytes(arguments),
            "TorchAoConfig" => nearest(class, "quant_type", arguments, torch_ao),
            "QuantoConfig" => nearest(class, "weights_dtype", arguments, |name| integer_bits(name, false)),
            "SDNQConfig" => nearest(class, "weights_dtype", arguments, sdnq),
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
        format!(
            "{format}{}{}",
            if self.double { ",double" } else { "" },
            self.skip.iter().map(|path| format!(",-{path}")).collect::<String>()
        )
    }

    /// Whether the tensor `name` is the weight of a layer that is quantized.
    pub(crate) fn covers(&self, name: &str, dims: &[usize]) -> bool {
        let Some(path) = name.strip_suffix(".weight") else { return false };
        let last = path.rsplit('.').next().unwrap_or(path);
        let is_skipped = |skip: &String| {
            path == skip || path.starts_with(&format!("{skip}.")) || last == skip || path.contains(&format!(".{skip}."))
        };
        dims.len() == 2 && !TABLES.contains(&last) && !self.skip.iter().any(is_skipped)
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

    /// A text without the braces that keep it from naming a type.
    fn text(self, name: &str) -> Option<String> {
        let value = self.0.get(name)?;
        let text = value.as_str().or_else(|| value.pointer("/type").and_then(Value::as_str))?;
        Some(text.trim().trim_matches(['{', '}']).to_owned())
    }

    /// A list of texts, or one text.
    fn texts(self, name: &str) -> Result<Vec<String>> {
        let wrong = |value: &Value| Error::Argument {
            name: name.to_owned(),
            reason: format!("must be a list of module names, found `{value}`"),
        };
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::String(one)) => Ok(vec![one.clone()]),
            Some(Value::Array(list)) => {
                list.iter().map(|item| item.as_str().map(str::to_owned).ok_or_else(|| wrong(item))).collect()
            }
            Some(other) => Err(wrong(other)),
        }
    }
}

fn bits_and_bytes(arguments: Arguments<'_>) -> Result<Scheme> {
    let skip = arguments.texts("llm_int8_skip_modules")?;
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
    Ok(Scheme { format: Some(format), double, skip, message: None })
}

/// A configuration that names a type under `key`, which becomes the format that `known` says.
fn nearest(class: &str, key: &str, arguments: Arguments<'_>, known: impl Fn(&str) -> Option<Format>) -> Result<Scheme> {
    let wrong = |reason: String| Error::Argument { name: key.to_owned(), reason };
    let Some(name) = arguments.text(key) else {
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
    Ok(Scheme { format: Some(format), double: false, skip: arguments.texts("modules_to_not_convert")?, message })
}

/// TorchAO's configuration classes and their short names.
fn torch_ao(name: &str) -> Option<Format> {
    let name = name.trim_end_matches("Config").to_ascii_lowercase().replace('_', "");
    let starts = |starts: &[&str]| starts.iter().any(|start| name.starts_with(start));
    if starts(&["float8", "fp8"]) {
        Some(Format::Float8)
    } else if starts(&["int8"]) {
        Some(Format::Int8)
    } else if starts(&["int4", "uint4"]) {
        // Whole numbers with scale and minimum for each group.
        Some(Format::Ggml(GgmlDType::Q4_1))
    } else {
        None
    }
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
        Scheme::of(&QuantizationRequest { class: class.to_owned(), arguments, compute_dtype: None })
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
            ("QuantoConfig", json!({"weights_dtype": "int2"}), "q2_k"),
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
            ("SDNQConfig", json!({}), "must name the stored type"),
            ("SDNQConfig", json!({"weights_dtype": "int8", "modules_to_not_convert": 3}), "list of module names"),
        ] {
            let message = scheme(class, arguments).expect_err("refused").to_string();
            assert!(message.contains(said), "{message}");
        }
    }

    #[test]
    fn layers_are_covered_and_tables_norms_and_skipped_modules_are_not() {
        let scheme =
            Scheme { skip: vec![String::from("proj_out"), String::from("time.embed")], ..Scheme::plain(Format::Nf4) };
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
