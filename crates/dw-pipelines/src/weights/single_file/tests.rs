//! Recognition and configurations of the published models, from names and shapes alone.

use std::collections::BTreeSet;

use serde_json::json;

use super::{
    contents::Family,
    dit_shapes as dit,
    ldm_shapes::{self as ldm, REFINER, SD15, SD21, Unet, XL},
    *,
};
use crate::models::{UnetConfig, VaeConfig};

fn sd1(unet: &Unet) -> Shapes {
    let mut shapes = Shapes::new();
    ldm::unet(&mut shapes, "model.diffusion_model.", unet);
    ldm::vae(&mut shapes, "first_stage_model.");
    ldm::clip(&mut shapes, "cond_stage_model.transformer.");
    shapes
}

fn sd2(unet: &Unet) -> Shapes {
    let mut shapes = Shapes::new();
    ldm::unet(&mut shapes, "model.diffusion_model.", unet);
    ldm::vae(&mut shapes, "first_stage_model.");
    ldm::open_clip(&mut shapes, "cond_stage_model.model.", 1024, 24);
    shapes
}

fn xl(unet: &Unet) -> Shapes {
    let mut shapes = Shapes::new();
    ldm::unet(&mut shapes, "model.diffusion_model.", unet);
    ldm::vae(&mut shapes, "first_stage_model.");
    ldm::clip(&mut shapes, "conditioner.embedders.0.transformer.");
    ldm::open_clip(&mut shapes, "conditioner.embedders.1.model.", 1280, 32);
    shapes
}

fn refiner() -> Shapes {
    let mut shapes = Shapes::new();
    ldm::unet(&mut shapes, "model.diffusion_model.", &REFINER);
    ldm::vae(&mut shapes, "first_stage_model.");
    ldm::open_clip(&mut shapes, "conditioner.embedders.0.model.", 1280, 32);
    shapes
}

/// Flux as ComfyUI packs it, with everything inside.
fn flux(guidance: bool) -> Shapes {
    let mut shapes = Shapes::new();
    dit::flux(&mut shapes, "model.diffusion_model.", guidance, 64);
    dit::vae(&mut shapes, "vae.");
    ldm::clip(&mut shapes, "text_encoders.clip_l.transformer.");
    shapes.insert(String::from("text_encoders.clip_l.transformer.text_projection.weight"), vec![768, 768]);
    shapes.insert(String::from("text_encoders.clip_l.logit_scale"), vec![]);
    dit::t5(&mut shapes, "text_encoders.t5xxl.transformer.");
    shapes
}

/// Stable Diffusion 3 with everything inside.
fn sd3(model: &dit::Mmdit) -> Shapes {
    let mut shapes = Shapes::new();
    dit::mmdit(&mut shapes, "model.diffusion_model.", model);
    dit::vae(&mut shapes, "first_stage_model.");
    ldm::clip(&mut shapes, "text_encoders.clip_l.transformer.");
    shapes.insert(String::from("text_encoders.clip_l.transformer.text_projection.weight"), vec![768, 768]);
    dit::clip_g(&mut shapes, "text_encoders.clip_g.transformer.");
    dit::t5(&mut shapes, "text_encoders.t5xxl.transformer.");
    shapes
}

fn published() -> [(&'static str, Family, Shapes); 14] {
    let inpaint = |unet: Unet| Unet { in_channels: 9, ..unet };
    [
        ("StableDiffusionPipeline", Family::StableDiffusion1, sd1(&SD15)),
        ("StableDiffusionInpaintPipeline", Family::StableDiffusion1, sd1(&inpaint(SD15))),
        ("StableDiffusionInstructPix2PixPipeline", Family::StableDiffusion1, sd1(&Unet { in_channels: 8, ..SD15 })),
        ("StableDiffusionPipeline", Family::StableDiffusion2, sd2(&SD21)),
        ("StableDiffusionInpaintPipeline", Family::StableDiffusion2, sd2(&inpaint(SD21))),
        ("StableDiffusionXLPipeline", Family::Xl, xl(&XL)),
        ("StableDiffusionXLInpaintPipeline", Family::Xl, xl(&inpaint(XL))),
        ("StableDiffusionXLInstructPix2PixPipeline", Family::Xl, xl(&Unet { in_channels: 8, ..XL })),
        ("StableDiffusionXLImg2ImgPipeline", Family::XlRefiner, refiner()),
        ("FluxPipeline", Family::Flux, flux(true)),
        ("FluxPipeline", Family::Flux, flux(false)),
        ("StableDiffusion3Pipeline", Family::StableDiffusion3, sd3(&dit::MEDIUM)),
        ("StableDiffusion3Pipeline", Family::StableDiffusion3, sd3(&dit::LARGE_35)),
        ("StableDiffusion3Pipeline", Family::StableDiffusion3, sd3(&dit::MEDIUM_35)),
    ]
}

fn recognise(shapes: &Shapes) -> Contents {
    Contents::recognise(shapes).expect("a known model")
}

fn config(shapes: &Shapes, part: Part) -> Value {
    let contents = recognise(shapes);
    let located = contents.find(part).expect("the part is there");
    configs::component(part, located, &contents, shapes, None).expect("a configuration")
}

fn assert_has(config: &Value, expected: &Value) {
    for (key, value) in expected.as_object().expect("an object") {
        assert_eq!(&config[key], value, "{key}");
    }
}

#[test]
fn every_published_model_is_recognised_by_its_tensors() {
    for (class, family, shapes) in published() {
        let contents = recognise(&shapes);
        assert_eq!(contents.family, family, "{class}");
        let index = configs::model_index(&contents, &shapes).expect("a pipeline");
        assert_eq!(index["_class_name"], class);
        let named: BTreeSet<&str> =
            Part::ALL.map(Part::name).into_iter().filter(|name| index.get(name).is_some()).collect();
        assert_eq!(contents.names().collect::<BTreeSet<_>>(), named, "{class}");
        assert!(contents.strays(&shapes).is_empty());
    }
}

#[test]
fn the_synthetic_models_have_as_many_weights_as_the_published_ones() {
    let count = |build: &dyn Fn(&mut Shapes)| {
        let mut shapes = Shapes::new();
        build(&mut shapes);
        shapes.values().map(|shape| shape.iter().product::<usize>()).sum::<usize>()
    };
    assert_eq!(count(&|shapes| ldm::unet(shapes, "", &SD15)), 859_520_964);
    assert_eq!(count(&|shapes| ldm::unet(shapes, "", &SD21)), 865_910_724);
    assert_eq!(count(&|shapes| ldm::unet(shapes, "", &XL)), 2_567_463_684);
    assert_eq!(count(&|shapes| ldm::vae(shapes, "")), 83_653_863);
    assert_eq!(count(&|shapes| ldm::clip(shapes, "")), 123_060_480);
    assert_eq!(count(&|shapes| dit::flux(shapes, "", true, 64)), 11_901_408_320);
    assert_eq!(count(&|shapes| dit::flux(shapes, "", false, 64)), 11_891_178_560);
    // The parameters and the table of positions.
    assert_eq!(count(&|shapes| dit::mmdit(shapes, "", &dit::MEDIUM)), 2_028_328_000 + 56_623_104);
    assert_eq!(count(&|shapes| dit::mmdit(shapes, "", &dit::LARGE_35)), 8_056_627_520 + 89_653_248);
    assert_eq!(count(&|shapes| dit::mmdit(shapes, "", &dit::MEDIUM_35)), 2_243_171_520 + 226_492_416);
    assert_eq!(count(&|shapes| dit::t5(shapes, "")), 4_762_310_656);
    assert_eq!(count(&|shapes| dit::clip_g(shapes, "")), 694_659_840);
}

#[test]
fn every_tensor_of_the_published_models_has_a_place_under_its_generated_configuration() {
    for (class, _, shapes) in published() {
        let contents = recognise(&shapes);
        for part in Part::ALL {
            let Some(located) = contents.find(part) else { continue };
            let config = without_nulls(config(&shapes, part));
            let map = match part {
                _ if located.naming == Naming::Canonical => KeyMap::identity(),
                Part::Unet => UnetLayout::of_config(&serde_json::from_value::<UnetConfig>(config).expect("valid"))
                    .expect("the lists agree")
                    .key_map(),
                Part::Vae => {
                    VaeLayout::of_config(&serde_json::from_value::<VaeConfig>(config).expect("valid")).key_map()
                }
                Part::Transformer => {
                    let tensors = Tensors::below(&shapes, located.prefix);
                    transformer::key_map(&tensors, contents.family).expect("complete")
                }
                Part::TextEncoder | Part::TextEncoder2 | Part::TextEncoder3 => clip::open_clip_key_map(32, true),
            };
            let mut seen = BTreeSet::new();
            for (full, below) in Tensors::below(&shapes, located.prefix).names() {
                let targets = map.canonical(below);
                assert!(!targets.is_empty() || contents::is_leftover(below), "{class}: {full}");
                for target in targets {
                    assert_eq!(map.original(&target.name).as_deref(), Some(below));
                    assert!(seen.insert(target.name.clone()), "{class}: two tensors become `{}`", target.name);
                }
            }
        }
    }
}

#[test]
fn the_configuration_of_stable_diffusion_1_is_the_published_one() {
    let shapes = sd1(&SD15);
    let expected = json!({
        "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
        "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64, "use_linear_projection": false,
        "norm_num_groups": 32, "transformer_layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    });
    assert_has(&config(&shapes, Part::Unet), &expected);
    let expected = json!({
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2, "scaling_factor": 0.18215, "sample_size": 512, "use_quant_conv": true,
        "use_post_quant_conv": true, "mid_block_add_attention": true,
    });
    assert_has(&config(&shapes, Part::Vae), &expected);
    let expected = json!({
        "architectures": ["CLIPTextModel"], "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    });
    assert_has(&config(&shapes, Part::TextEncoder), &expected);
    let scheduler = configs::scheduler(&recognise(&shapes), &shapes, None);
    let expected = json!({
        "_class_name": "PNDMScheduler", "prediction_type": "epsilon", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "steps_offset": 1, "skip_prk_steps": true, "set_alpha_to_one": false,
    });
    assert_has(&scheduler, &expected);
}

#[test]
fn the_configuration_of_stable_diffusion_2_is_that_of_2_1() {
    let shapes = sd2(&SD21);
    let expected = json!({
        "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 96,
        "use_linear_projection": true,
    });
    assert_has(&config(&shapes, Part::Unet), &expected);
    let expected = json!({
        "architectures": ["CLIPTextModel"], "hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16,
        "intermediate_size": 4096, "hidden_act": "gelu",
    });
    assert_has(&config(&shapes, Part::TextEncoder), &expected);
    let contents = recognise(&shapes);
    let prediction = |steps| configs::scheduler(&contents, &shapes, steps)["prediction_type"].clone();
    assert_eq!((prediction(None), prediction(Some(875_000))), (json!("v_prediction"), json!("epsilon")));
    let inpaint = sd2(&Unet { in_channels: 9, ..SD21 });
    let scheduler = configs::scheduler(&recognise(&inpaint), &inpaint, None);
    assert_eq!(scheduler["prediction_type"], "epsilon");
}

#[test]
fn an_encoder_that_comes_without_its_last_layer_keeps_all_it_has() {
    let mut shapes = sd2(&SD21);
    shapes.retain(|name, _| !name.contains("resblocks.23.") && !name.ends_with("text_projection"));
    assert_eq!(config(&shapes, Part::TextEncoder)["num_hidden_layers"], 23);
}

#[test]
fn the_configurations_of_stable_diffusion_xl_are_the_published_ones() {
    let shapes = xl(&XL);
    let expected = json!({
        "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
        "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "use_linear_projection": true,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    });
    let unet = config(&shapes, Part::Unet);
    assert_has(&unet, &expected);
    assert!(unet.get("reverse_transformer_layers_per_block").is_none(), "the way up mirrors the way down");
    assert_has(&config(&shapes, Part::Vae), &json!({ "scaling_factor": 0.13025, "sample_size": 1024 }));
    let expected = json!({
        "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "num_hidden_layers": 32,
        "num_attention_heads": 20, "intermediate_size": 5120, "projection_dim": 1280, "hidden_act": "gelu",
    });
    assert_has(&config(&shapes, Part::TextEncoder2), &expected);
    let refiner = config(&refiner(), Part::Unet);
    let expected = json!({
        "block_out_channels": [384, 768, 1536, 1536], "attention_head_dim": [6, 12, 24, 24], "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    });
    assert_has(&refiner, &expected);
    assert_eq!(refiner["transformer_layers_per_block"], json!([1, 4, 4, 4]), "the middle takes the depth of the last");
}

#[test]
fn the_configurations_of_flux_are_the_published_ones() {
    let shapes = flux(true);
    let expected = json!({
        "in_channels": 64, "out_channels": null, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": true,
        "axes_dims_rope": [16, 56, 56],
    });
    assert_has(&config(&shapes, Part::Transformer), &expected);
    let expected = json!({
        "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": false,
        "use_post_quant_conv": false,
    });
    assert_has(&config(&shapes, Part::Vae), &expected);
    assert_eq!(config(&shapes, Part::TextEncoder)["architectures"], json!(["CLIPTextModel"]));
    let expected = json!({
        "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
        "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu",
    });
    assert_has(&config(&shapes, Part::TextEncoder2), &expected);
    assert_has(&configs::scheduler(&recognise(&shapes), &shapes, None), &json!({ "use_dynamic_shifting": true }));
    let schnell = flux(false);
    let expected = json!({ "shift": 1.0, "use_dynamic_shifting": false });
    assert_has(&configs::scheduler(&recognise(&schnell), &schnell, None), &expected);
    assert_eq!(config(&schnell, Part::Transformer)["guidance_embeds"], false);
}

#[test]
fn the_inputs_of_a_flux_tell_its_pipeline() {
    for (inputs, class) in [(64, "FluxPipeline"), (128, "FluxControlPipeline"), (384, "FluxFillPipeline")] {
        let mut shapes = Shapes::new();
        dit::flux(&mut shapes, "", true, inputs);
        let contents = recognise(&shapes);
        let index = configs::model_index(&contents, &shapes).expect("a pipeline");
        assert_eq!(index["_class_name"], class);
        let outputs = if inputs == 64 { Value::Null } else { json!(64) };
        assert_has(&config(&shapes, Part::Transformer), &json!({ "in_channels": inputs, "out_channels": outputs }));
    }
}

#[test]
fn the_configurations_of_stable_diffusion_3_are_the_published_ones() {
    for (model, size, norm, dual) in [
        (dit::MEDIUM, 192, None, 0),
        (dit::LARGE_35, 192, Some("rms_norm"), 0),
        (dit::MEDIUM_35, 384, Some("rms_norm"), 13),
    ] {
        let shapes = sd3(&model);
        let expected = json!({
            "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": model.blocks, "attention_head_dim": 64,
            "num_attention_heads": model.width / 64, "joint_attention_dim": 4096, "caption_projection_dim": model.width,
            "pooled_projection_dim": 2048, "pos_embed_max_size": size, "sample_size": 128, "qk_norm": norm,
            "dual_attention_layers": (0..dual).collect::<Vec<_>>(),
        });
        assert_has(&config(&shapes, Part::Transformer), &expected);
        assert_has(&config(&shapes, Part::Vae), &json!({ "scaling_factor": 1.5305, "shift_factor": 0.0609 }));
        for (part, activation) in [(Part::TextEncoder, "quick_gelu"), (Part::TextEncoder2, "gelu")] {
            let expected = json!({ "architectures": ["CLIPTextModelWithProjection"], "hidden_act": activation });
            assert_has(&config(&shapes, part), &expected);
        }
        assert_eq!(config(&shapes, Part::TextEncoder3)["d_model"], 4096);
    }
}

#[test]
fn a_transformer_under_canonical_names_has_the_same_configuration() {
    let mut originals = vec![Shapes::new(), Shapes::new()];
    dit::flux(&mut originals[0], "", true, 64);
    dit::mmdit(&mut originals[1], "", &dit::MEDIUM_35);
    for original in originals {
        let map = transformer::key_map(&Tensors::below(&original, ""), recognise(&original).family).expect("complete");
        let canonical: Shapes = original
            .iter()
            .flat_map(|(name, shape)| {
                let renamed = |target: key_map::Target| (target.name, target.change.shape(shape).expect("fits"));
                map.canonical(name).into_iter().map(renamed)
            })
            .collect();
        assert_eq!(config(&canonical, Part::Transformer), config(&original, Part::Transformer));
    }
}

#[test]
fn an_encoder_alone_is_found_in_the_places_it_can_have() {
    let mut shapes = Shapes::new();
    dit::t5(&mut shapes, "");
    shapes.insert(String::from("scaled_fp8"), vec![2]);
    shapes.insert(String::from("encoder.block.0.layer.0.SelfAttention.q.scale_weight"), vec![]);
    let contents = recognise(&shapes);
    assert_eq!(contents.names().collect::<Vec<_>>(), ["text_encoder_2", "text_encoder_3"]);
    assert_eq!(config(&shapes, Part::TextEncoder2), config(&shapes, Part::TextEncoder3));
}

#[test]
fn what_stands_beside_eight_bit_weights_goes_with_them() {
    let mut shapes = flux(true);
    let double = "model.diffusion_model.double_blocks.0";
    shapes.insert(format!("{double}.img_attn.qkv.scale_weight"), vec![]);
    shapes.insert(format!("{double}.img_mlp.0.scale_input"), vec![]);
    shapes.insert(String::from("model.diffusion_model.scaled_fp8"), vec![0]);
    let contents = recognise(&shapes);
    assert!(contents.strays(&shapes).is_empty());
    let map = transformer::key_map(&Tensors::below(&shapes, "model.diffusion_model."), Family::Flux).expect("complete");
    let names = |name: &str| map.canonical(name).into_iter().map(|target| target.name).collect::<Vec<_>>();
    let block = "transformer_blocks.0";
    let expected = ["to_q", "to_k", "to_v"].map(|name| format!("{block}.attn.{name}.scale_weight"));
    assert_eq!(names("double_blocks.0.img_attn.qkv.scale_weight"), expected);
    assert_eq!(names("double_blocks.0.img_mlp.0.scale_input"), [format!("{block}.ff.net.0.proj.scale_input")]);
}

#[test]
fn a_mark_in_the_file_says_that_the_model_predicts_velocity() {
    let mut shapes = xl(&XL);
    shapes.insert(String::from("v_pred"), vec![0]);
    shapes.insert(String::from("ztsnr"), vec![0]);
    let contents = recognise(&shapes);
    assert!(contents.strays(&shapes).is_empty());
    let expected = json!({ "prediction_type": "v_prediction", "rescale_betas_zero_snr": true });
    assert_has(&configs::scheduler(&contents, &shapes, None), &expected);
}

#[test]
fn a_model_with_a_schedule_or_inputs_of_its_own_needs_a_configuration() {
    let mut playground = xl(&XL);
    playground.insert(String::from("edm_mean"), vec![1, 4, 1, 1]);
    for (shapes, what) in [(playground, "Playground"), (sd2(&Unet { in_channels: 5, ..SD21 }), "depth")] {
        let message = configs::model_index(&recognise(&shapes), &shapes).expect_err("no generated configuration");
        assert!(message.contains(what) && message.contains("add `config`"), "{message}");
    }
}

#[test]
fn the_unet_tells_the_family_of_a_file_without_encoders() {
    for (unet, family) in [
        (SD15, Family::StableDiffusion1),
        (SD21, Family::StableDiffusion2),
        (XL, Family::Xl),
        (REFINER, Family::XlRefiner),
    ] {
        for prefix in ["model.diffusion_model.", ""] {
            let mut shapes = Shapes::new();
            ldm::unet(&mut shapes, prefix, &unet);
            assert_eq!(recognise(&shapes).family, family);
        }
    }
}

#[test]
fn a_unet_under_canonical_names_has_the_same_configuration() {
    for unet in [SD15, SD21, XL, REFINER] {
        let mut original = Shapes::new();
        ldm::unet(&mut original, "", &unet);
        let map = UnetLayout::of_original(&Tensors::below(&original, "")).key_map();
        let renamed = |(name, shape): (&String, &Vec<usize>)| (map.canonical(name).remove(0).name, shape.clone());
        let canonical: Shapes = original.iter().map(renamed).collect();
        assert_eq!(config(&canonical, Part::Unet), config(&original, Part::Unet));
    }
}

#[test]
fn an_autoencoder_alone_is_found_with_and_without_prefix() {
    for prefix in ["first_stage_model.", "vae.", ""] {
        let mut shapes = Shapes::new();
        ldm::vae(&mut shapes, prefix);
        shapes.insert(format!("{prefix}loss.logvar"), vec![]);
        let contents = recognise(&shapes);
        assert_eq!(contents.find(Part::Vae), Some(Located { prefix, naming: Naming::Original }));
        assert_eq!(contents.names().collect::<Vec<_>>(), ["vae"]);
    }
}

#[test]
fn what_replaces_a_component_takes_from_it_what_shapes_do_not_say() {
    let mut shapes = Shapes::new();
    ldm::vae(&mut shapes, "");
    let contents = recognise(&shapes);
    let located = contents.find(Part::Vae).expect("an autoencoder");
    let with =
        |kin: Value| configs::component(Part::Vae, located, &contents, &shapes, Some(kin)).expect("a configuration");
    let kin =
        json!({ "block_out_channels": [128, 256, 512, 512], "scaling_factor": 0.13025, "latents_mean": [1, 2, 3, 4] });
    assert_has(&with(kin), &json!({ "scaling_factor": 0.13025, "latents_mean": [1, 2, 3, 4], "layers_per_block": 2 }));
    let other = with(json!({ "block_out_channels": [8], "scaling_factor": 0.5, "latents_mean": [1] }));
    assert_has(&other, &json!({ "scaling_factor": 0.18215, "latents_mean": null }));
}

#[test]
fn what_training_leaves_behind_is_passed_over_and_anything_else_is_told() {
    let mut shapes = sd1(&SD15);
    for name in ["alphas_cumprod", "betas", "model_ema.decay", "model_ema.diffusion_modelout2bias", "global_step"] {
        shapes.insert(name.to_owned(), vec![1]);
    }
    shapes.insert(String::from("denoiser.sigmas"), vec![1000]);
    shapes.insert(String::from("my_extension.weight"), vec![3]);
    assert_eq!(recognise(&shapes).strays(&shapes), ["my_extension.weight"]);
}

#[test]
fn a_model_of_unusual_width_needs_a_configuration() {
    let mut shapes = Shapes::new();
    ldm::unet(&mut shapes, "", &Unet { model_channels: 36, ..XL });
    let contents = recognise(&shapes);
    let located = contents.find(Part::Unet).expect("a UNet");
    let message = configs::component(Part::Unet, located, &contents, &shapes, None).expect_err("36 is no multiple");
    assert!(message.contains("[36, 72, 144]") && message.contains("add `config`"), "{message}");
}

#[test]
fn files_that_are_something_else_are_told_what_they_are() {
    for (name, what) in [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "LoRA"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "LoRA"),
        ("controlnet_blocks.0.weight", "ControlNet"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "ControlNet"),
        ("ip_adapter.1.to_k_ip.weight", "IP-Adapter"),
        ("clip_g", "textual inversion"),
        ("patchify_proj.weight", "another family"),
        ("something.weight", "`something.weight`"),
    ] {
        let shapes: Shapes = [(name.to_owned(), vec![4, 4])].into();
        let message = Contents::recognise(&shapes).expect_err("no model");
        assert!(message.contains(what), "{name}: {message}");
    }
}

#[test]
fn a_controlnet_in_original_layout_is_not_taken_for_a_unet() {
    let mut shapes = Shapes::new();
    ldm::unet(&mut shapes, "", &SD15);
    shapes.insert(String::from("input_hint_block.0.weight"), vec![16, 3, 3, 3]);
    assert!(Contents::recognise(&shapes).expect_err("a ControlNet").contains("ControlNet"));
}
