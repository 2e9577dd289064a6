//! How much memory models and the process take, and how much there is: real numbers on every device.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use candle_core::Device;
use dw_pipelines::{
    device,
    pipelines::{Inventory, KeptComponent},
};
use serde::{Deserialize, Serialize};

/// The share of the memory that loaded models may take when nobody says how much; of the device's memory for the
/// budget, and of what is free for what is loaded next.
const DEFAULT_SHARE: f64 = 0.8;

/// Growth from run to run, beyond what newly loaded components explain, that is worth a warning.
const SUSPICIOUS_GROWTH: i64 = 500 * 1024 * 1024;

/// The memory of an engine's process and device. All sizes are bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// The device (`cpu`, `cuda:0`).
    pub device_name: String,
    /// What the weights of the loaded components take.
    pub allocated: u64,
    /// What the process holds on the device: the resident memory on a CPU, what is not free on a GPU.
    pub reserved: Option<u64>,
    /// What is free on the device; on a CPU what the system can still give.
    pub free: Option<u64>,
    /// What the device has.
    pub total: Option<u64>,
    /// The loaded components, the least recently used first.
    pub components: Vec<LoadedComponent>,
    /// Bytes of weights that may stay loaded between runs.
    pub budget: Option<u64>,
    /// The resident memory of the process.
    pub host_rss: Option<u64>,
    /// By how much `reserved` has grown (or shrunk) in the last run; none before the second run.
    pub growth_since_last_run: Option<i64>,
    /// Runs that the engine has finished.
    pub run_count: u64,
}

/// A component that stays loaded between runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedComponent {
    /// Its name in the pipeline (`unet`).
    pub name: String,
    /// Its class (`UNet2DConditionModel`).
    pub class: String,
    /// Bytes of its weights.
    pub bytes: u64,
    /// SHA-256 of the workflow files that it was loaded or reused for, as hexadecimal text.
    pub workflows: BTreeSet<String>,
}

/// Reports the memory of an engine, from any thread and during runs too.
#[derive(Clone)]
pub(crate) struct MemoryProbe(Arc<Probe>);

struct Probe {
    device: Device,
    inventory: Inventory,
    budget: Option<u64>,
    run_count: AtomicU64,
    history: Mutex<History>,
}

/// What was measured after the last run.
#[derive(Clone, Copy, Default)]
struct History {
    after_last_run: Option<Measured>,
    growth: Option<i64>,
}

#[derive(Clone, Copy)]
struct Measured {
    reserved: u64,
    allocated: u64,
}

impl MemoryProbe {
    /// A probe of an engine on `device`. `budget` none means the default one.
    pub(crate) fn new(device: Device, inventory: Inventory, budget: Option<u64>) -> Self {
        let budget = budget.or_else(|| Some((device::memory(&device)?.total as f64 * DEFAULT_SHARE) as u64));
        let (run_count, history) = (AtomicU64::new(0), Mutex::default());
        Self(Arc::new(Probe { device, inventory, budget, run_count, history }))
    }

    /// The bytes of weights that may stay loaded: the budget, or less while the device has less to give.
    pub(crate) fn budget_now(&self) -> Option<u64> {
        let free = device::memory(&self.0.device).map(|memory| (memory.free as f64 * DEFAULT_SHARE) as u64);
        let possible = free.map(|free| free.saturating_add(self.allocated()));
        match (self.0.budget, possible) {
            (Some(budget), Some(possible)) => Some(budget.min(possible)),
            (budget, possible) => budget.or(possible),
        }
    }

    /// Runs that have finished.
    pub(crate) fn run_count(&self) -> u64 {
        self.0.run_count.load(Ordering::SeqCst)
    }

    /// Counts a run and measures what it left behind; a warning when that is suspiciously much.
    pub(crate) fn settle(&self, finished: bool) -> Option<String> {
        self.0.run_count.fetch_add(finished.into(), Ordering::SeqCst);
        let reserved = device::memory(&self.0.device)?.in_use;
        let now = Measured { reserved, allocated: self.allocated() };
        let mut history = self.0.history.lock().unwrap_or_else(PoisonError::into_inner);
        let before = history.after_last_run.replace(now);
        history.growth = before.map(|before| difference(now.reserved, before.reserved));
        before.and_then(|before| growth_warning(before, now))
    }

    /// The memory as of now.
    pub(crate) fn report(&self) -> MemoryReport {
        let probe = &self.0;
        let memory = device::memory(&probe.device);
        let host = if probe.device.is_cpu() { memory } else { device::memory(&Device::Cpu) };
        let component = |kept: KeptComponent| LoadedComponent {
            name: kept.name,
            class: kept.class,
            bytes: kept.bytes,
            workflows: kept.owners,
        };
        MemoryReport {
            device_name: device::name(&probe.device),
            allocated: self.allocated(),
            reserved: memory.map(|memory| memory.in_use),
            free: memory.map(|memory| memory.free),
            total: memory.map(|memory| memory.total),
            components: probe.inventory.components().into_iter().map(component).collect(),
            budget: probe.budget,
            host_rss: host.map(|host| host.in_use),
            growth_since_last_run: probe.history.lock().unwrap_or_else(PoisonError::into_inner).growth,
            run_count: self.run_count(),
        }
    }

    fn allocated(&self) -> u64 {
        self.0.inventory.components().iter().map(|component| component.bytes).sum()
    }
}

fn growth_warning(before: Measured, now: Measured) -> Option<String> {
    let growth = difference(now.reserved, before.reserved);
    let unexplained = growth - difference(now.allocated, before.allocated).max(0);
    (unexplained > SUSPICIOUS_GROWTH).then(|| {
        format!(
            "memory grew by {} MB in this run, {} MB more than the models it loaded; when it goes on growing, start a \
             fresh worker",
            growth / 1_000_000,
            unexplained / 1_000_000
        )
    })
}

fn difference(now: u64, before: u64) -> i64 {
    i64::try_from(i128::from(now) - i128::from(before)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1 << 30;

    #[test]
    fn a_cpu_reports_real_numbers() {
        let report = MemoryProbe::new(Device::Cpu, Inventory::default(), None).report();
        let (free, total, rss) = (report.free.expect("known"), report.total.expect("known"), report.host_rss);
        assert!(free <= total && rss.expect("known") < total, "{report:?}");
        assert_eq!((report.device_name.as_str(), report.reserved), ("cpu", rss));
        assert_eq!(report.budget, Some((total as f64 * 0.8) as u64));
    }

    #[test]
    fn growth_is_known_from_the_second_run_on_and_only_finished_runs_count() {
        let probe = MemoryProbe::new(Device::Cpu, Inventory::default(), Some(7));
        probe.settle(true);
        assert_eq!(probe.report().growth_since_last_run, None);
        probe.settle(false);
        let report = probe.report();
        assert!(report.growth_since_last_run.is_some());
        assert_eq!((report.run_count, report.budget), (1, Some(7)));
    }

    #[test]
    fn only_growth_that_loaded_models_do_not_explain_is_suspicious() {
        let before = Measured { reserved: GB, allocated: 0 };
        assert_eq!(growth_warning(before, Measured { reserved: 3 * GB, allocated: 2 * GB }), None);
        let warning = growth_warning(before, Measured { reserved: 3 * GB, allocated: GB }).expect("a warning");
        assert!(warning.contains("2147 MB") && warning.contains("1073 MB"), "{warning}");
        // What was given up does not make room for a leak.
        let fuller = Measured { reserved: GB, allocated: GB };
        assert!(growth_warning(fuller, Measured { reserved: 2 * GB, allocated: 0 }).is_some());
    }
}
