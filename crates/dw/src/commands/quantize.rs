//! `dw quantize`: a model in fewer bits.

use dw_core::cancel::CancellationToken;
use dw_engine::{Format, QuantizeRequest, Written, quantize as write};

use crate::{
    args::QuantizeArgs,
    error::{CliError, Exit},
    interrupt,
    render::{
        Reporter,
        text::{bytes, print, say},
    },
    session::Session,
};

/// Quantizes a model and says what came out.
pub(super) fn quantize(args: &QuantizeArgs, session: &Session) -> Result<Exit, CliError> {
    let format = Format::parse(&args.to).map_err(|error| CliError::Usage(error.to_string()))?;
    let request = QuantizeRequest {
        model: args.model.clone(),
        format,
        output: args.output.clone(),
        components: args.components.clone(),
        config: args.config.clone(),
        variant: args.variant.clone(),
    };
    let cancel = CancellationToken::default();
    interrupt::cancels(&cancel, &std::sync::Arc::new(Reporter::silent()))?;
    let mut told = None;
    let mut progress = |component: &str, done: u64, total: u64| {
        let tenth = done * 10 / total.max(1);
        if !session.quiet && told != Some(tenth) {
            told = Some(tenth);
            say(&format!("{} {}%", label(component), tenth * 10));
        }
    };
    let written = write(&request, &cancel, &mut progress).map_err(|error| match error {
        dw_engine::QuantizeError::Cancelled(_) => CliError::Cancelled,
        other => CliError::Failed(other.to_string()),
    })?;
    for (component, report) in &written {
        print(&describe(component, report, format))?;
    }
    Ok(Exit::Done)
}

fn label(component: &str) -> &str {
    if component.is_empty() { "weights" } else { component }
}

fn describe(component: &str, report: &Written, format: Format) -> String {
    let smaller = match report.smaller_blocks {
        0 => String::new(),
        count => format!(", {count} in smaller blocks"),
    };
    format!(
        "{}: {} to {}; {} matrices in {format}{smaller}, {} tensors as they were\n",
        label(component),
        bytes(report.bytes_before),
        bytes(report.bytes_after),
        report.quantized,
        report.kept
    )
}
