//! From needs to a decision: what stays on the device, and whether it fits.

use candle_core::Device;
use dw_core::fit::{Alternative, ComponentFit, FitPlan, Verdict};

use super::needs::{Call, Need};
use crate::{
    Error, Result,
    device::{self, DeviceMemory},
    request::{MemoryRequest, Offload, Paging, TilingRequest},
};

/// Bytes of the program itself beyond weights and activations: code, threads, buffers of kernels.
const OVERHEAD: u64 = 64 << 20;
/// The part of the limit below which a plan fits for certain, and that above which it does not.
const CERTAIN: (f64, f64) = (0.95, 1.05);

/// What will be done.
#[derive(Clone, Debug)]
pub(crate) struct Decision {
    /// When layers come and go, where nothing is said of the component.
    pub(crate) paging: Option<Paging>,
    pub(crate) tiling: Option<TilingRequest>,
    pub(crate) plan: FitPlan,
}

/// A way to run, from the fastest to the smallest.
#[derive(Clone, Copy, Debug)]
struct Way {
    paging: Option<Paging>,
    is_tiled: bool,
}

/// Blocks that come one by one while the one before computes.
const STREAMED: Paging = Paging::Groups { blocks: 1, prefetch: true };

const WAYS: [Way; 7] = [
    Way { paging: None, is_tiled: false },
    Way { paging: None, is_tiled: true },
    Way { paging: Some(Paging::Whole), is_tiled: false },
    Way { paging: Some(Paging::Whole), is_tiled: true },
    Way { paging: Some(STREAMED), is_tiled: false },
    Way { paging: Some(STREAMED), is_tiled: true },
    Way { paging: Some(Paging::Layers), is_tiled: true },
];

/// What `request` asks for or, where it asks for `auto`, the first way that fits.
pub(crate) fn decide(request: &MemoryRequest, needs: &[Need], call: Call, device: &Device) -> Decision {
    let memory = device::memory(device);
    let fit = Fit { request, needs, memory };
    let asked_tiles = request.vae_tiling.is_some();
    let (way, is_chosen) = match request.offload {
        Some(Offload::Auto) => (fit.first_that_fits(asked_tiles), true),
        Some(Offload::Paged(paging)) => (Way { paging: Some(paging), is_tiled: asked_tiles }, false),
        None => (Way { paging: None, is_tiled: asked_tiles }, false),
    };
    let tiling = request.vae_tiling.or_else(|| way.is_tiled.then(TilingRequest::default));
    let (peak, stage, activations) = fit.peak(way);
    let component = |need: &Need| {
        let paging = fit.paging(need, way);
        ComponentFit {
            name: need.name.clone(),
            dtype: need.storage.clone(),
            bytes: need.bytes,
            at_once: need.at_once(paging),
            presence: presence(paging).to_owned(),
            is_loaded: need.is_loaded,
        }
    };
    let verdict = fit.verdict(peak);
    let plan = FitPlan {
        device: device::name(device),
        components: needs.iter().map(component).collect(),
        offload: offload_name(way.paging).to_owned(),
        is_chosen,
        tiles_vae: way.is_tiled,
        size: [call.height, call.width],
        activations,
        in_use: memory.map_or(0, |memory| memory.in_use),
        peak,
        peak_stage: stage,
        limit: fit.limit(),
        verdict,
        alternatives: if verdict == Verdict::Fits { Vec::new() } else { fit.alternatives(peak) },
    };
    Decision { paging: way.paging, tiling, plan }
}

/// Refuses a plan that cannot work, unless the request wants to see for itself.
pub(crate) fn refuse_if_too_large(plan: &FitPlan, request: &MemoryRequest) -> Result<()> {
    let (Verdict::TooLarge, Some(limit), false) = (plan.verdict, plan.limit, request.ignores_fit) else {
        return Ok(());
    };
    let remedy = match plan.remedies() {
        Some(settings) => format!("add {settings} to `configuration`"),
        None => {
            "no setting of dw makes it fit; use a smaller picture, a smaller `torch_dtype`, or a quantized model".into()
        }
    };
    Err(Error::Unsupported(format!(
        "the pipeline needs about {} of memory on `{}` in the stage `{}`, and {} can be used; {remedy} (`--ignore-fit` \
         tries it all the same)",
        gigabytes(plan.peak),
        plan.device,
        plan.peak_stage,
        gigabytes(limit)
    )))
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

/// Everything that a peak follows from.
struct Fit<'a> {
    request: &'a MemoryRequest,
    needs: &'a [Need],
    memory: Option<DeviceMemory>,
}

impl Fit<'_> {
    /// When the layers of a component come and go.
    fn paging(&self, need: &Need, way: Way) -> Option<Paging> {
        need.paging(self.request.paging(base_name(&need.name), way.paging))
    }

    /// Bytes in use at most, the stage that needs them, and its activations.
    fn peak(&self, way: Way) -> (u64, String, u64) {
        let paging = |need: &Need| self.paging(need, way);
        let is_here = |need: &&Need| paging(need).is_none();
        let always: u64 = self.needs.iter().filter(is_here).filter(|need| !need.is_loaded).map(|need| need.bytes).sum();
        let base = always + OVERHEAD + self.memory.map_or(0, |memory| memory.in_use);
        let mut peak = (base, "load".to_owned(), 0);
        for stage in self.needs.iter().map(|need| &need.stage) {
            let of_stage = || self.needs.iter().filter(|need| need.stage == *stage);
            let weights: u64 = of_stage().filter(|need| !is_here(need)).map(|need| need.at_once(paging(need))).sum();
            let activations: u64 = of_stage().map(|need| need.activations_in(way.is_tiled)).sum();
            if base + weights + activations > peak.0 {
                peak = (base + weights + activations, stage.clone(), activations);
            }
        }
        peak
    }

    /// Bytes that may be in use.
    fn limit(&self) -> Option<u64> {
        self.memory.map(|memory| (memory.in_use + memory.free).saturating_sub(self.request.reserve))
    }

    fn verdict(&self, peak: u64) -> Verdict {
        let Some(limit) = self.limit() else { return Verdict::Unknown };
        let share = peak as f64 / limit.max(1) as f64;
        if share <= CERTAIN.0 {
            Verdict::Fits
        } else if share <= CERTAIN.1 {
            Verdict::Tight
        } else {
            Verdict::TooLarge
        }
    }

    /// The fastest way that fits, or the smallest one; everything stays where nobody knows how much there is.
    fn first_that_fits(&self, asked_tiles: bool) -> Way {
        let tiled = |way: &Way| Way { is_tiled: way.is_tiled || asked_tiles, ..*way };
        let fits = |way: &Way| matches!(self.verdict(self.peak(*way).0), Verdict::Fits | Verdict::Unknown);
        WAYS.iter().map(tiled).find(fits).unwrap_or_else(|| tiled(&WAYS[WAYS.len() - 1]))
    }

    /// The ways that need less than `peak`.
    fn alternatives(&self, peak: u64) -> Vec<Alternative> {
        let other = |way: &Way| {
            let (other, _, _) = self.peak(*way);
            let tiling = way.is_tiled.then_some(r#""vae": {"enable_tiling": true}"#);
            let offload = way.paging.map(|paging| format!(r#""offload": "{}""#, offload_name(Some(paging))));
            let setting = offload.into_iter().chain(tiling.map(str::to_owned)).collect::<Vec<_>>().join(", ");
            Alternative { setting, peak: other, fits: self.verdict(other) == Verdict::Fits }
        };
        WAYS.iter().skip(1).map(other).filter(|other| other.peak < peak).collect()
    }
}

impl Need {
    fn activations_in(&self, is_tiled: bool) -> u64 {
        if is_tiled { self.tiled_activations } else { self.activations }
    }
}

/// The name under which a step speaks of one of several ControlNets.
pub(crate) fn base_name(name: &str) -> &str {
    if name.starts_with("controlnet") { "controlnet" } else { name }
}

fn presence(paging: Option<Paging>) -> &'static str {
    match paging {
        None => "always",
        Some(Paging::Whole) => "in its stage",
        Some(Paging::Layers | Paging::Groups { blocks: 0, .. }) => "layer by layer",
        Some(Paging::Groups { .. }) => "in groups",
    }
}

fn offload_name(paging: Option<Paging>) -> &'static str {
    match paging {
        None => "none",
        Some(Paging::Whole) => "model",
        Some(Paging::Layers) => "sequential",
        Some(Paging::Groups { .. }) => "group",
    }
}

#[cfg(test)]
mod tests {
    use super::{super::needs::tests::need, *};

    const GB: u64 = 1_000_000_000;

    /// A text encoder of 2 GB, a UNet of 8 GB in eight blocks, and an autoencoder of 1 GB that needs 6 GB to decode.
    fn needs() -> Vec<Need> {
        vec![need("text_encoder", &[GB, GB], GB / 10), need("unet", &[GB; 8], 2 * GB), need("vae", &[GB], 6 * GB)]
    }

    fn fit<'a>(request: &'a MemoryRequest, needs: &'a [Need], free: u64) -> Fit<'a> {
        Fit { request, needs, memory: Some(DeviceMemory { in_use: GB, free: free * GB, total: free * GB + GB }) }
    }

    fn peak(paging: Option<Paging>, is_tiled: bool) -> (f64, String) {
        let (request, needs) = (MemoryRequest::default(), needs());
        let (peak, stage, _) = fit(&request, &needs, 100).peak(Way { paging, is_tiled });
        (((peak - OVERHEAD) as f64 / GB as f64 * 10.0).round() / 10.0, stage)
    }

    #[test]
    fn the_peak_is_that_of_the_stage_that_needs_most() {
        assert_eq!(peak(None, false), (18.0, "vae".into()));
        assert_eq!(peak(None, true), (14.0, "denoise".into()));
        assert_eq!(peak(Some(Paging::Whole), true), (11.0, "denoise".into()));
        assert_eq!(peak(Some(STREAMED), false), (8.0, "vae".into()));
        assert_eq!(peak(Some(STREAMED), true), (5.0, "denoise".into()));
        assert_eq!(peak(Some(Paging::Layers), true), (4.0, "denoise".into()));
    }

    #[test]
    fn auto_takes_the_first_way_that_fits() {
        let (request, needs) = (MemoryRequest::default(), needs());
        let chosen = |free| {
            let way = fit(&request, &needs, free).first_that_fits(false);
            (offload_name(way.paging), way.is_tiled)
        };
        assert_eq!(chosen(30), ("none", false));
        assert_eq!(chosen(15), ("none", true));
        assert_eq!(chosen(12), ("model", false));
        assert_eq!(chosen(8), ("group", false));
        assert_eq!(chosen(5), ("group", true));
        assert_eq!(chosen(1), ("sequential", true));
    }

    #[test]
    fn components_that_stay_or_are_there_already_are_counted_as_such() {
        let request = MemoryRequest { resident: vec!["vae".into()], ..MemoryRequest::default() };
        let mut needs = needs();
        let whole = Way { paging: Some(Paging::Whole), is_tiled: true };
        let with_vae = fit(&request, &needs, 100).peak(whole).0;
        assert_eq!(with_vae, OVERHEAD + GB + GB + 8 * GB + 2 * GB);
        needs[2].is_loaded = true;
        assert_eq!(fit(&request, &needs, 100).peak(whole).0, with_vae - GB);
    }

    #[test]
    fn too_little_memory_is_refused_with_numbers_and_the_settings_that_fit() {
        let (request, needs) = (MemoryRequest::default(), needs());
        let fit = fit(&request, &needs, 9);
        let (peak, stage, _) = fit.peak(Way { paging: None, is_tiled: false });
        let plan = FitPlan {
            device: "cuda:0".into(),
            peak,
            peak_stage: stage,
            limit: fit.limit(),
            verdict: fit.verdict(peak),
            alternatives: fit.alternatives(peak),
            ..FitPlan::default()
        };
        let message = refuse_if_too_large(&plan, &request).expect_err("18 GB in 10 GB").to_string();
        for part in ["18.1 GB", "10.0 GB", "`cuda:0`", r#"`"offload": "group"`"#, "--ignore-fit"] {
            assert!(message.contains(part), "{message} lacks {part}");
        }
        assert!(!message.contains(r#""offload": "model""#), "{message}");
        let forced = MemoryRequest { ignores_fit: true, ..MemoryRequest::default() };
        assert!(refuse_if_too_large(&plan, &forced).is_ok());
    }
}
