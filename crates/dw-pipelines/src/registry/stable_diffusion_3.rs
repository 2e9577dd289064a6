//! The classes of Stable Diffusion 3 and 3.5.

use super::{Family, Implementation, PipelineClass, Steering, Target, Task, slot, with_slot};
use crate::pipelines::{
    loader::{Kind, Slot},
    stable_diffusion_3, stable_diffusion_3_img2img, stable_diffusion_3_inpaint,
};

static SLOTS: [Slot; 9] = [
    slot("tokenizer", Kind::Tokenizer),
    slot("text_encoder", Kind::ClipText),
    slot("tokenizer_2", Kind::Tokenizer),
    slot("text_encoder_2", Kind::ClipText),
    slot("tokenizer_3", Kind::T5Tokenizer),
    slot("text_encoder_3", Kind::T5),
    slot("transformer", Kind::Sd3Transformer),
    slot("vae", Kind::Vae),
    slot("image_encoder", Kind::Siglip),
];

static CONTROL_SLOTS: [Slot; 10] = with_slot(&SLOTS, slot("controlnet", Kind::Sd3ControlNet));

pub(super) static CLASSES: &[PipelineClass] = &[
    PipelineClass {
        name: "StableDiffusion3Pipeline",
        summary: "Text to image with Stable Diffusion 3 and 3.5",
        schema: stable_diffusion_3::schema,
        target: Target::Class(Implementation {
            class: "StableDiffusion3Pipeline",
            family: Family::StableDiffusion3,
            task: Task::TextToImage,
            steering: Steering::Prompts,
            slots: &SLOTS,
            run: stable_diffusion_3::run,
        }),
    },
    PipelineClass {
        name: "StableDiffusion3Img2ImgPipeline",
        summary: "Image to image with Stable Diffusion 3 and 3.5",
        schema: stable_diffusion_3_img2img::schema,
        target: Target::Class(Implementation {
            class: "StableDiffusion3Img2ImgPipeline",
            family: Family::StableDiffusion3,
            task: Task::ImageToImage,
            steering: Steering::Prompts,
            slots: &SLOTS,
            run: stable_diffusion_3_img2img::run,
        }),
    },
    PipelineClass {
        name: "StableDiffusion3InpaintPipeline",
        summary: "Parts of a picture painted anew with Stable Diffusion 3 and 3.5, inpainting models included",
        schema: stable_diffusion_3_inpaint::schema,
        target: Target::Class(Implementation {
            class: "StableDiffusion3InpaintPipeline",
            family: Family::StableDiffusion3,
            task: Task::Inpaint,
            steering: Steering::Prompts,
            slots: &SLOTS,
            run: stable_diffusion_3_inpaint::run,
        }),
    },
    PipelineClass {
        name: "StableDiffusion3ControlNetPipeline",
        summary: "Text to image with Stable Diffusion 3 and 3.5, steered by pictures",
        schema: stable_diffusion_3::control_schema,
        target: Target::Class(Implementation {
            class: "StableDiffusion3ControlNetPipeline",
            family: Family::StableDiffusion3,
            task: Task::TextToImage,
            steering: Steering::ControlNets,
            slots: &CONTROL_SLOTS,
            run: stable_diffusion_3::run_control,
        }),
    },
    PipelineClass {
        name: "StableDiffusion3ControlNetInpaintingPipeline",
        summary: "Parts of a picture painted anew with Stable Diffusion 3 and 3.5, by a ControlNet made for it",
        schema: stable_diffusion_3::control_inpainting_schema,
        target: Target::Class(Implementation {
            class: "StableDiffusion3ControlNetInpaintingPipeline",
            family: Family::StableDiffusion3,
            task: Task::Inpaint,
            steering: Steering::ControlNets,
            slots: &CONTROL_SLOTS,
            run: stable_diffusion_3::run_control_inpainting,
        }),
    },
];
