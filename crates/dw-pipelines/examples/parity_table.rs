//! Measures how far dw is from the stored calls of the reference, and writes the tables of `docs/parity.md`.
//!
//! `cargo run --release --example parity_table` runs every case of `tests/parity/cases` and of `tests/parity/edited.json`,
//! and replaces what stands between the markers of the page; everything else on it stays as it is. A new family needs
//! nothing here but cases.

#[path = "../tests/parity/case.rs"]
mod case;
#[path = "../tests/edited/models.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod models;

use std::{error::Error, fs, path::Path};

use case::Case;
use dw_pipelines::pipelines::ComponentCache;

const BEGIN: &str = "<!-- begin of the measured table -->";
const END: &str = "<!-- end of the measured table -->";

fn main() -> Result<(), Box<dyn Error>> {
    let mut rows = stored()?;
    rows.extend(drawn());
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/parity.md");
    let text = fs::read_to_string(&page)?;
    let (Some(begin), Some(end)) = (text.find(BEGIN), text.find(END)) else {
        return Err(format!("`{}` has no `{BEGIN}` and `{END}`", page.display()).into());
    };
    let table = format!("| case | latents | levels |\n|---|---|---|\n{}", rows.concat());
    fs::write(&page, format!("{}{BEGIN}\n\n{table}\n{}", &text[..begin], &text[end..]))?;
    println!("{table}");
    Ok(())
}

/// The calls whose tensors are stored in full. One that is further off than it may be is an error.
fn stored() -> Result<Vec<String>, Box<dyn Error>> {
    let mut cache = ComponentCache::new(None);
    let row = |case: &Case| -> Result<String, Box<dyn Error>> {
        eprintln!("{}", case.name);
        let distance = case.run(&mut cache).map_err(|complaint| format!("{}: {complaint}", case.name))?;
        let levels = distance.levels.map_or("latents only".into(), |levels| levels.to_string());
        Ok(format!("| `{}` | {:.0e} | {levels} |\n", case.name, distance.latents))
    };
    Case::all(&[""]).iter().map(row).collect()
}

/// The calls of models that are drawn from seeds.
fn drawn() -> Vec<String> {
    let models = [
        ("pix2pix", models::pix2pix("sd15", "StableDiffusionInstructPix2PixPipeline")),
        ("xl_pix2pix", models::pix2pix("sdxl", "StableDiffusionXLInstructPix2PixPipeline")),
        ("upscaler", models::upscaler()),
        ("latent_upscaler", models::latent_upscaler()),
    ];
    let cases = models.iter().flat_map(|(name, model)| models::measure(name, model));
    cases.map(|case| format!("| `{}` | {:.0e} | {:.0} |\n", case.name, case.latents, case.levels)).collect()
}
