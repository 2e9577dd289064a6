//! How much memory was in use at most, measured while something ran.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Duration,
};

use candle_core::Device;

use crate::device;

/// How often the memory in use is looked at where the system does not keep the largest value itself.
const INTERVAL: Duration = Duration::from_millis(20);

/// Measures from its making until [`Gauge::peak`].
pub struct Gauge {
    /// None where the system keeps the largest value.
    sampler: Option<Sampler>,
}

struct Sampler {
    peak: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Gauge {
    /// Begins to measure what is in use on `device`.
    pub fn start(device: &Device) -> Self {
        let keeps_peak = device.is_cpu() && device::reset_peak();
        Self { sampler: (!keeps_peak).then(|| Sampler::start(device)) }
    }

    /// Bytes in use at most so far, by this program on a CPU and by all on a GPU; none where nobody says.
    pub fn peak(&self) -> Option<u64> {
        match &self.sampler {
            None => device::host_peak(),
            Some(sampler) => Some(sampler.peak.load(Relaxed)).filter(|peak| *peak > 0),
        }
    }
}

impl Sampler {
    fn start(device: &Device) -> Self {
        let (peak, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (seen, stopped, device) = (Arc::clone(&peak), Arc::clone(&stop), device.clone());
        let look = move || {
            while !stopped.load(Relaxed) {
                let Some(memory) = device::memory(&device) else { return };
                seen.fetch_max(memory.in_use, Relaxed);
                std::thread::sleep(INTERVAL);
            }
        };
        // Without the thread there is no measurement, and nothing else is missing.
        let thread = std::thread::Builder::new().name("memory".into()).spawn(look).ok();
        Self { peak, stop, thread }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn memory_that_came_and_went_is_seen() {
        const BYTES: usize = 96 << 20;
        let gauge = Gauge::start(&Device::Cpu);
        let before = device::memory(&Device::Cpu).expect("Linux tells").in_use;
        drop(std::hint::black_box(vec![1u8; BYTES]));
        let peak = gauge.peak().expect("Linux tells");
        assert!(peak >= before.min(peak) && peak as usize > BYTES, "{peak}");
    }
}
