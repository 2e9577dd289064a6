//! Editing and upscaling against HuggingFace diffusers. The models are those of the fixtures with parts of other sizes,
//! drawn from seeds as `tests/parity/make_edited.py` draws them; a few of the reference's numbers are stored.

#[path = "edited/models.rs"]
mod models;

use models::{Model, latent_upscaler, measure, pix2pix, run, upscaler};
use serde_json::{Value, json};

fn check(name: &str, model: &Model, count: usize) {
    let measured = measure(name, model);
    assert_eq!(measured.len(), count);
    for case in measured {
        assert!(case.latents.is_finite(), "{}", case.name);
        assert!(case.levels <= 1.0, "{}: the picture is off by {} levels", case.name, case.levels);
    }
}

#[test]
fn pictures_are_edited_as_in_the_reference() {
    check("pix2pix", &pix2pix("sd15", "StableDiffusionInstructPix2PixPipeline"), 3);
}

#[test]
fn pictures_are_edited_by_stable_diffusion_xl_as_in_the_reference() {
    check("xl_pix2pix", &pix2pix("sdxl", "StableDiffusionXLInstructPix2PixPipeline"), 1);
}

#[test]
fn pictures_grow_fourfold_as_in_the_reference() {
    check("upscaler", &upscaler(), 2);
}

#[test]
fn latents_grow_twofold_as_in_the_reference() {
    check("latent_upscaler", &latent_upscaler(), 2);
}

/// What is said when a call is made with these arguments besides a picture.
fn refused(model: &Model, arguments: Value) -> String {
    let mut call = json!({ "seed": 1, "image": "scene_64x64", "prompt": "a hill", "num_inference_steps": 2 });
    for (name, value) in arguments.as_object().expect("arguments") {
        call[name] = value.clone();
    }
    let call = call.as_object().expect("a call");
    run(model, call, &json!({ "steps": [] })).expect_err("the call is refused")
}

#[test]
fn calls_that_do_not_fit_the_model_are_refused_in_words() {
    let plain = Model::copy("sd15", "StableDiffusionInstructPix2PixPipeline");
    let message = refused(&plain, json!({}));
    assert!(message.contains("UNet reads 4 channels") && message.contains("4 of the picture"), "{message}");
    let message = refused(&upscaler(), json!({ "noise_level": 400 }));
    assert!(message.contains("`noise_level`") && message.contains("at most 350"), "{message}");
    let message = refused(&upscaler(), json!({ "image_guidance_scale": 1.5 }));
    assert!(message.contains("image_guidance_scale"), "{message}");
    let message = refused(&latent_upscaler(), json!({ "noise_level": 4 }));
    assert!(message.contains("noise_level"), "{message}");
}
