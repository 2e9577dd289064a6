//! The classes of Stable Diffusion 1.x, 2.x and XL.

use super::{Family, Implementation, PipelineClass, Steering, Target, Task, slot, with_slot};
use crate::pipelines::{
    loader::{Kind, Slot},
    stable_diffusion, stable_diffusion_controlnet, stable_diffusion_img2img, stable_diffusion_inpaint,
    stable_diffusion_xl, stable_diffusion_xl_controlnet, stable_diffusion_xl_img2img, stable_diffusion_xl_inpaint,
};

static STABLE_DIFFUSION_SLOTS: [Slot; 5] = [
    slot("tokenizer", Kind::Tokenizer),
    slot("text_encoder", Kind::ClipText),
    slot("unet", Kind::Unet),
    slot("vae", Kind::Vae),
    slot("image_encoder", Kind::ClipVision),
];

static STABLE_DIFFUSION_XL_SLOTS: [Slot; 7] = [
    slot("tokenizer", Kind::Tokenizer),
    slot("text_encoder", Kind::ClipText),
    slot("tokenizer_2", Kind::Tokenizer),
    slot("text_encoder_2", Kind::ClipText),
    slot("unet", Kind::Unet),
    slot("vae", Kind::Vae),
    slot("image_encoder", Kind::ClipVision),
];

static STABLE_DIFFUSION_CONTROL_SLOTS: [Slot; 6] =
    with_slot(&STABLE_DIFFUSION_SLOTS, slot("controlnet", Kind::ControlNet));

static STABLE_DIFFUSION_XL_CONTROL_SLOTS: [Slot; 8] =
    with_slot(&STABLE_DIFFUSION_XL_SLOTS, slot("controlnet", Kind::ControlNet));

pub(super) static CLASSES: &[PipelineClass] = &[
    PipelineClass {
        name: "StableDiffusionXLPipeline",
        summary: "Text to image with Stable Diffusion XL and models of its architecture",
        schema: stable_diffusion_xl::schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionXLPipeline",
            family: Family::StableDiffusionXl,
            task: Task::TextToImage,
            steering: Steering::Prompts,
            slots: &STABLE_DIFFUSION_XL_SLOTS,
            run: stable_diffusion_xl::run,
        }),
    },
    PipelineClass {
        name: "StableDiffusionPipeline",
        summary: "Text to image with Stable Diffusion 1.x and 2.x",
        schema: stable_diffusion::schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionPipeline",
            family: Family::StableDiffusion,
            task: Task::TextToImage,
            steering: Steering::Prompts,
            slots: &STABLE_DIFFUSION_SLOTS,
            run: stable_diffusion::run,
        }),
    },
    PipelineClass {
        name: "StableDiffusionXLImg2ImgPipeline",
        summary: "Image to image with Stable Diffusion XL, and its refiner",
        schema: stable_diffusion_xl_img2img::schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionXLImg2ImgPipeline",
            family: Family::StableDiffusionXl,
            task: Task::ImageToImage,
            steering: Steering::Prompts,
            slots: &STABLE_DIFFUSION_XL_SLOTS,
            run: stable_diffusion_xl_img2img::run,
        }),
    },
    PipelineClass {
        name: "StableDiffusionImg2ImgPipeline",
        summary: "Image to image with Stable Diffusion 1.x and 2.x",
        schema: stable_diffusion_img2img::schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionImg2ImgPipeline",
            family: Family::StableDiffusion,
            task: Task::ImageToImage,
            steering: Steering::Prompts,
            slots: &STABLE_DIFFUSION_SLOTS,
            run: stable_diffusion_img2img::run,
        }),
    },
    PipelineClass {
        name: "StableDiffusionXLInpaintPipeline",
        summary: "Parts of a picture painted anew with Stable Diffusion XL, inpainting models included",
        schema: stable_diffusion_xl_inpaint::schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionXLInpaintPipeline",
            family: Family::StableDiffusionXl,
            task: Task::Inpaint,
            steering: Steering::Prompts,
            slots: &STABLE_DIFFUSION_XL_SLOTS,
            run: stable_diffusion_xl_inpaint::run,
        }),
    },
    PipelineClass {
        name: "StableDiffusionInpaintPipeline",
        summary: "Parts of a picture painted anew with Stable Diffusion 1.x and 2.x, inpainting models included",
        schema: stable_diffusion_inpaint::schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionInpaintPipeline",
            family: Family::StableDiffusion,
            task: Task::Inpaint,
            steering: Steering::Prompts,
            slots: &STABLE_DIFFUSION_SLOTS,
            run: stable_diffusion_inpaint::run,
        }),
    },
    PipelineClass {
        name: "StableDiffusionXLControlNetPipeline",
        summary: "Text to image with Stable Diffusion XL, steered by pictures",
        schema: stable_diffusion_xl_controlnet::schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionXLControlNetPipeline",
            family: Family::StableDiffusionXl,
            task: Task::TextToImage,
            steering: Steering::ControlNets,
            slots: &STABLE_DIFFUSION_XL_CONTROL_SLOTS,
            run: stable_diffusion_xl_controlnet::run,
        }),
    },
    PipelineClass {
        name: "StableDiffusionXLControlNetImg2ImgPipeline",
        summary: "Image to image with Stable Diffusion XL, steered by pictures",
        schema: stable_diffusion_xl_controlnet::img2img_schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionXLControlNetImg2ImgPipeline",
            family: Family::StableDiffusionXl,
            task: Task::ImageToImage,
            steering: Steering::ControlNets,
            slots: &STABLE_DIFFUSION_XL_CONTROL_SLOTS,
            run: stable_diffusion_xl_controlnet::run_img2img,
        }),
    },
    PipelineClass {
        name: "StableDiffusionXLControlNetInpaintPipeline",
        summary: "Parts of a picture painted anew with Stable Diffusion XL, steered by pictures",
        schema: stable_diffusion_xl_controlnet::inpaint_schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionXLControlNetInpaintPipeline",
            family: Family::StableDiffusionXl,
            task: Task::Inpaint,
            steering: Steering::ControlNets,
            slots: &STABLE_DIFFUSION_XL_CONTROL_SLOTS,
            run: stable_diffusion_xl_controlnet::run_inpaint,
        }),
    },
    PipelineClass {
        name: "StableDiffusionXLControlNetUnionPipeline",
        summary: "Text to image with Stable Diffusion XL, steered by pictures of several kinds",
        schema: stable_diffusion_xl_controlnet::union_schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionXLControlNetUnionPipeline",
            family: Family::StableDiffusionXl,
            task: Task::TextToImage,
            steering: Steering::UnionControlNets,
            slots: &STABLE_DIFFUSION_XL_CONTROL_SLOTS,
            run: stable_diffusion_xl_controlnet::run_union,
        }),
    },
    PipelineClass {
        name: "StableDiffusionControlNetPipeline",
        summary: "Text to image with Stable Diffusion 1.x and 2.x, steered by pictures",
        schema: stable_diffusion_controlnet::schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionControlNetPipeline",
            family: Family::StableDiffusion,
            task: Task::TextToImage,
            steering: Steering::ControlNets,
            slots: &STABLE_DIFFUSION_CONTROL_SLOTS,
            run: stable_diffusion_controlnet::run,
        }),
    },
    PipelineClass {
        name: "StableDiffusionControlNetImg2ImgPipeline",
        summary: "Image to image with Stable Diffusion 1.x and 2.x, steered by pictures",
        schema: stable_diffusion_controlnet::img2img_schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionControlNetImg2ImgPipeline",
            family: Family::StableDiffusion,
            task: Task::ImageToImage,
            steering: Steering::ControlNets,
            slots: &STABLE_DIFFUSION_CONTROL_SLOTS,
            run: stable_diffusion_controlnet::run_img2img,
        }),
    },
    PipelineClass {
        name: "StableDiffusionControlNetInpaintPipeline",
        summary: "Parts of a picture painted anew with Stable Diffusion 1.x and 2.x, steered by pictures",
        schema: stable_diffusion_controlnet::inpaint_schema,
        target: Target::Class(Implementation {
            class: "StableDiffusionControlNetInpaintPipeline",
            family: Family::StableDiffusion,
            task: Task::Inpaint,
            steering: Steering::ControlNets,
            slots: &STABLE_DIFFUSION_CONTROL_SLOTS,
            run: stable_diffusion_controlnet::run_inpaint,
        }),
    },
];
