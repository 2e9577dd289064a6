//! Puts LoRA files on the components of a pipeline and keeps what comes out in the cache.
//!
//! An adapted component is a second component beside its base: built from the same tensors but for those that change.
//! Other files, other scales or none at all start from the base again, so nothing is read from disk twice and nothing
//! has to be undone.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use dw_core::event::Event;

use super::{
    cache::ComponentCache,
    call::stage_finished,
    components::{Component, Model, SharedComponent},
    learn::Words,
};
use crate::{
    Error, Result,
    adapters::{
        AdapterFile, Lora,
        file::Place,
        lora::{self, Denoiser, Merged, Strengthened, merge},
    },
    hub::Hub,
    models::{
        ClipTextModel, FluxTransformer2DModel, Sd3Transformer2DModel, T5EncoderModel, Unet2DConditionModel, UnetConfig,
        config::OneOrMany,
    },
    request::{Context, PipelineRequest},
    weights::Weights,
};

/// The adapters of one pipeline, found and checked as far as that goes without a model.
#[derive(Clone, Default)]
pub(crate) struct Adapters {
    loras: Vec<(AdapterFile, f64)>,
    words: Words,
}

/// A component that changes.
struct Target {
    name: String,
    /// The key of the adapted component.
    key: String,
    base: SharedComponent,
    weights: Weights,
}

impl Adapters {
    /// Finds the files that `request` names. Textual inversions are read, LoRA files are looked into.
    pub(crate) fn find(request: &PipelineRequest, denoiser: Denoiser, hub: &Hub, context: Context<'_>) -> Result<Self> {
        let mut loras = Vec::new();
        for (i, lora) in request.loras.iter().enumerate() {
            if request.loras[..i].iter().any(|other| other.adapter_name == lora.adapter_name) {
                let reason = format!("has the `adapter_name` `{}` twice; give each LoRA its own", lora.adapter_name);
                return Err(Error::Argument { name: "loras".into(), reason });
            }
            if !lora.scale.is_finite() {
                let reason =
                    format!("scale of `{}` must be a finite number, found `{}`", lora.adapter_name, lora.scale);
                return Err(Error::Argument { name: "loras".into(), reason });
            }
            let (subfolder, weight_name) = (lora.subfolder.as_deref(), lora.weight_name.as_deref());
            let file = AdapterFile::find(Place { source: &lora.source, subfolder, weight_name }, hub, context)?;
            lora::check(&file, denoiser)?;
            loras.push((file, lora.scale));
        }
        Ok(Self { loras, words: Words::find(request, hub, context)? })
    }

    /// Refuses LoRA files made for a UNet that reads other text than this one.
    pub(crate) fn check_unet(&self, unet: &UnetConfig) -> Result<()> {
        let widths = match &unet.cross_attention_dim {
            OneOrMany::One(width) => std::slice::from_ref(width),
            OneOrMany::Many(widths) => widths,
        };
        self.loras.iter().try_for_each(|(file, _)| lora::check_text_width(file, widths))
    }

    /// Whether a factor on the scales changes anything.
    pub(crate) fn has_loras(&self) -> bool {
        !self.loras.is_empty()
    }

    /// Replaces the components that change by adapted ones.
    pub(crate) fn put_on(
        &self,
        components: &mut BTreeMap<String, SharedComponent>,
        cache: &mut ComponentCache,
        context: Context<'_>,
    ) -> Result<()> {
        self.words.teach(components, cache)?;
        self.put_on_scaled(components, 1.0, cache, context)
    }

    /// Replaces the components that LoRA files change, and those they have changed already, by ones with every scale
    /// multiplied by `factor`.
    pub(crate) fn put_on_scaled(
        &self,
        components: &mut BTreeMap<String, SharedComponent>,
        factor: f64,
        cache: &mut ComponentCache,
        context: Context<'_>,
    ) -> Result<()> {
        if !self.has_loras() {
            return Ok(());
        }
        let strengths = self.loras.iter().map(|(file, scale)| (file, scale * factor));
        let loras: Vec<(&AdapterFile, f64)> = strengths.filter(|(_, strength)| *strength != 0.0).collect();
        let targets = targets(components, &loras);
        // Without a file that acts, the base itself is what is wanted.
        let kept: Option<Vec<SharedComponent>> = if loras.is_empty() {
            Some(targets.iter().map(|target| Arc::clone(&target.base)).collect())
        } else {
            targets.iter().map(|target| cache.get(&target.key)).collect()
        };
        let adapted = if let Some(kept) = kept {
            kept
        } else {
            let started = Instant::now();
            let adapted = adapt(&targets, &loras, context)?;
            for component in &adapted {
                cache.insert(Arc::clone(component));
            }
            stage_finished(context, "apply adapters", started);
            adapted
        };
        components.extend(targets.into_iter().map(|target| target.name).zip(adapted));
        Ok(())
    }
}

/// The components that LoRA files may change.
fn targets(components: &BTreeMap<String, SharedComponent>, loras: &[(&AdapterFile, f64)]) -> Vec<Target> {
    let adapter = |(file, strength): &(&AdapterFile, f64)| format!("|lora:{strength}*{}", file.fingerprint());
    let adapters = loras.iter().map(adapter).collect::<Vec<_>>().concat();
    let target = |(name, component): (&String, &SharedComponent)| {
        let base = Arc::clone(component.base.as_ref().unwrap_or(component));
        let weights = base.weights.clone()?;
        Some(Target { name: name.clone(), key: format!("{}{adapters}", base.key), base, weights })
    };
    components.iter().filter_map(target).collect()
}

/// The adapted components, in the order of `targets`.
fn adapt(targets: &[Target], loras: &[(&AdapterFile, f64)], context: Context<'_>) -> Result<Vec<SharedComponent>> {
    let files = loras.iter().map(|(file, _)| Lora::read(file)).collect::<Result<Vec<_>>>()?;
    let named: Vec<(&str, &Weights)> = targets.iter().map(|target| (target.name.as_str(), &target.weights)).collect();
    let mut changes: Vec<Vec<Strengthened<'_>>> = targets.iter().map(|_| Vec::new()).collect();
    for (file, (_, strength)) in files.iter().zip(loras) {
        let mut unmatched = file.left_out(&named);
        let plans = targets
            .iter()
            .map(|target| file.plan(&target.name, &target.weights, &mut unmatched))
            .collect::<Result<Vec<_>>>()?;
        if let Some(message) = file.report(&plans, &unmatched)? {
            context.events.emit(Event::Warning { message });
        }
        for (changes, plan) in changes.iter_mut().zip(plans) {
            changes.push(Strengthened { plan, strength: *strength });
        }
    }
    targets
        .iter()
        .zip(&changes)
        .map(|(target, changes)| {
            let changed = merge(&target.weights, changes, context)?;
            let base = Some(Arc::clone(&target.base));
            Ok(Arc::new(rebuilt(&target.base, &target.weights, changed, target.key.clone(), base)?))
        })
        .collect()
}

/// `component` built again from `weights` with some tensors `changed`.
pub(super) fn rebuilt(
    component: &Component,
    weights: &Weights,
    changed: Merged,
    key: String,
    base: Option<SharedComponent>,
) -> Result<Component> {
    let bytes = changed.bytes();
    let weights = changed.put_on(weights)?;
    let model = match &component.model {
        Model::Unet(unet) => Model::Unet(Unet2DConditionModel::new(unet.config(), weights.clone())?),
        Model::Sd3Transformer(transformer) => {
            Model::Sd3Transformer(Sd3Transformer2DModel::new(transformer.config(), weights.clone())?)
        }
        Model::FluxTransformer(transformer) => {
            let mut config = transformer.config().clone();
            // A control LoRA gives it more inputs, and no more outputs.
            config.out_channels = Some(config.predicted_channels());
            config.in_channels = FluxTransformer2DModel::inputs(&weights).unwrap_or(config.in_channels);
            Model::FluxTransformer(FluxTransformer2DModel::new(&config, weights.clone())?)
        }
        Model::ClipText(encoder) => {
            let mut config = encoder.config().clone();
            config.vocab_size = ClipTextModel::words(&weights).unwrap_or(config.vocab_size);
            Model::ClipText(ClipTextModel::new(&config, weights.clone())?)
        }
        Model::T5(encoder) => Model::T5(T5EncoderModel::new(encoder.config(), weights.clone())?),
        Model::Tokenizer(_)
        | Model::T5Tokenizer(_)
        | Model::ClipVision(_)
        | Model::Vae(_)
        | Model::ControlNet(_)
        | Model::ControlNetUnion(_)
        | Model::Sd3ControlNet(_)
        | Model::FluxControlNet(_)
        | Model::Siglip(_)
        | Model::Redux(_) => {
            return Err(Error::Unsupported(format!("a `{}` takes no adapters", component.class)));
        }
    };
    Ok(Component { class: component.class.clone(), key, bytes, model, weights: Some(weights), base })
}
