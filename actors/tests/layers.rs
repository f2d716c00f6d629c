//! The folders of `src` are layers in one fixed order (docs/architecture.md): a file uses folders above its own folder
//! in the list, and never a folder below. So there are no cycles among folders, nor among files of different folders.
//! Within a folder, a child actor holds `Recipient`s of its parent and does not name the parent's type.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::{Path, PathBuf};

/// The layers. The folders of a layer must not name each other: two jobs, or two watchers, are independent.
const LAYERS: &[&[&str]] = &[
    &["model"],
    &["platform"],
    &["resources"],
    &["generation"],
    &["watch", "capture"],
    &["morph", "recovery"],
    &["services"],
    &["instance"],
    &["supervisor"],
    &["control"],
];

fn layer_of(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            found.push(path);
        }
    }
}

/// Returns the folders that a line of code names with `crate::`.
fn named(line: &str) -> impl Iterator<Item = &str> {
    let code = line.split("//").next().unwrap_or_default();
    code.split("crate::").skip(1).map(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_');
        &rest[..end.unwrap_or(rest.len())]
    })
}

/// Files that hold the address of an actor of their own folder but are not children of that actor, with the reason.
const NO_CHILDREN: [(&str, &str); 1] = [
    // This file starts the actor, and restarts the actor after a panic.
    ("platform/transport/handle.rs", "Transport"),
];

/// Returns the code of each file below `src`, with its path relative to `src`. Unit tests are left out: they are at the
/// end of a file or in a file of their own, and may use any folder.
fn code() -> Vec<(PathBuf, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    assert!(files.len() > 80, "the sources of this crate");
    let is_test = |part: &std::ffi::OsStr| part == "tests" || part == "tests.rs";
    let read = |file: PathBuf| {
        let text = std::fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap().to_owned();
        (file.strip_prefix(&src).unwrap().to_owned(), code)
    };
    let all = files.into_iter().map(read);
    all.filter(|(within, _)| !within.iter().any(is_test))
        .collect()
}

/// Returns the actors of this crate, each with the file that implements `Actor` for the type.
fn actors(code: &[(PathBuf, String)]) -> Vec<(&Path, &str)> {
    let lines = code
        .iter()
        .flat_map(|(file, code)| code.lines().map(move |line| (file.as_path(), line)));
    lines
        .filter_map(|(file, line)| {
            let actor = line.strip_prefix("impl Actor for ")?;
            Some((file, actor.trim_end_matches(" {")))
        })
        .collect()
}

#[test]
fn a_child_holds_a_recipient_of_its_parent_and_not_its_type() {
    let code = code();
    let actors = actors(&code);
    assert!(actors.len() >= 7, "{actors:?}");
    let mut broken = Vec::new();
    for (home, actor) in actors {
        let folder = home.parent().unwrap();
        let address = format!("Addr<{actor}>");
        for (file, code) in code.iter().filter(|(file, _)| file.starts_with(folder)) {
            let allowed = file == home
                || NO_CHILDREN
                    .iter()
                    .any(|(path, of)| file == Path::new(path) && *of == actor);
            for (number, line) in code.lines().enumerate() {
                if !allowed && line.contains(&address) {
                    let line = line.trim();
                    broken.push(format!("{}:{}: {line}", file.display(), number + 1));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn a_folder_uses_those_above_it_and_none_below() {
    let mut broken = Vec::new();
    for (within, code) in code() {
        let first = within.iter().next().unwrap().to_str().unwrap();
        let own = first.trim_end_matches(".rs");
        if own == "lib" {
            continue;
        }
        let Some(layer) = layer_of(own) else {
            panic!("{within:?} is in no layer: give its folder a place in LAYERS");
        };
        for (number, line) in code.lines().enumerate() {
            for other in named(line).filter(|other| *other != own) {
                if layer_of(other).is_some_and(|of| of >= layer) {
                    broken.push(format!(
                        "{}:{}: {}",
                        within.display(),
                        number + 1,
                        line.trim()
                    ));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}
