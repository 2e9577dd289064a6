//! The classes of the Flux models.

use super::{Family, Implementation, PipelineClass, Run, Steering, Target, Task, slot, with_slot};
use crate::pipelines::{
    flux,
    loader::{Kind, Slot},
};

static SLOTS: [Slot; 6] = [
    slot("tokenizer", Kind::Tokenizer),
    slot("text_encoder", Kind::ClipText),
    slot("tokenizer_2", Kind::T5Tokenizer),
    slot("text_encoder_2", Kind::T5),
    slot("transformer", Kind::FluxTransformer),
    slot("vae", Kind::Vae),
];

/// Those of the classes that take IP-Adapters.
static IMAGE_PROMPT_SLOTS: [Slot; 7] = with_slot(&SLOTS, slot("image_encoder", Kind::ClipVision));

static CONTROL_SLOTS: [Slot; 8] = with_slot(&IMAGE_PROMPT_SLOTS, slot("controlnet", Kind::FluxControlNet));

static REDUX_SLOTS: [Slot; 6] = [
    slot("tokenizer", Kind::Tokenizer),
    slot("text_encoder", Kind::ClipText),
    slot("tokenizer_2", Kind::T5Tokenizer),
    slot("text_encoder_2", Kind::T5),
    slot("image_encoder", Kind::Siglip),
    slot("image_embedder", Kind::Redux),
];

/// A class that needs no other components than the plain one, and takes IP-Adapters.
const fn plain(class: &'static str, task: Task, run: Run) -> Target {
    steered_by_prompts(class, task, &IMAGE_PROMPT_SLOTS, run)
}

/// A class for a model made for it, which takes no IP-Adapters.
const fn special(class: &'static str, task: Task, run: Run) -> Target {
    steered_by_prompts(class, task, &SLOTS, run)
}

const fn steered_by_prompts(class: &'static str, task: Task, slots: &'static [Slot], run: Run) -> Target {
    let (family, steering) = (Family::Flux, Steering::Prompts);
    Target::Class(Implementation { class, family, task, steering, slots, run })
}

/// The plain class for a task comes before those that need a model made for them.
pub(super) static CLASSES: &[PipelineClass] = &[
    PipelineClass {
        name: "FluxPipeline",
        summary: "Text to image with FLUX.1 (dev, schnell, Krea)",
        schema: flux::schema,
        target: plain("FluxPipeline", Task::TextToImage, flux::run),
    },
    PipelineClass {
        name: "FluxImg2ImgPipeline",
        summary: "Image to image with FLUX.1",
        schema: flux::img2img::schema,
        target: plain("FluxImg2ImgPipeline", Task::ImageToImage, flux::img2img::run),
    },
    PipelineClass {
        name: "FluxInpaintPipeline",
        summary: "Parts of a picture painted anew with FLUX.1",
        schema: flux::inpaint::schema,
        target: plain("FluxInpaintPipeline", Task::Inpaint, flux::inpaint::run),
    },
    PipelineClass {
        name: "FluxFillPipeline",
        summary: "Parts of a picture painted anew, and pictures continued, with FLUX.1 Fill",
        schema: flux::fill::schema,
        target: special("FluxFillPipeline", Task::Inpaint, flux::fill::run),
    },
    PipelineClass {
        name: "FluxKontextPipeline",
        summary: "Pictures edited in words with FLUX.1 Kontext",
        schema: flux::kontext::schema,
        target: plain("FluxKontextPipeline", Task::ImageToImage, flux::kontext::run),
    },
    PipelineClass {
        name: "FluxControlPipeline",
        summary: "Text to image steered by edges or depth with FLUX.1 Canny and Depth",
        schema: flux::control::schema,
        target: special("FluxControlPipeline", Task::TextToImage, flux::control::run),
    },
    PipelineClass {
        name: "FluxControlNetPipeline",
        summary: "Text to image with FLUX.1, steered by ControlNets",
        schema: flux::controlnet::schema,
        target: Target::Class(Implementation {
            class: "FluxControlNetPipeline",
            family: Family::Flux,
            task: Task::TextToImage,
            steering: Steering::ControlNets,
            slots: &CONTROL_SLOTS,
            run: flux::controlnet::run,
        }),
    },
    PipelineClass {
        name: "FluxPriorReduxPipeline",
        summary: "Prompts for FLUX.1 made of pictures, with FLUX.1 Redux",
        schema: flux::redux::schema,
        target: Target::Class(Implementation {
            class: "FluxPriorReduxPipeline",
            family: Family::Flux,
            task: Task::Prior,
            steering: Steering::Prompts,
            slots: &REDUX_SLOTS,
            run: flux::redux::run,
        }),
    },
];
