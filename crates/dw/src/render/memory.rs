//! A fit plan in words: one line during a run, a table before one.

use dw_core::fit::{FitPlan, Verdict};

use super::{table::Table, text::bytes};

/// What a pipeline will need, in one line.
pub(crate) fn line(plan: &FitPlan) -> String {
    let limit = plan.limit.map_or(String::new(), |limit| format!(" of {}", bytes(limit)));
    let verdict = match plan.verdict {
        Verdict::Fits | Verdict::Unknown => "",
        Verdict::Tight => ", which is tight",
        Verdict::TooLarge => ", which does not fit",
    };
    format!(
        "memory: about {}{limit} on {} at most, in the stage `{}`{verdict} ({}{})",
        bytes(plan.peak),
        plan.device,
        plan.peak_stage,
        weights(plan),
        offload(plan)
    )
}

/// The components with their weights, the largest first.
fn weights(plan: &FitPlan) -> String {
    let mut components: Vec<_> = plan.components.iter().collect();
    components.sort_by_key(|component| std::cmp::Reverse(component.bytes));
    let each = components.iter().map(|component| format!("{} {}", component.name, bytes(component.bytes)));
    each.chain([format!("activations {}", bytes(plan.activations))]).collect::<Vec<_>>().join(", ")
}

fn offload(plan: &FitPlan) -> String {
    let chosen = if plan.is_chosen { " chosen" } else { "" };
    let offload = match plan.offload.as_str() {
        "none" => String::new(),
        mode => format!("; offload `{mode}`{chosen}"),
    };
    let tiles = if plan.tiles_vae { "; vae in tiles" } else { "" };
    format!("{offload}{tiles}")
}

/// Everything that a plan says, in lines that begin with two blanks.
pub(crate) fn table(plan: &FitPlan) -> String {
    let mut table = Table::plain(5);
    for component in &plan.components {
        let at_once = match component.at_once {
            all if all == component.bytes => String::new(),
            some => format!("{} at a time", bytes(some)),
        };
        let presence = if component.is_loaded { "loaded already" } else { component.presence.as_str() };
        table.row([
            format!("    {}", component.name),
            component.dtype.clone(),
            bytes(component.bytes),
            presence.to_owned(),
            at_once,
        ]);
    }
    let mut text = format!("  {} for a picture of {}x{}\n{}", line(plan), plan.size[1], plan.size[0], table.render());
    for other in plan.alternatives.iter().filter(|other| other.fits) {
        text += &format!("    with {} about {}\n", other.setting, bytes(other.peak));
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use dw_core::fit::{Alternative, ComponentFit};

    use super::*;

    pub(in super::super) fn plan() -> FitPlan {
        let component = |name: &str, bytes| ComponentFit {
            name: name.into(),
            dtype: "f32".into(),
            bytes,
            at_once: bytes,
            presence: "in its stage".into(),
            is_loaded: false,
        };
        FitPlan {
            device: "cpu".into(),
            components: vec![component("text_encoder", 500_000_000), component("unet", 3_400_000_000)],
            offload: "model".into(),
            is_chosen: true,
            size: [512, 768],
            activations: 200_000_000,
            peak: 3_700_000_000,
            peak_stage: "denoise".into(),
            limit: Some(4_000_000_000),
            verdict: Verdict::Tight,
            alternatives: vec![Alternative { setting: r#""offload": "group""#.into(), peak: 900_000_000, fits: true }],
            ..FitPlan::default()
        }
    }

    #[test]
    fn a_line_has_the_numbers_and_what_was_chosen() {
        assert_eq!(
            line(&plan()),
            "memory: about 3.7 GB of 4.0 GB on cpu at most, in the stage `denoise`, which is tight (unet 3.4 GB, \
             text_encoder 500.0 MB, activations 200.0 MB; offload `model` chosen)"
        );
    }

    #[test]
    fn a_table_also_has_the_size_and_what_would_fit() {
        let text = table(&plan());
        for part in ["for a picture of 768x512", "in its stage", r#"with "offload": "group" about 900.0 MB"#] {
            assert!(text.contains(part), "{text} lacks {part}");
        }
    }
}
