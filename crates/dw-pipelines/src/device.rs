//! Chooses the device that models run on. Knows what this build was compiled for and nothing about
//! models.

use candle_core::Device;

use crate::{Error, Result};

/// The device called `name` (`cpu`, `cuda`, `cuda:1`, `metal`), or the best one of this build when there
/// is no name. `gpu` and `mps` are accepted for `cuda` and `metal`.
pub fn pick(name: Option<&str>) -> Result<Device> {
    let Some(name) = name.map(str::trim).filter(|name| !name.is_empty() && *name != "auto") else {
        return Ok(best());
    };
    let (kind, index) = match name.split_once(':') {
        Some((kind, index)) => (kind, Some(index)),
        None => (name, None),
    };
    let ordinal = index.map_or(Ok(0), str::parse::<usize>).map_err(|_| unknown(name))?;
    match kind.to_ascii_lowercase().as_str() {
        "cpu" if index.is_none() => Ok(Device::Cpu),
        "cuda" | "gpu" => cuda(ordinal),
        "metal" | "mps" => metal(ordinal),
        _ => Err(unknown(name)),
    }
}

/// The name `pick` knows `device` by.
pub fn name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".into(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// The memory of a GPU in bytes, free and in all; none for a CPU, and where the driver does not say.
pub fn memory(device: &Device) -> Option<(u64, u64)> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        let (free, total) = cuda.cuda_stream().context().mem_get_info().ok()?;
        return Some((free as u64, total as u64));
    }
    let _ = device;
    None
}

/// The names of the devices this build can use here, the best one first.
pub fn available() -> Vec<String> {
    let found = [cuda(0), metal(0), Ok(Device::Cpu)];
    found.iter().flatten().map(name).collect()
}

fn best() -> Device {
    cuda(0).or_else(|_| metal(0)).unwrap_or(Device::Cpu)
}

fn cuda(ordinal: usize) -> Result<Device> {
    if !cfg!(feature = "cuda") {
        return Err(Error::Unsupported(
            "this build of dw has no CUDA support; use the `dw-cuda` build, or the device `cpu`".into(),
        ));
    }
    Device::new_cuda(ordinal).map_err(|error| no_device("cuda", ordinal, &error))
}

fn metal(ordinal: usize) -> Result<Device> {
    if !cfg!(feature = "metal") {
        return Err(Error::Unsupported("this build of dw has no Metal support; use the device `cpu`".into()));
    }
    Device::new_metal(ordinal).map_err(|error| no_device("metal", ordinal, &error))
}

fn no_device(kind: &str, ordinal: usize, error: &candle_core::Error) -> Error {
    Error::Unsupported(format!(
        "device `{kind}:{ordinal}` cannot be used: {error}; try another index, or the device `cpu`"
    ))
}

fn unknown(name: &str) -> Error {
    Error::Unsupported(format!("there is no device `{name}`; use `cpu`, `cuda`, `cuda:1` or `metal`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_always_there() {
        assert!(pick(Some("cpu")).expect("cpu").is_cpu());
        assert!(pick(Some(" CPU ")).expect("cpu").is_cpu());
        assert_eq!(name(&Device::Cpu), "cpu");
    }

    #[test]
    fn an_unknown_device_lists_the_known_ones() {
        for wrong in ["tpu", "cuda:x", "cpu:1", "cuda:-1"] {
            let message = pick(Some(wrong)).expect_err("not a device").to_string();
            assert!(message.contains(&format!("`{wrong}`")) && message.contains("`cpu`"), "{message}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn asking_for_cuda_without_cuda_names_the_build_that_has_it() {
        let message = pick(Some("cuda:1")).expect_err("no CUDA").to_string();
        assert!(message.contains("dw-cuda"), "{message}");
    }
}
