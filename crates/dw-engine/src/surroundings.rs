//! What this machine offers to models, for `dw doctor`.

use std::path::PathBuf;

use dw_pipelines::{device, hub::Hub};
use serde::Serialize;

/// What this machine offers to models, and where they are kept.
#[derive(Clone, Debug, Serialize)]
pub struct Surroundings {
    /// Devices this build can use, the one it takes by itself first.
    pub devices: Vec<DeviceStatus>,
    /// The folder that models from the hub are kept in.
    pub model_cache: PathBuf,
    /// Whether there is an access token for the hub.
    pub has_token: bool,
    /// Whether the environment switches the network off.
    pub offline: bool,
}

/// A device.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceStatus {
    /// The name that [`crate::EngineConfig::device`] takes.
    pub name: String,
    /// Its memory in bytes, free and in all, where the driver says.
    pub memory: Option<(u64, u64)>,
}

/// The devices and model folders that this build sees here.
pub fn surroundings() -> Surroundings {
    let hub = Hub::from_env(false);
    let memory = |name: &str| {
        let device = device::pick(Some(name)).ok().filter(|device| !device.is_cpu())?;
        device::memory(&device).map(|memory| (memory.free, memory.free + memory.in_use))
    };
    let status = |name: String| DeviceStatus { memory: memory(&name), name };
    let devices = device::available().into_iter().map(status).collect();
    Surroundings { devices, model_cache: hub.cache, has_token: hub.token.is_some(), offline: hub.offline }
}
