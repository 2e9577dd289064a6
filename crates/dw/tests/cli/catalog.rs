//! `dw schema`, `dw pipelines`, `dw schedulers`, `dw tasks`.

use serde_json::Value;

use crate::Sandbox;

#[test]
fn the_schema_is_json() {
    let (out, _) = Sandbox::new().run(&["schema"]).exits(0);
    let schema: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
}

#[test]
fn an_unknown_name_is_wrong_usage() {
    let sandbox = Sandbox::new();
    for command in ["pipelines", "schedulers", "tasks"] {
        let (_, err) = sandbox.run(&[command, "no_such_thing"]).exits(2);
        assert!(err.contains("`no_such_thing`") && err.contains(&format!("`dw {command}` lists all")), "{err}");
    }
}

#[test]
fn lists_can_be_had_as_json() {
    let sandbox = Sandbox::new();
    for command in ["pipelines", "schedulers", "tasks"] {
        let (out, _) = sandbox.run(&[command, "--json"]).exits(0);
        assert!(serde_json::from_str::<Value>(&out).expect("JSON").is_array(), "{out}");
    }
}
