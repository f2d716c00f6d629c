//! Tests that docs/configuration.md and docs/kmorphd.conf match the program.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::config::{File, Places};

fn docs(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(name)
}

fn read(text: &str) -> Result<File, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kmorphd.conf");
    std::fs::write(&path, text).unwrap();
    File::read(&path).map_err(|error| error.to_string())
}

/// The keys that the parser offers instead of an unknown one; `None` when `table` is no table.
fn offered(table: &str) -> Option<Vec<String>> {
    let head = if table.is_empty() {
        String::new()
    } else {
        format!("[{table}]\n")
    };
    let error = read(&format!("{head}no_such_key = 1\n")).unwrap_err();
    let (_, list) = error.split_once("unknown field `no_such_key`, expected ")?;
    let words = list.split('`').skip(1).step_by(2);
    Some(words.map(str::to_owned).collect())
}

/// Every key of the program, as `table.key`.
fn keys() -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    for top in offered("").unwrap() {
        match offered(&top) {
            Some(inner) => keys.extend(inner.into_iter().map(|key| format!("{top}.{key}"))),
            None => _ = keys.insert(top),
        }
    }
    assert!(
        keys.len() > 15 && keys.contains("limits.recoveries"),
        "{keys:?}"
    );
    keys
}

#[test]
fn the_page_describes_every_key_and_no_other() {
    let page = std::fs::read_to_string(docs("configuration.md")).unwrap();
    let (_, after) = page.split_once("## Keys").unwrap();
    let (tables, _) = after.split_once("## Environment").unwrap();
    let rows = tables.lines().filter_map(|line| line.strip_prefix("| `"));
    let described: BTreeSet<String> = rows
        .filter_map(|row| Some(row.split_once('`')?.0.to_owned()))
        .collect();
    assert_eq!(described, keys());
}

#[test]
fn the_example_is_the_defaults_as_it_is() {
    let text = std::fs::read_to_string(docs("kmorphd.conf")).unwrap();
    let places = || {
        let dir = PathBuf::from("/nonexistent");
        Places {
            config: None,
            state_dir: dir.clone(),
            run_dir: dir.clone(),
            kv: dir,
        }
    };
    let example = read(&text).unwrap().settings(places()).unwrap();
    assert_eq!(example, read("").unwrap().settings(places()).unwrap());
}

#[test]
fn the_example_has_every_key_and_all_of_them_parse() {
    let text = std::fs::read_to_string(docs("kmorphd.conf")).unwrap();
    let mut set = String::new();
    let mut found = BTreeSet::new();
    let mut table = String::new();
    for line in text.lines() {
        // `# text` is a comment, `#key = value` a key.
        let line = match line.strip_prefix('#') {
            Some(key) if !key.starts_with(' ') => key,
            _ => line,
        };
        set.push_str(&format!("{line}\n"));
        if let Some(name) = line.strip_prefix('[') {
            table = format!("{}.", name.trim_end_matches(']'));
        } else if let Some((key, _)) = line.split_once(" = ")
            && !line.starts_with('#')
        {
            found.insert(format!("{table}{key}"));
        }
    }
    assert_eq!(found, keys());
    read(&set).unwrap();
}
