//! The sources of the tests, to check that the tests named in documents exist.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A source file: the path of its module, starting with the binary, and its text.
struct Source {
    module: String,
    text: String,
}

fn gather(directory: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).expect("tests are there") {
        let path = entry.expect("tests can be listed").path();
        if path.is_dir() {
            gather(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

fn sources() -> &'static [Source] {
    static SOURCES: OnceLock<Vec<Source>> = OnceLock::new();
    SOURCES.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
        let mut paths = Vec::new();
        gather(&root, &mut paths);
        let source = |path: PathBuf| {
            let relative = path.strip_prefix(&root).expect("it is in there").with_extension("");
            let parts: Vec<_> = relative.iter().map(|part| part.to_string_lossy().into_owned()).collect();
            let parts: Vec<_> = parts.into_iter().filter(|part| part != "main" && part != "mod").collect();
            Source { module: parts.join("::"), text: std::fs::read_to_string(&path).expect("text") }
        };
        paths.into_iter().map(source).collect()
    })
}

/// Files that no test binary contains: `autotests` is off, so cargo would silently ignore them.
pub fn orphans() -> Vec<&'static str> {
    let manifest = include_str!("../../Cargo.toml");
    let contains = |parent: &str, name: &str| {
        let line = format!("mod {name};");
        let declares = |source: &&Source| source.module == parent || parent.is_empty();
        sources().iter().filter(declares).any(|source| source.text.contains(&line))
    };
    let is_orphan = |module: &&str| match module.rsplit_once("::") {
        _ if manifest.contains(&format!("path = \"tests/{}", module.replace("::", "/"))) => false,
        Some((parent, name)) => !contains(parent, name),
        None => !contains("", module),
    };
    sources().iter().map(|source| source.module.as_str()).filter(is_orphan).collect()
}

/// Whether this test exists: `module::test`, or with its binary `bus::module::test`.
pub fn has_test(name: &str) -> bool {
    let Some((module, test)) = name.rsplit_once("::") else { return false };
    let is_it = |source: &&Source| {
        let without = source.module.split_once("::").map(|(_, rest)| rest);
        source.module == module || without == Some(module)
    };
    let line = format!("fn {test}()");
    sources().iter().filter(is_it).any(|source| source.text.contains(&line))
}
