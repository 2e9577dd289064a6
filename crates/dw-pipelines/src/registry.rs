//! The table of pipeline classes: what each is called, what it takes, what it is made of, what runs it. One file for
//! each family.

mod flux;
mod stable_diffusion;
mod stable_diffusion_3;

use dw_core::{arguments::Arguments, artifact::Entry, nearest::nearest};
use serde_json::Value;

use crate::{
    Error, Result,
    adapters::lora::Denoiser,
    pipelines::{
        Surroundings,
        arguments::{merged_schema, refuse_unknown},
        check::{check, check_flow_call},
        components::Parts,
        loader::{Kind, Slot},
    },
    request::{ComponentChoice, PipelineRequest},
};

/// One row of the table.
pub struct PipelineClass {
    /// The class, as a workflow's `component_type` names it.
    pub name: &'static str,
    /// What it does, in a sentence.
    pub summary: &'static str,
    /// JSON Schema (an object, with defaults) of its arguments.
    pub schema: fn() -> Value,
    target: Target,
}

/// What a class stands for.
enum Target {
    /// Itself.
    Class(Implementation),
    /// The class that the model names.
    OfModel,
    /// The class of the model's family for a task.
    OfFamily(Task),
}

/// Runs one call of a class.
pub(crate) type Run = fn(&Parts, &Arguments, Surroundings<'_>) -> Result<Entry>;

/// A class that can be loaded and run.
pub(crate) struct Implementation {
    pub(crate) class: &'static str,
    pub(crate) family: Family,
    pub(crate) task: Task,
    pub(crate) steering: Steering,
    pub(crate) slots: &'static [Slot],
    pub(crate) run: Run,
}

/// What a class makes out of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// Pictures from prompts.
    TextToImage,
    /// Pictures from prompts and pictures.
    ImageToImage,
    /// Parts of pictures painted anew.
    Inpaint,
    /// Pictures changed as prompts tell.
    Edit,
    /// Pictures made larger.
    Upscale,
    /// Prompts for another class.
    Prior,
}

/// What steers a class besides prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Steering {
    /// Nothing.
    Prompts,
    /// ControlNets, one or several.
    ControlNets,
    /// ControlNets that know several kinds of pictures.
    UnionControlNets,
}

impl Steering {
    /// What a step's own components ask for.
    pub(crate) fn of(request: &PipelineRequest) -> Self {
        match request.components.get("controlnet") {
            None | Some(ComponentChoice::Omit) => Self::Prompts,
            Some(ComponentChoice::Load(list)) if list.iter().any(|net| net.class == "ControlNetUnionModel") => {
                Self::UnionControlNets
            }
            Some(_) => Self::ControlNets,
        }
    }
}

/// Models of one family can be run by all classes of that family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// Stable Diffusion 1.x and 2.x.
    StableDiffusion,
    /// Stable Diffusion XL.
    StableDiffusionXl,
    /// Stable Diffusion's upscaler by four, which reads pixels.
    Upscaler,
    /// Stable Diffusion's upscaler by two, from latents to latents.
    LatentUpscaler,
    /// Stable Diffusion 3 and 3.5.
    StableDiffusion3,
    /// FLUX.1.
    Flux,
}

impl Family {
    /// What removes the noise in its models.
    pub(crate) fn denoiser(self) -> Denoiser {
        match self {
            Self::StableDiffusion | Self::StableDiffusionXl | Self::Upscaler | Self::LatentUpscaler => Denoiser::Unet,
            Self::StableDiffusion3 => Denoiser::StableDiffusion3,
            Self::Flux => Denoiser::Flux,
        }
    }

    /// The family of the class in a `model_index.json`, whatever the class does with the model.
    fn of(class: &str) -> Option<Self> {
        let is_other = ["StableDiffusionDepth"];
        if class.starts_with("Flux") && !class.starts_with("Flux2") {
            Some(Self::Flux)
        } else if class.starts_with("StableDiffusion3") {
            Some(Self::StableDiffusion3)
        } else if class.starts_with("StableDiffusionUpscale") {
            Some(Self::Upscaler)
        } else if class.starts_with("StableDiffusionLatentUpscale") {
            Some(Self::LatentUpscaler)
        } else if class.starts_with("StableDiffusionXL") {
            Some(Self::StableDiffusionXl)
        } else if class.starts_with("StableDiffusion") && !is_other.iter().any(|other| class.starts_with(other)) {
            Some(Self::StableDiffusion)
        } else {
            None
        }
    }
}

const fn slot(name: &'static str, kind: Kind) -> Slot {
    Slot { name, kind }
}

/// The slots of a family and one more.
const fn with_slot<const N: usize, const M: usize>(slots: &[Slot; N], last: Slot) -> [Slot; M] {
    let mut all = [last; M];
    let mut at = 0;
    while at < N {
        all[at] = slots[at];
        at += 1;
    }
    all
}

/// The classes that leave it to the model what they are.
static GENERAL: &[PipelineClass] = &[
    PipelineClass {
        name: "DiffusionPipeline",
        summary: "Whatever class the model's model_index.json names",
        schema: || every_argument("DiffusionPipeline", None),
        target: Target::OfModel,
    },
    PipelineClass {
        name: "AutoPipelineForText2Image",
        summary: "Text to image with whatever family the model belongs to",
        schema: || every_argument("AutoPipelineForText2Image", Some(Task::TextToImage)),
        target: Target::OfFamily(Task::TextToImage),
    },
    PipelineClass {
        name: "AutoPipelineForImage2Image",
        summary: "Image to image with whatever family the model belongs to",
        schema: || every_argument("AutoPipelineForImage2Image", Some(Task::ImageToImage)),
        target: Target::OfFamily(Task::ImageToImage),
    },
    PipelineClass {
        name: "AutoPipelineForInpainting",
        summary: "Parts of a picture painted anew with whatever family the model belongs to",
        schema: || every_argument("AutoPipelineForInpainting", Some(Task::Inpaint)),
        target: Target::OfFamily(Task::Inpaint),
    },
];

/// The classes of each family, and those that stand for any.
static FAMILIES: [&[PipelineClass]; 4] =
    [stable_diffusion::CLASSES, stable_diffusion_3::CLASSES, flux::CLASSES, GENERAL];

/// Every pipeline class of this build.
pub fn classes() -> impl Iterator<Item = &'static PipelineClass> {
    FAMILIES.iter().copied().flatten()
}

/// The row of a class.
pub(crate) fn find(name: &str) -> Result<&'static PipelineClass> {
    classes().find(|class| class.name == name).ok_or_else(|| {
        let names = || classes().map(|class| class.name);
        let hint = nearest(name, names()).map_or(String::new(), |close| format!("; did you mean `{close}`?"));
        let known = names().collect::<Vec<_>>().join("`, `");
        Error::Unsupported(format!("pipeline class `{name}` is not in this build{hint} It has `{known}`"))
    })
}

/// Checks the arguments of a call before its model is loaded, as far as the class alone tells. The remarks are about
/// what works, but was probably not meant.
pub fn check_call(class: &str, arguments: &Arguments) -> Result<Vec<String>> {
    let row = find(class)?;
    let Target::Class(implementation) = &row.target else { return Ok(Vec::new()) };
    match implementation.family {
        Family::StableDiffusion | Family::StableDiffusionXl | Family::Upscaler | Family::LatentUpscaler => {
            let schema = (row.schema)();
            refuse_unknown(row.name, arguments, &schema)?;
            check(implementation.task, &schema, arguments)
        }
        Family::StableDiffusion3 => {
            let schema = (row.schema)();
            refuse_unknown(row.name, arguments, &schema)?;
            check_flow_call(implementation.task, &schema, arguments)
        }
        // Its calls check the same once the model is there.
        Family::Flux => Ok(Vec::new()),
    }
}

/// The classes that are more than another name.
fn implementations() -> impl Iterator<Item = &'static Implementation> {
    classes().filter_map(|class| match &class.target {
        Target::Class(implementation) => Some(implementation),
        Target::OfModel | Target::OfFamily(_) => None,
    })
}

/// All arguments of all implemented classes for a task, or for every task: which of them count is known
/// once the model is.
fn every_argument(title: &str, task: Option<Task>) -> Value {
    let counts = |target: &Target| match target {
        Target::Class(implementation) => task.is_none_or(|task| task == implementation.task),
        Target::OfModel | Target::OfFamily(_) => false,
    };
    let schemas: Vec<Value> =
        classes().filter(|class| counts(&class.target)).map(|class| without_defaults((class.schema)())).collect();
    merged_schema(title, &schemas)
}

/// Defaults differ from class to class, so that a schema for several has none.
fn without_defaults(mut schema: Value) -> Value {
    for property in
        schema.get_mut("properties").and_then(Value::as_object_mut).into_iter().flat_map(|map| map.values_mut())
    {
        if let Some(property) = property.as_object_mut() {
            property.remove("default");
        }
    }
    schema
}

impl PipelineClass {
    /// The implementation for a model with this `model_index.json`, steered so where the class leaves that open.
    pub(crate) fn resolve(&self, index: &Value, steering: Steering) -> Result<&Implementation> {
        let model_class = index.get("_class_name").and_then(Value::as_str).unwrap_or_default();
        let family = Family::of(model_class);
        match &self.target {
            Target::Class(own) if family.is_none_or(|family| family == own.family) => Ok(own),
            Target::Class(own) => Err(Error::Unsupported(format!(
                "the model is a `{model_class}` and cannot be run as `{}`; use that class, or `DiffusionPipeline`",
                own.class
            ))),
            Target::OfModel => implementations()
                .find(|implementation| implementation.class == model_class)
                .ok_or_else(|| not_implemented(model_class)),
            Target::OfFamily(task) => {
                let fits = |implementation: &&Implementation| {
                    Some(implementation.family) == family
                        && implementation.task == *task
                        && implementation.steering == steering
                };
                // Some models can only be run by the class that they were made for.
                let own = implementations().filter(fits).find(|implementation| implementation.class == model_class);
                own.or_else(|| implementations().find(fits)).ok_or_else(|| not_implemented(model_class))
            }
        }
    }
}

fn not_implemented(model_class: &str) -> Error {
    let known = implementations().map(|implementation| implementation.class).collect::<Vec<_>>().join("`, `");
    Error::Unsupported(format!(
        "the model is a `{model_class}`, which this build cannot run; it runs `{known}`, choose such a model"
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn resolved(class: &str, model: &str) -> Result<&'static str, String> {
        let class = find(class).map_err(|error| error.to_string())?;
        let index = json!({ "_class_name": model });
        class.resolve(&index, Steering::Prompts).map(|found| found.class).map_err(|error| error.to_string())
    }

    #[test]
    fn general_classes_become_what_the_model_is() {
        assert_eq!(resolved("DiffusionPipeline", "StableDiffusionPipeline").as_deref(), Ok("StableDiffusionPipeline"));
        let auto = |model| resolved("AutoPipelineForText2Image", model);
        assert_eq!(auto("StableDiffusionXLImg2ImgPipeline").as_deref(), Ok("StableDiffusionXLPipeline"));
        assert_eq!(auto("StableDiffusionInpaintPipeline").as_deref(), Ok("StableDiffusionPipeline"));
        assert_eq!(auto("StableDiffusion3InpaintPipeline").as_deref(), Ok("StableDiffusion3Pipeline"));
        assert_eq!(auto("FluxPipeline").as_deref(), Ok("FluxPipeline"));
        assert_eq!(auto("FluxControlPipeline").as_deref(), Ok("FluxControlPipeline"));
        let inpainting = |model| resolved("AutoPipelineForInpainting", model);
        assert_eq!(inpainting("FluxPipeline").as_deref(), Ok("FluxInpaintPipeline"));
        assert_eq!(inpainting("FluxFillPipeline").as_deref(), Ok("FluxFillPipeline"));
        assert_eq!(resolved("DiffusionPipeline", "FluxKontextPipeline").as_deref(), Ok("FluxKontextPipeline"));
        let image = resolved("AutoPipelineForImage2Image", "StableDiffusionXLPipeline");
        assert_eq!(image.as_deref(), Ok("StableDiffusionXLImg2ImgPipeline"));
    }

    #[test]
    fn general_classes_follow_the_controlnets_of_the_step() {
        let index = json!({ "_class_name": "StableDiffusionXLPipeline" });
        let resolved = |class: &str, steering| {
            find(class).and_then(|class| class.resolve(&index, steering)).map(|found| found.class).ok()
        };
        let inpainting = "AutoPipelineForInpainting";
        assert_eq!(resolved(inpainting, Steering::Prompts), Some("StableDiffusionXLInpaintPipeline"));
        let steered = resolved(inpainting, Steering::ControlNets);
        assert_eq!(steered, Some("StableDiffusionXLControlNetInpaintPipeline"));
        let union = resolved("AutoPipelineForText2Image", Steering::UnionControlNets);
        assert_eq!(union, Some("StableDiffusionXLControlNetUnionPipeline"));
        let index = json!({ "_class_name": "StableDiffusion3Pipeline" });
        let steered = find(inpainting).and_then(|class| class.resolve(&index, Steering::ControlNets));
        assert_eq!(steered.ok().map(|found| found.class), Some("StableDiffusion3ControlNetInpaintingPipeline"));
    }

    #[test]
    fn calls_of_flows_are_checked_before_a_model_is_there() {
        let complaint = |class: &str, values: Value| {
            let values = values.as_object().expect("an object").clone();
            let arguments = Arguments { values, ..Arguments::default() };
            check_call(class, &arguments).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(complaint("StableDiffusion3Pipeline", json!({ "prompt": "a cat" })), "");
        for (class, values, expected) in [
            ("StableDiffusion3Pipeline", json!({}), "`prompt`: is missing"),
            ("StableDiffusion3Img2ImgPipeline", json!({ "prompt": "a cat" }), "`image`: is missing"),
            ("StableDiffusion3Img2ImgPipeline", json!({ "prompt": "a cat", "strength": 1.5 }), "between 0 and 1"),
            ("StableDiffusion3InpaintPipeline", json!({ "prompt": "a cat" }), "`mask_image`: is missing"),
            ("StableDiffusion3ControlNetPipeline", json!({ "prompt": "a cat" }), "`control_image`: is missing"),
        ] {
            let found = complaint(class, values);
            assert!(found.contains(expected), "{class}: {found}");
        }
    }

    #[test]
    fn classes_of_one_group_have_their_own_defaults() {
        let default =
            |class: &str, name: &str| (find(class).expect("the class").schema)()["properties"][name]["default"].clone();
        assert_eq!(default("StableDiffusionXLInpaintPipeline", "strength"), json!(0.9999));
        assert_eq!(default("StableDiffusionXLInpaintPipeline", "guidance_scale"), json!(7.5));
        assert_eq!(default("StableDiffusionXLControlNetInpaintPipeline", "guidance_scale"), json!(5.0));
        let scale = "controlnet_conditioning_scale";
        assert_eq!(default("StableDiffusionControlNetPipeline", scale), json!(1.0));
        assert_eq!(default("StableDiffusionControlNetInpaintPipeline", scale), json!(0.5));
    }

    #[test]
    fn a_class_of_another_family_is_refused_with_the_way_out() {
        let message = resolved("StableDiffusionXLPipeline", "StableDiffusionPipeline").expect_err("another family");
        assert!(message.contains("`DiffusionPipeline`"), "{message}");
        let message = resolved("DiffusionPipeline", "StableCascadeDecoderPipeline").expect_err("not implemented");
        assert!(message.contains("`StableCascadeDecoderPipeline`"), "{message}");
    }

    #[test]
    fn a_misspelt_class_suggests_the_right_one() {
        let message = resolved("StableDifusionPipeline", "").expect_err("misspelt");
        assert!(message.contains("did you mean `StableDiffusionPipeline`?"), "{message}");
    }

    #[test]
    fn every_schema_documents_every_argument_and_shows_its_default() {
        for class in classes() {
            let schema = (class.schema)();
            let properties = schema["properties"].as_object().expect("an object schema");
            for (name, property) in properties {
                assert!(property["description"].is_string(), "{}: `{name}` has no description", class.name);
            }
        }
        let schema = (find("StableDiffusionXLPipeline").expect("the class").schema)();
        assert_eq!(schema["properties"]["guidance_scale"]["default"], json!(5.0));
        assert_eq!(schema["properties"]["num_inference_steps"]["default"], json!(50));
    }
}
