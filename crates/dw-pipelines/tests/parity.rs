//! Whole calls against HuggingFace diffusers: the same tiny model, arguments and seed must give the same
//! latents after every step and the same picture (`tests/parity/make.py` rebuilds the fixtures).

#[path = "parity/case.rs"]
mod case;

use case::Case;
use dw_pipelines::pipelines::ComponentCache;

fn check(prefixes: &[&str], count: usize) {
    let cases = Case::all(prefixes);
    assert_eq!(cases.len(), count);
    let mut cache = ComponentCache::new(None);
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| case.run(&mut cache).err().map(|complaint| format!("{}: {complaint}", case.name)))
        .collect();
    assert!(failures.is_empty(), "{} of {} cases differ:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

#[test]
fn stable_diffusion_draws_the_reference_pictures() {
    check(&["sd15_t2i_"], 7);
}

#[test]
fn stable_diffusion_xl_draws_the_reference_pictures() {
    check(&["sdxl_t2i_", "sdxl_guidance_rescale"], 23);
}

#[test]
fn stable_diffusion_xl_draws_the_reference_pictures_with_every_sampler() {
    check(&["sdxl_sched_"], 10);
}

#[test]
fn image_to_image_draws_the_reference_pictures() {
    check(&["sd15_i2i", "sdxl_i2i", "sdxl_refiner_i2i"], 6);
}

#[test]
fn inpainting_draws_the_reference_pictures() {
    check(&["sd15_inpaint4", "sdxl_inpaint4"], 4);
}

#[test]
fn controlnets_draw_the_reference_pictures() {
    check(&["sd15_controlnet", "sdxl_controlnet"], 9);
}

#[test]
fn a_refiner_goes_on_with_the_latents_of_a_base_model() {
    check(&["sdxl_base_refiner_ensemble"], 1);
}

#[test]
fn lora_files_of_every_dialect_change_the_picture_as_in_the_reference() {
    check(&["sdxl_lora_", "sd15_lora_"], 8);
}

#[test]
fn learned_words_draw_the_reference_picture() {
    check(&["sdxl_textual_inversion"], 1);
}

#[test]
fn pictures_are_prompts_as_the_reference_has_it() {
    check(&["sdxl_ip_adapter"], 2);
}
