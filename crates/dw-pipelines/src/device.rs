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

/// The memory of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In use: by this program on a CPU, by all on a GPU.
    pub in_use: u64,
    /// What can still be used.
    pub free: u64,
}

/// The memory of `device`; none where the system does not say.
pub fn memory(device: &Device) -> Option<DeviceMemory> {
    match device.location() {
        candle_core::DeviceLocation::Cpu => host_memory(),
        candle_core::DeviceLocation::Cuda { .. } => cuda_memory(device),
        candle_core::DeviceLocation::Metal { .. } => None,
    }
}

#[cfg(feature = "cuda")]
fn cuda_memory(device: &Device) -> Option<DeviceMemory> {
    use candle_core::cuda_backend::cudarc::driver::result;
    device.as_cuda_device().ok()?.cuda_stream().context().bind_to_thread().ok()?;
    let (free, total) = result::mem_get_info().ok()?;
    Some(DeviceMemory { in_use: (total - free) as u64, free: free as u64 })
}

#[cfg(not(feature = "cuda"))]
fn cuda_memory(_: &Device) -> Option<DeviceMemory> {
    None
}

/// Host memory as Linux tells it, with the limit of a container where there is one.
fn host_memory() -> Option<DeviceMemory> {
    let free = kilobytes(&read("/proc/meminfo")?, "MemAvailable:")?;
    let in_use = kilobytes(&read("/proc/self/status")?, "VmRSS:")?;
    Some(DeviceMemory { in_use, free: container_free().map_or(free, |bytes| bytes.min(free)) })
}

/// What is left of the limit of a Linux control group; what is cached there makes room when needed.
fn container_free() -> Option<u64> {
    let limit: u64 = read("/sys/fs/cgroup/memory.max")?.trim().parse().ok()?;
    let used: u64 = read("/sys/fs/cgroup/memory.current")?.trim().parse().ok()?;
    let statistics = read("/sys/fs/cgroup/memory.stat")?;
    let cached = statistics.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse().ok());
    Some((limit + cached.unwrap_or(0)).saturating_sub(used))
}

/// The most host memory that this program had in use since [`reset_peak`], or since it began.
pub(crate) fn host_peak() -> Option<u64> {
    kilobytes(&read("/proc/self/status")?, "VmHWM:")
}

/// Begins a new measurement for [`host_peak`]; false where that cannot be done.
pub(crate) fn reset_peak() -> bool {
    fs_err::write("/proc/self/clear_refs", "5").is_ok()
}

fn read(path: &str) -> Option<String> {
    fs_err::read_to_string(path).ok()
}

/// Bytes from a line like `VmRSS:   1024 kB`.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
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
    fn memory_is_read_as_linux_writes_it() {
        let text = "MemTotal:       16 kB\nMemAvailable:    8 kB\nHugePages_Total: 0\n";
        assert_eq!(kilobytes(text, "MemAvailable:"), Some(8192));
        assert_eq!(kilobytes(text, "HugePages_Total:"), None);
        assert_eq!(kilobytes(text, "Missing:"), None);
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
