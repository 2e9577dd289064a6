//! The rules of the house that a reader of the sources can check (docs/ARCHITECTURE.md): which crate
//! knows which, who prints, who writes files, and that documents say what is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the crate lies in the repository")
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files below a folder of the repository whose names end in `ending`.
fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let mut folders = vec![root().join(folder)];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("a folder can be listed").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// The path of a file as seen from the root, with `/` on every system.
fn name(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).to_string_lossy().replace('\\', "/")
}

/// What a source file does outside its tests: no comments, no test module.
fn code(path: &Path) -> String {
    let source = text(path);
    let without_tests = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    without_tests.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn is_test(path: &Path) -> bool {
    matches!(path.file_name().and_then(|name| name.to_str()), Some("tests.rs" | "testing.rs"))
}

/// Fails with all complaints at once.
fn settle(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// Complains about each source below the folders that says one of the words outside its tests.
fn forbid(folders: &[&str], words: &[&str], why: &str) {
    let mut complaints = Vec::new();
    for path in folders.iter().flat_map(|folder| files(folder, ".rs")).filter(|path| !is_test(path)) {
        let code = code(&path);
        let said = words.iter().filter(|word| code.contains(**word));
        complaints.extend(said.map(|word| format!("{} says `{word}`: {why}", name(&path))));
    }
    settle(&complaints);
}

/// The packages that each package of Cargo.lock depends on, tests and all features included.
fn locked_dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let mut packages: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in text(&root().join("Cargo.lock")).split("[[package]]").skip(1) {
        let quoted = |line: &str| line.split('"').nth(1).and_then(|text| text.split(' ').next()).map(str::to_owned);
        let mut lines = package.lines();
        let own =
            lines.by_ref().find(|line| line.starts_with("name = ")).and_then(quoted).expect("a package has a name");
        let dependencies = lines.skip_while(|line| !line.starts_with("dependencies = ")).skip(1);
        packages.entry(own).or_default().extend(dependencies.map_while(quoted));
    }
    packages
}

/// Everything that a package depends on, directly or not.
fn dependency_tree(package: &str) -> BTreeSet<String> {
    let packages = locked_dependencies();
    let mut open = vec![package.to_owned()];
    let mut tree = BTreeSet::new();
    while let Some(package) = open.pop() {
        for dependency in &packages[&package] {
            if tree.insert(dependency.clone()) {
                open.push(dependency.clone());
            }
        }
    }
    tree
}

#[test]
fn arrows_between_the_crates_run_one_way() {
    let allowed: [(&str, &[&str]); 6] = [
        ("dw-core", &[]),
        ("dw-kernels", &[]),
        ("dw-pipelines", &["dw-core", "dw-kernels"]),
        ("dw-tasks", &["dw-core", "dw-kernels"]),
        ("dw-engine", &["dw-core", "dw-pipelines", "dw-tasks"]),
        ("dw", &["dw-core", "dw-engine"]),
    ];
    let packages = locked_dependencies();
    for (own, allowed) in allowed {
        for dependency in packages[own].iter().filter(|name| name.starts_with("dw-")) {
            assert!(allowed.contains(&dependency.as_str()), "`{own}` depends on `{dependency}`");
        }
    }
}

#[test]
fn the_language_depends_on_no_tensor_network_client_async_runtime_or_terminal() {
    let tree = dependency_tree("dw-core");
    assert!(tree.contains("serde_json"), "the tree was read");
    let forbidden =
        ["candle", "tokio", "async-std", "smol", "hyper", "reqwest", "ureq", "curl", "hf-hub", "clap", "indicatif"];
    for package in &tree {
        assert!(!forbidden.iter().any(|word| package.starts_with(word)), "`dw-core` depends on `{package}`");
    }
    forbid(&["crates/dw-core/src"], &["std::process", "std::net"], "the language starts nothing and asks nobody");
}

#[test]
fn only_the_program_prints() {
    let words = ["println!", "print!(", "eprint!(", "dbg!", "io::stdout", "io::stderr", "stdout()", "stderr()"];
    let libraries = ["dw-core", "dw-kernels", "dw-pipelines", "dw-tasks", "dw-engine"];
    let folders = libraries.map(|library| format!("crates/{library}/src"));
    forbid(&folders.each_ref().map(String::as_str), &words, "libraries return values and emit events");
}

#[test]
fn models_know_no_workflow_no_file_and_no_option() {
    let words = ["dw_core::workflow", "dw_core::plan", "dw_core::document", "std::path", "std::fs", "fs_err", "clap::"];
    forbid(
        &["crates/dw-pipelines/src/models", "crates/dw-pipelines/src/nn"],
        &words,
        "a model takes a configuration and weights",
    );
}

#[test]
fn pipelines_and_tasks_return_artifacts_and_write_no_file() {
    let words = ["fs::write", "File::create", "OpenOptions", "create_dir", "save("];
    let folders =
        ["models", "nn", "pipelines", "rng", "schedulers"].map(|part| format!("crates/dw-pipelines/src/{part}"));
    forbid(&folders.each_ref().map(String::as_str), &words, "only dw_core::output writes results");
    forbid(&["crates/dw-tasks/src"], &words, "only dw_core::output writes results");
}

#[test]
fn every_source_says_what_it_is_for_and_none_is_two_files() {
    let mut complaints = Vec::new();
    for path in files("crates", ".rs") {
        let source = text(&path);
        let lines = source.lines().count();
        if !source.starts_with("//! ") {
            complaints.push(format!("{} does not begin with `//!`", name(&path)));
        }
        if lines > 800 {
            complaints.push(format!("{} has {lines} lines; split it", name(&path)));
        }
    }
    settle(&complaints);
}

/// The pages of the repository: those at its root and those in docs, examples and tests.
fn pages() -> Vec<PathBuf> {
    let listed = std::fs::read_dir(root()).expect("the root can be listed").flatten().map(|entry| entry.path());
    let mut pages: Vec<PathBuf> = listed.filter(|path| path.extension().is_some_and(|ending| ending == "md")).collect();
    pages.extend(["docs", "examples", "tests"].iter().flat_map(|folder| files(folder, ".md")));
    pages
}

/// The places that a page links to, without addresses on the web.
fn links(page: &str) -> impl Iterator<Item = &str> {
    let targets = page.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets.filter(|target| !target.contains("://") && !target.starts_with("mailto:"))
}

/// The anchor that a heading has on GitHub.
fn anchor(heading: &str) -> String {
    let kept = |letter: &char| letter.is_alphanumeric() || matches!(letter, ' ' | '-' | '_');
    heading.trim_start_matches('#').trim().to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-")
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut complaints = Vec::new();
    for path in pages() {
        let page = text(&path);
        for link in links(&page) {
            let (file, place) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.with_file_name(file) };
            let is_page = target.extension().is_some_and(|ending| ending == "md");
            let has_place = || text(&target).lines().any(|line| line.starts_with('#') && anchor(line) == place);
            if !target.exists() || (is_page && !place.is_empty() && !has_place()) {
                complaints.push(format!("{} links to `{link}`, which is not there", name(&path)));
            }
        }
    }
    settle(&complaints);
}

/// The dependencies that the manifests name, workspace members left out.
fn direct_dependencies() -> BTreeSet<String> {
    let manifests = files("crates", "Cargo.toml").into_iter().map(|path| text(&path));
    let mut dependencies = BTreeSet::new();
    for manifest in manifests {
        for section in manifest
            .split("\n[")
            .filter(|section| section.split(']').next().unwrap_or_default().ends_with("dependencies"))
        {
            let keys = section.lines().skip(1).filter_map(|line| line.split(['=', '.', ' ']).next());
            dependencies.extend(
                keys.filter(|key| !key.is_empty() && !key.starts_with(['#', '[', '}', ']'])).map(str::to_owned),
            );
        }
    }
    dependencies.retain(|dependency| !dependency.starts_with("dw-"));
    dependencies
}

#[test]
fn every_dependency_is_explained_and_none_that_is_gone() {
    let page = text(&root().join("docs/dependencies.md"));
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let explained: BTreeSet<String> = rows.map(str::to_owned).collect();
    assert_eq!(explained, direct_dependencies(), "docs/dependencies.md (left) and the manifests (right) disagree");
}

#[test]
fn the_first_commands_of_the_readme_are_those_that_the_checks_run() {
    let checks = text(&root().join(".ci/run"));
    let readme = text(&root().join("README.md"));
    let commands = checks.lines().filter_map(|line| line.strip_prefix("readme '")?.strip_suffix('\''));
    let commands: Vec<&str> = commands.collect();
    assert_eq!(commands.len(), 2, "`.ci/run` runs the test command and the run command");
    for command in commands {
        assert!(readme.lines().any(|line| line.trim() == command), "README.md has no line `{command}`");
    }
}
