//! ControlNets in a single file steer like those in a folder.

use dw_core::{arguments::ArtifactRef, picture::load as load_picture};

use super::*;

/// The picture that a ControlNet from `source` makes.
fn steered(class: &str, (base, net): (&str, &str), source: ModelSource) -> Result<Vec<u8>> {
    let mut request = request(class, ModelSource::Folder(model(base)));
    request.components.insert("controlnet".into(), replacement(net, source));
    let (pipeline, events) = load(&request, &hub());
    let mut pipeline = pipeline?;
    assert_eq!(warnings(&events), Vec::<String>::new());
    let handle = ArtifactRef(0);
    let picture = load_picture(&model("../inputs/edges_64x64.png")).expect("the fixture");
    let mut values = json!({ "prompt": "a house", "num_inference_steps": 2, "height": 64, "width": 64 });
    if class.contains("Union") {
        values["control_image"] = json!([handle.to_value()]);
        values["control_mode"] = json!([0]);
    } else {
        values["image"] = handle.to_value();
    }
    let values = values.as_object().expect("an object").clone();
    let mut arguments = Arguments { values, ..Arguments::default() };
    arguments.artifacts.insert(handle.0, Artifact::image(picture));
    let cancel = CancellationToken::default();
    let context = Context { events: &Silent, cancel: &cancel };
    let mut generators = Generators::from_seed(&Seed::One(7), NoiseDialect::Cpu);
    let entry = pipeline.run(&arguments, &mut generators, context)?;
    let [Artifact::Image(picture)] = entry.artifacts.as_slice() else { panic!("expected one picture") };
    Ok(picture.to_rgb8().into_raw())
}

#[test]
fn a_controlnet_may_come_from_a_file_in_either_layout() {
    for (class, base, net, blocks) in [
        ("StableDiffusionControlNetPipeline", "sd15", "sd15-controlnet", SD15_BLOCKS),
        ("StableDiffusionXLControlNetPipeline", "sdxl", "sdxl-controlnet-a", SDXL_BLOCKS),
    ] {
        let kind = "ControlNetModel";
        let folder = ModelSource::Folder(model(net));
        let expected = steered(class, (base, kind), folder).expect("the folder");
        let canonical = component(net, "");
        for tensors in [
            original::controlnet(&canonical, blocks, "control_model."),
            original::controlnet(&canonical, blocks, ""),
            canonical.clone(),
        ] {
            let temp = TempFolder::new();
            let found = steered(class, (base, kind), single(temp.write(&tensors), None)).expect("the file");
            assert!(found == expected, "{class}");
        }
    }
}

#[test]
fn a_controlnet_for_several_kinds_of_pictures_needs_its_configuration_when_it_has_an_unusual_width() {
    let (class, net) = ("StableDiffusionXLControlNetUnionPipeline", "sdxl-controlnet-union");
    let kind = ("sdxl", "ControlNetUnionModel");
    let expected = steered(class, kind, ModelSource::Folder(model(net))).expect("the folder");
    let temp = TempFolder::new();
    let path = temp.write(&component(net, ""));
    let found = steered(class, kind, single(path.clone(), Some(net))).expect("the file with a configuration");
    assert!(found == expected);
    let message = steered(class, kind, single(path, None)).expect_err("an unusual width").to_string();
    assert!(message.contains("add `config`"), "{message}");
}

#[test]
fn a_controlnet_is_no_model_and_another_familys_is_refused_before_weights_are_read() {
    let temp = TempFolder::new();
    let path = temp.write(&original::controlnet(&component("sd15-controlnet", ""), SD15_BLOCKS, "control_model."));
    let message = complaint(&request("StableDiffusionPipeline", single(path.clone(), None)));
    assert!(message.contains("is a ControlNet, not a model"), "{message}");
    let mut wrong = request("StableDiffusionXLControlNetPipeline", ModelSource::Folder(model("sdxl")));
    wrong.components.insert("controlnet".into(), replacement("ControlNetModel", single(path, Some("sd15-controlnet"))));
    let message = complaint(&wrong);
    assert!(message.contains("use a ControlNet made for this family"), "{message}");
}
