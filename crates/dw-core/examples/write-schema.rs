//! Writes the published JSON Schema of a workflow to `schema/workflow.schema.json`.

fn main() -> std::io::Result<()> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../schema/workflow.schema.json");
    let text = serde_json::to_string_pretty(dw_core::workflow::schema()).map_err(std::io::Error::other)?;
    fs_err::create_dir_all(concat!(env!("CARGO_MANIFEST_DIR"), "/../../schema"))?;
    fs_err::write(path, text + "\n")
}
