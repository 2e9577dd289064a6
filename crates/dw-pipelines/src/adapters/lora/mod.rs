//! LoRA files and their relatives: read in every dialect, matched with a model, merged into its weights.
//!
//! A file is read into one [`Change`] for each module it names ([`keys`] knows the dialects); [`modules`] finds the
//! modules in a model; [`merge`] adds the changes to the weights. Complaints about files that do not fit are made
//! here. Which files a pipeline has is not known here.

mod change;
mod keys;
mod merge;
mod modules;
mod original;
mod recorded;

use std::{borrow::Cow, collections::BTreeMap};

use candle_core::Tensor;
use dw_core::event::Event;

pub(crate) use merge::{Merged, Strengthened, merge};

use super::{AdapterFile, first_names};
use crate::{
    Result,
    request::Context,
    weights::{Weights, single_file::key_map::Change as Pick},
};
use change::{Change, Flaw, Parts};
use keys::{Component, MadeFor, Part};
use modules::{Modules, Place};
use recorded::Recorded;

/// What removes the noise in the pipelines that LoRA files are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denoiser {
    /// The UNet of Stable Diffusion 1.x, 2.x and XL.
    Unet,
    /// The transformer of Stable Diffusion 3 and 3.5.
    StableDiffusion3,
    /// The transformer of Flux.
    Flux,
}

impl Denoiser {
    /// The family, as messages name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unet => "a Stable Diffusion with a UNet",
            Self::StableDiffusion3 => "Stable Diffusion 3",
            Self::Flux => "Flux",
        }
    }
}

/// One module of a file.
struct Module {
    component: Component,
    /// Its path in the file, elements joined by `_`.
    name: String,
    parts: Parts,
    change: Change,
}

/// A LoRA file, read.
pub struct Lora {
    file: AdapterFile,
    modules: Vec<Module>,
    /// Names that are of no known dialect.
    unknown: Vec<String>,
}

/// What a file does to one component.
pub(crate) struct Plan<'a> {
    /// The path of each changed module in the model, and its change.
    pub(crate) changes: Vec<(String, Cow<'a, Change>)>,
    matched: usize,
}

/// Refuses a file that was made for models with another denoiser, or that is no LoRA. Reads the header only.
pub fn check(file: &AdapterFile, denoiser: Denoiser) -> Result<()> {
    let names = file.names()?;
    match keys::made_for(names.iter().map(String::as_str)) {
        Some(made_for) if !made_for.fits(denoiser) => Err(file.bad(format!(
            "this LoRA was made for {}, and the model is {}; choose a LoRA made for the model",
            made_for.name(),
            denoiser.name()
        ))),
        _ => check_holds_lora(file, &names),
    }
}

/// Refuses a file whose attention layers read other text than the model's UNet, whose layers read texts of so many
/// features. Reads the header only.
pub(crate) fn check_text_width(file: &AdapterFile, widths: &[usize]) -> Result<()> {
    let misfit = file.shapes()?.into_iter().find_map(|(name, dims)| {
        let key = keys::parse(&name)?;
        let reads_text = key.component == Component::Denoiser && key.part == Part::Down && is_text_reader(&key.module);
        let width = *dims.get(1)?;
        (reads_text && !widths.contains(&width)).then_some((name, width))
    });
    let Some((name, width)) = misfit else { return Ok(()) };
    let family = family_by_width(width).map_or(String::new(), |family| format!(" (it seems to be made for {family})"));
    Err(file.bad(format!(
        "`{name}` reads text of {width} features{family}, but the model's UNet reads {}; choose a LoRA made for the model",
        widths.iter().map(usize::to_string).collect::<Vec<_>>().join(" or ")
    )))
}

/// Whether the module turns text into the keys of a UNet's attention.
fn is_text_reader(module: &str) -> bool {
    module.ends_with("attn2_to_k")
}

/// The family whose UNet reads text of so many features.
fn family_by_width(width: usize) -> Option<&'static str> {
    match width {
        768 => Some("Stable Diffusion 1.x"),
        1024 => Some("Stable Diffusion 2.x"),
        1280 => Some("the Stable Diffusion XL refiner"),
        2048 => Some("Stable Diffusion XL"),
        _ => None,
    }
}

fn check_holds_lora(file: &AdapterFile, names: &[String]) -> Result<()> {
    let parts: Vec<Option<Part>> = names.iter().map(|name| keys::parse(name).map(|key| key.part)).collect();
    let changes = parts.iter().any(|part| part.is_some_and(|part| part != Part::Replacement));
    // Whole models have norms that a control LoRA would replace, too; norms alone are a change.
    let replaces = !parts.is_empty() && parts.iter().all(Option::is_some);
    if changes || replaces {
        return Ok(());
    }
    Err(file.bad(match names {
        [] => "holds no tensor; fetch the file again".into(),
        names => {
            format!("holds no LoRA (its tensors are {}); correct `model_name` or `weight_name`", first_names(names))
        }
    }))
}

impl Lora {
    /// Reads a LoRA file of any dialect.
    pub fn read(file: &AdapterFile) -> Result<Self> {
        let mut unknown = Vec::new();
        let mut grouped: BTreeMap<(Component, String), Parts> = BTreeMap::new();
        for (name, tensor) in file.read()? {
            match keys::parse(&name) {
                Some(key) => {
                    grouped.entry((key.component, key.module)).or_default().insert(key.part, (name, tensor));
                }
                None => unknown.push(name),
            }
        }
        let recorded = Recorded::new(&file.metadata()?);
        let modules = grouped
            .into_iter()
            .map(|((component, name), parts)| {
                let down =
                    parts.get(&Part::Down).and_then(|(name, down)| Some((keys::path(name)?, *down.dims().first()?)));
                let alpha = down.and_then(|(path, rank)| recorded.alpha(component, path, rank));
                let change =
                    Change::new(&parts, alpha).map_err(|flaw| file.bad(complaint(flaw, &parts, None, None)))?;
                Ok(Module { component, name, parts, change })
            })
            .collect::<Result<_>>()?;
        Ok(Self { file: file.clone(), modules, unknown })
    }

    /// `weights` of `component` with the file put on at this strength: other tensors where it changes them, the same
    /// ones elsewhere. A file that matches nothing is an error.
    pub fn put_on(&self, component: &str, weights: &Weights, strength: f64, context: Context<'_>) -> Result<Weights> {
        let mut unmatched = self.left_out(&[(component, weights)]);
        let plan = self.plan(component, weights, &mut unmatched)?;
        if let Some(message) = self.report(std::slice::from_ref(&plan), &unmatched)? {
            context.events.emit(Event::Warning { message });
        }
        merge(weights, &[Strengthened { plan, strength }], context)?.put_on(weights)
    }

    /// Where it was read from.
    pub fn file(&self) -> &AdapterFile {
        &self.file
    }

    /// What the file does to `component` with these weights. Tensors of modules that the component does not have are
    /// added to `unmatched`; a tensor of the wrong shape is an error.
    pub(crate) fn plan(&self, component: &str, weights: &Weights, unmatched: &mut Vec<String>) -> Result<Plan<'_>> {
        let names = Modules::of(weights);
        let mut plan = Plan { changes: Vec::new(), matched: 0 };
        let is_t5 = is_t5(weights);
        for module in self.modules.iter().filter(|module| module.component.is(component, is_t5)) {
            let places = names.find(&module.name);
            if places.is_empty() {
                unmatched.extend(module.names());
                continue;
            }
            let mut missing: Option<Vec<String>> = None;
            for place in places {
                let change = widened(self.picked(module, place)?, &place.path, weights);
                let absent = self.check(module, &change, &place.path, weights)?;
                if absent.len() < module.parts.len() {
                    plan.changes.push((place.path.clone(), change));
                }
                // A tensor that one of several modules takes has found its place.
                missing = Some(match missing {
                    None => absent,
                    Some(before) => before.into_iter().filter(|name| absent.contains(name)).collect(),
                });
            }
            let missing = missing.unwrap_or_default();
            plan.matched += module.parts.len() - missing.len();
            unmatched.extend(missing);
        }
        Ok(plan)
    }

    /// What the file does to one of the modules that it changes as one.
    fn picked<'a>(&'a self, module: &'a Module, place: &Place) -> Result<Cow<'a, Change>> {
        if place.pick == Pick::None {
            return Ok(Cow::Borrowed(&module.change));
        }
        let picked = module.change.picked(place.pick);
        picked
            .map(Cow::Owned)
            .map_err(|flaw| self.file.bad(complaint(flaw, &module.parts, Some((&place.path, &[])), self.family())))
    }

    /// Checks the shapes of one module's tensors against the model's; the names of those that the model has nothing
    /// for.
    fn check(&self, module: &Module, change: &Change, path: &str, weights: &Weights) -> Result<Vec<String>> {
        let mut missing = Vec::new();
        let bad = |reason| Err(self.file.bad(reason));
        match weights.shape_of(&format!("{path}.weight")) {
            Some(weight) => {
                if let Err(flaw) = change.check(weight.dims())
                    && !is_expansion(path, change, weight.dims())
                {
                    return bad(complaint(flaw, &module.parts, Some((path, weight.dims())), self.family()));
                }
            }
            None => missing.extend(module.names_where(|part| !is_of_bias(part))),
        }
        match (change.bias(), weights.shape_of(&format!("{path}.bias"))) {
            (Some(bias), Some(own)) if bias.elem_count() != own.elem_count() => {
                let flaw = Flaw::Misfit(bias.elem_count(), 1);
                return bad(complaint(flaw, &module.parts, Some((path, own.dims())), self.family()));
            }
            (Some(_), None) => missing.extend(module.names_where(is_of_bias)),
            _ => {}
        }
        Ok(missing)
    }

    /// The names of the tensors for components that are not among `components`, and those of no known dialect.
    pub(crate) fn left_out(&self, components: &[(&str, &Weights)]) -> Vec<String> {
        let is_there =
            |module: &Module| components.iter().any(|(name, weights)| module.component.is(name, is_t5(weights)));
        let others = self.modules.iter().filter(|module| !is_there(module));
        others.flat_map(Module::names).chain(self.unknown.iter().cloned()).collect()
    }

    /// What to tell the user when tensors were matched and when some were not: nothing, a warning, or an error when
    /// none was.
    pub(crate) fn report(&self, plans: &[Plan<'_>], unmatched: &[String]) -> Result<Option<String>> {
        let matched: usize = plans.iter().map(|plan| plan.matched).sum();
        let place = self.file.path().display();
        if matched == 0 {
            let family = self.family().map_or(String::new(), |family| format!(" It seems to be made for {family}."));
            return Err(self.file.bad(format!(
                "none of its {} tensor(s) belongs to this model (the first are {}).{family} Choose a LoRA made for the \
                 model",
                unmatched.len(),
                first_names(unmatched)
            )));
        }
        tracing::info!("LoRA `{place}`: {matched} tensors matched, {} not", unmatched.len());
        Ok((!unmatched.is_empty()).then(|| {
            format!(
                "LoRA `{place}`: {matched} tensor(s) were applied, but {} belong to nothing in this model and were \
                 passed over: {}; if the effect looks wrong, the file was made for another model",
                unmatched.len(),
                first_names(unmatched)
            )
        }))
    }

    /// The family it was made for: by its names, for a UNet by the width of the text its attention reads.
    fn family(&self) -> Option<&'static str> {
        let names = self.modules.iter().map(|module| module.name.as_str());
        match keys::made_for(names) {
            Some(MadeFor::Denoiser(Denoiser::Unet)) | None => {}
            Some(other) => return Some(other.name()),
        }
        let reader = self.modules.iter().find(|module| is_text_reader(&module.name))?;
        let (_, down) = reader.parts.get(&Part::Down)?;
        family_by_width(*down.dims().get(1)?)
    }
}

/// Whether these are the weights of a T5 encoder.
fn is_t5(weights: &Weights) -> bool {
    weights.contains("encoder.block.0.layer.0.SelfAttention.q.weight")
}

/// The change for all inputs of the first layer of a Flux transformer that sees something beside the latents, where it
/// was made for one that does not: what it does to the latents comes first, and nothing for the rest.
fn widened<'a>(change: Cow<'a, Change>, path: &str, weights: &Weights) -> Cow<'a, Change> {
    let columns = weights.shape_of(&format!("{path}.weight")).and_then(|shape| shape.dims().get(1).copied());
    match (columns, change.extent()) {
        (Some(columns), Some((_, found))) if path == FIRST_LAYER && found < columns => {
            change.widened(columns).map_or(change, Cow::Owned)
        }
        _ => change,
    }
}

/// The layer of a Flux transformer that reads the picture's tokens.
const FIRST_LAYER: &str = "x_embedder";

/// Whether a change gives the first layer of a Flux transformer more inputs: a control LoRA, for a model that sees a
/// picture beside the latents.
fn is_expansion(path: &str, change: &Change, weight: &[usize]) -> bool {
    let &[rows, columns] = weight else { return false };
    path == FIRST_LAYER && change.extent().is_some_and(|found| found.0 == rows && found.1 > columns)
}

/// Whether a part concerns the bias of a module.
fn is_of_bias(part: Part) -> bool {
    matches!(part, Part::DiffBias | Part::UpBias)
}

impl Module {
    fn names(&self) -> impl Iterator<Item = String> {
        self.names_where(|_| true)
    }

    fn names_where(&self, is_meant: impl Fn(Part) -> bool) -> impl Iterator<Item = String> {
        self.parts.iter().filter(move |(part, _)| is_meant(**part)).map(|(_, (name, _))| name.clone())
    }
}

/// What is wrong with the tensors of one module. `model` is the module's path and shape in the model, where it is
/// the model that they do not fit.
fn complaint(flaw: Flaw, parts: &Parts, model: Option<(&str, &[usize])>, family: Option<&str>) -> String {
    let listed = |(name, tensor): &(String, Tensor)| format!("`{name}` {:?}", tensor.dims());
    let tensors = parts.values().map(listed).collect::<Vec<_>>().join(", ");
    let family =
        family.map_or(String::new(), |family| format!(" made for the model (this one seems to be for {family})"));
    let remedy = format!("choose a LoRA{}", if family.is_empty() { " made for the model" } else { &family });
    let (path, shape) = model.unwrap_or_default();
    match flaw {
        Flaw::Incomplete => format!("holds a part of a module only: {tensors}; fetch the file again"),
        Flaw::Inconsistent => format!("its tensors do not fit each other: {tensors}; fetch the file again"),
        Flaw::Misfit(rows, columns) => format!(
            "its tensors {tensors} make a change of shape [{rows}, {columns}], but `{path}` of the model has shape \
             {shape:?}; {remedy}"
        ),
        Flaw::Inseparable => format!(
            "its tensors {tensors} keep the lengths of columns of several layers together, of which `{path}` is one, and \
             cannot be split; use a LoRA with lengths by row, or without DoRA"
        ),
        Flaw::Lengths(count) => format!(
            "its tensors {tensors} give {count} lengths, but `{path}` of the model has shape {shape:?}; {remedy}"
        ),
    }
}

#[cfg(test)]
mod tests;
