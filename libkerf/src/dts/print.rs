use std::fmt::Write as _;

use thiserror::Error;

use super::scan::is_name;
use crate::tree::{DeviceTree, Node, NodePath, Property};

/// A name that source text has no way to write.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{path}: source text cannot write the name {name:?}; the blob can")]
pub struct Unprintable {
    /// The node that has it.
    pub path: NodePath,
    /// The name.
    pub name: String,
}

/// The source of a tree: the text it was read from when it was not changed, else a text that gives
/// the same tree. Values are shown as what they look like, since a tree does not say what they are.
///
/// # Errors
///
/// A name that source text cannot write.
pub fn write(tree: &DeviceTree) -> Result<String, Unprintable> {
    if let Some(text) = tree.unchanged_text() {
        return Ok(text.to_owned());
    }
    let mut text = String::from("/dts-v1/;\n\n");
    for (base, size) in &tree.header().reservations {
        let _ = writeln!(text, "/memreserve/ {base:#x} {size:#x};");
    }
    node(&mut text, tree.root(), &NodePath::root(), 0)?;
    Ok(text)
}

fn node(out: &mut String, node: &Node, path: &NodePath, depth: usize) -> Result<(), Unprintable> {
    let indent = "\t".repeat(depth);
    let name = if depth == 0 { "/" } else { node.name() };
    // The root has no name in source text; a blob may give it one.
    if depth > 0 || !node.name().is_empty() {
        let is_root = depth == 0;
        check(if is_root { "/" } else { name }, path).map_err(|wrong| Unprintable {
            name: node.name().to_owned(),
            ..wrong
        })?;
    }
    let _ = writeln!(out, "{indent}{name} {{");
    for property in node.properties() {
        check(property.name(), path)?;
        let _ = writeln!(out, "{indent}\t{}{};", property.name(), value(property));
    }
    for child in node.children() {
        if !out.ends_with("{\n") {
            out.push('\n');
        }
        self::node(out, child, &path.child(child.name()), depth + 1)?;
    }
    let _ = writeln!(out, "{indent}}};");
    Ok(())
}

fn check(name: &str, path: &NodePath) -> Result<(), Unprintable> {
    if !name.is_empty() && name.chars().all(is_name) {
        return Ok(());
    }
    Err(Unprintable {
        path: path.clone(),
        name: name.to_owned(),
    })
}

/// ` = …`, or nothing for a property without bytes.
fn value(property: &Property) -> String {
    let bytes = property.bytes();
    if bytes.is_empty() {
        return String::new();
    }
    if let Some(texts) = texts(property) {
        let quoted: Vec<String> = texts.iter().map(|text| quote(text)).collect();
        return format!(" = {}", quoted.join(", "));
    }
    if let Ok(cells) = property.u32_list() {
        let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:#x}")).collect();
        return format!(" = <{}>", cells.join(" "));
    }
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(" = [{}]", bytes.join(" "))
}

/// The strings of a property that looks like strings.
fn texts(property: &Property) -> Option<Vec<&str>> {
    let texts = property.text_list().ok()?;
    let printable = |text: &&str| {
        !text.is_empty()
            && text
                .bytes()
                .all(|b| matches!(b, b'\t' | b'\n' | b' '..=b'~'))
    };
    texts.iter().all(printable).then_some(texts)
}

fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '\t' => quoted.push_str("\\t"),
            '\n' => quoted.push_str("\\n"),
            '"' | '\\' => quoted.extend(['\\', c]),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}
