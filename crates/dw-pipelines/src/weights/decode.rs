//! Stored values to tensors in host memory, in one pass and by all threads.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;

use super::file::bad_file;
use crate::Result;

/// The tensor of these bytes. Floating point values become `wanted` where it names a type; whole numbers keep theirs.
pub(super) fn tensor(
    name: &str,
    stored: Dtype,
    shape: &[usize],
    bytes: &[u8],
    wanted: Option<DType>,
    path: &Path,
) -> Result<Tensor> {
    let source = dtype(name, stored, path)?;
    let wanted = wanted.filter(|_| source.is_float()).unwrap_or(source);
    if let Some(tensor) = dw_kernels::tensor_from_bytes(bytes, source, wanted, shape)? {
        return Ok(tensor);
    }
    Ok(Tensor::from_raw_buffer(bytes, source, shape, &Device::Cpu)?.to_dtype(wanted)?)
}

/// The type of a tensor's values, where it can be read.
pub(super) fn dtype(name: &str, stored: Dtype, path: &Path) -> Result<DType> {
    Ok(match stored {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::I16 => DType::I16,
        Dtype::U32 => DType::U32,
        Dtype::U8 => DType::U8,
        other => {
            return Err(bad_file(
                path,
                &format!(
                    "tensor `{name}` holds `{other:?}` values, which cannot be read; use the model in float16, \
                     bfloat16 or float32"
                ),
            ));
        }
    })
}
