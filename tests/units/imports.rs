//! A folder of src/ imports only from folders before it in the list of modules in lib.rs.

use std::fs;
use std::path::{Path, PathBuf};

const SRC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src");

/// The folders, in order.
fn folders(lib: &str) -> Vec<&str> {
    lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect()
}

/// The modules of the crate that this code names, with the numbers of their lines.
fn imports(code: &str) -> Vec<(usize, String)> {
    // Links in comments may point anywhere. Lines keep their numbers.
    let code: Vec<_> =
        code.lines().map(|line| if line.trim_start().starts_with("//") { "" } else { line }).collect();
    let code = code.join("\n");
    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
    let mut found = Vec::new();
    for (at, path) in code.match_indices("crate::") {
        if code[..at].ends_with(is_part) {
            continue;
        }
        let line = code[..at].matches('\n').count() + 1;
        let rest = &code[at + path.len()..];
        let names = match rest.strip_prefix('{') {
            Some(group) => first_names(group),
            None => vec![name(rest)],
        };
        found.extend(names.into_iter().map(|name| (line, name.to_owned())));
    }
    found
}

/// The first name of each path in a group `{a::b, c::{d, e}}`, from behind its brace.
fn first_names(group: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut depth = 0;
    let mut start = 0;
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            ',' if depth == 0 => {
                names.push(name(&group[start..at]));
                start = at + 1;
            }
            '}' if depth == 0 => {
                names.push(name(&group[start..at]));
                break;
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

fn name(path: &str) -> &str {
    path.trim_start().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn folders_import_only_from_those_before() {
    let lib = fs::read_to_string(format!("{SRC}/lib.rs")).expect("lib.rs");
    let order = folders(&lib);
    let mut read = 0;
    let mut wrong = Vec::new();
    for (place, folder) in order.iter().enumerate() {
        for file in files(&Path::new(SRC).join(folder)) {
            read += 1;
            let code = fs::read_to_string(&file).expect("a source file");
            for (line, import) in imports(&code) {
                if !order[..=place].contains(&import.as_str()) {
                    let file = file.strip_prefix(SRC).expect("a path in src").display();
                    wrong.push(format!("src/{file}:{line}: {folder} may not import crate::{import}"));
                }
            }
        }
    }
    assert!(read > 60, "only {read} files were read");
    assert!(wrong.is_empty(), "the order of folders is {}\n{}", order.join(", "), wrong.join("\n"));
}

#[test]
fn finds_every_form_of_import() {
    let code = "use crate::a::X;\n\
                // crate::comment::X\n\
                use crate::{\n    b::{X, crate_name},\n    c, self::d,\n};\n\
                fn f() -> crate::e::Y { my_crate::f() + $crate::g!() }\n\
                pub(crate) use f::g;\n";
    let expected = [(1, "a"), (3, "b"), (3, "c"), (3, "self"), (7, "e")];
    assert_eq!(imports(code), expected.map(|(line, name)| (line, name.to_owned())));
    assert_eq!(folders("pub mod a;\n//! pub mod b;\n\npub mod c;\n"), ["a", "c"]);
}
