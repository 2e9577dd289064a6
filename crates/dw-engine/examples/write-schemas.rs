//! Writes the published JSON Schemas of the lines that host programs and `dw worker --stdio` exchange to `schema/`.

use dw_engine::host;

fn main() -> std::io::Result<()> {
    for (name, schema) in [("host-request", host::request_schema()), ("host-answer", host::answer_schema())] {
        let path = format!("{}/../../schema/{name}.schema.json", env!("CARGO_MANIFEST_DIR"));
        let text = serde_json::to_string_pretty(&schema).map_err(std::io::Error::other)?;
        fs_err::write(path, text + "\n")?;
    }
    Ok(())
}
