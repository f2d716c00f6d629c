//! The folders of `src` stand on each other in one order (docs/architecture.md): a file uses folders above its own in the
//! list, and never one below it. So there is no circle among them, and none between files of different folders.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::{Path, PathBuf};

/// Each layer with what it may not name in itself: two jobs, or two that watch, do not know each other.
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

/// The folders that a line of code names, by `crate::`.
fn named(line: &str) -> impl Iterator<Item = &str> {
    let code = line.split("//").next().unwrap_or_default();
    code.split("crate::").skip(1).map(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_');
        &rest[..end.unwrap_or(rest.len())]
    })
}

#[test]
fn a_folder_uses_those_above_it_and_none_below() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    assert!(files.len() > 80, "the sources of this crate");
    let mut broken = Vec::new();
    for file in files {
        let within = file.strip_prefix(&src).unwrap();
        let first = within.iter().next().unwrap().to_str().unwrap();
        let own = first.trim_end_matches(".rs");
        if own == "lib"
            || within
                .iter()
                .any(|part| part == "tests" || part == "tests.rs")
        {
            continue;
        }
        let Some(layer) = layer_of(own) else {
            panic!("{within:?} is in no layer: give its folder a place in LAYERS");
        };
        let text = std::fs::read_to_string(&file).unwrap();
        // Unit tests stand at the end of a file, and may use what they need.
        let code = text.split("#[cfg(test)]").next().unwrap();
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
