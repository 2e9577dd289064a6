//! `check_picture FILE`: whether a picture shows what the README's prompt asks for, a sunset over the
//! sea. Exit code 1, and what speaks against it, when it does not.

#[allow(dead_code, reason = "the tests measure more")]
#[path = "../tests/landscape/scene.rs"]
mod scene;

use std::process::ExitCode;

use scene::Scene;

fn main() -> ExitCode {
    let Some(file) = std::env::args().nth(1) else {
        eprintln!("usage: check_picture FILE");
        return ExitCode::from(2);
    };
    let picture = match image::open(&file) {
        Ok(picture) => picture,
        Err(error) => {
            eprintln!("{file}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let doubts = Scene(picture.to_rgb8()).doubts_about_sunset_over_sea();
    for doubt in &doubts {
        eprintln!("{file}: {doubt}");
    }
    if doubts.is_empty() {
        println!("{file} shows a sunset over the sea");
    }
    if doubts.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
