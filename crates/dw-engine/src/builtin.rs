//! The workflows inside the program, named `builtin:NAME.json`.

macro_rules! workflows {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../workflows/", $name)))),*]
    };
}

const WORKFLOWS: &[(&str, &str)] =
    workflows!["augment_prompt.json", "describe_image.json", "h3_context_ir.json", "landscape.json", "test.json"];

/// The text of the built-in workflow called `name` (with `.json`, without `builtin:`).
pub fn workflow(name: &str) -> Option<&'static str> {
    WORKFLOWS.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// The names of all built-in workflows.
pub fn names() -> impl Iterator<Item = &'static str> {
    WORKFLOWS.iter().map(|(name, _)| *name)
}
