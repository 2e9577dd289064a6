//! `outputs` and `seed`: what came of the runs so far, and the seed of those that follow.

use dw_core::seed::Seed;

use crate::{args::parse_seed, render::text};

use super::{
    Repl,
    parse::Word,
    reply::{Failure, Reply},
};

/// How many files `outputs` lists when it is not told.
const LISTED: usize = 10;

/// `outputs`.
pub(super) fn outputs(repl: &mut Repl<'_>, words: &[Word]) -> Result<Reply, Failure> {
    let number = match words {
        [] => LISTED,
        [word] => word.text.parse().ok().filter(|number| *number > 0).ok_or_else(|| {
            Failure::usage(format!("Error: '{}' is not a number of files; use: outputs 20", word.text))
        })?,
        _ => return Err(Failure::usage("Error: Invalid format. Use: outputs 20")),
    };
    let files = &repl.state.outputs;
    if files.is_empty() {
        return Ok(Reply::answer("No files written in this session"));
    }
    let listed = &files[files.len().saturating_sub(number)..];
    Ok(Reply::answer(
        listed.iter().map(|path| format!("{}\n", text::printable(&path.display().to_string()))).collect::<String>(),
    ))
}

/// `seed`.
pub(super) fn seed(repl: &mut Repl<'_>, words: &[Word]) -> Result<Reply, Failure> {
    let word = match words {
        [] => return Ok(Reply::answer(format!("Seed: {}{}", seed_text(repl), last(repl)))),
        [word] => word.text.as_str(),
        _ => return Err(Failure::usage("Error: Invalid format. Use: seed 42, or seed 1,2,3")),
    };
    repl.state.seed =
        match word {
            "random" | "clear" => None,
            "keep" => Some(repl.state.last_seed.clone().ok_or_else(|| {
                Failure::usage("Error: There is no seed to keep yet: nothing has run in this session")
            })?),
            number => Some(parse_seed(number).map_err(|_| {
                Failure::usage(format!("Error: '{number}' is no seed; use a whole number, N,N,..., keep or random"))
            })?),
        };
    Ok(Reply::answer(format!("Seed: {}", seed_text(repl))))
}

/// The seed of the runs that follow, in words.
pub(super) fn seed_text(repl: &Repl<'_>) -> String {
    let own = || repl.state.workflow.as_ref().and_then(|loaded| loaded.document.get("seed"));
    match (&repl.state.seed, own()) {
        (Some(seed), _) => text::seed(seed),
        (None, Some(own)) => format!("{own} (the workflow's)"),
        (None, None) => "drawn at random for each run, unless a step names one".into(),
    }
}

fn last(repl: &Repl<'_>) -> String {
    let last: Option<&Seed> = repl.state.last_seed.as_ref();
    last.map(|seed| format!("\nLast run: {} ('seed keep' stays with it)", text::seed(seed))).unwrap_or_default()
}
