//! Small files that change a loaded model: LoRA and its relatives, textual inversion.
//!
//! An adapter becomes other tensors under the names the model already has: the base tensors stay as they are in
//! memory, shared, and the model is built again from them and the changed ones. No model knows of adapters.
//! Which adapters a pipeline has, and when they are put on and taken off, is decided by the pipelines.

pub mod file;
pub mod lora;
pub mod textual_inversion;

pub use file::AdapterFile;
pub use lora::Lora;
pub use textual_inversion::TextualInversion;

/// How many names a message lists before it stops.
const LISTED_NAMES: usize = 5;

/// The first few names, in backticks.
fn first_names<S: AsRef<str>>(names: &[S]) -> String {
    let listed = names.iter().take(LISTED_NAMES).map(|name| format!("`{}`", name.as_ref())).collect::<Vec<_>>();
    let more = if names.len() > LISTED_NAMES { ", …" } else { "" };
    format!("{}{more}", listed.join(", "))
}
