use std::collections::HashSet;
use std::fmt::Write as _;

use thiserror::Error;

use super::scan::{is_node_name, is_property_name};
use crate::tree::{DeviceTree, MAX_DEPTH, Node, NodePath, Property};

/// A part of a tree that source text cannot express.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{path}: source text cannot express {name:?}: {why}; a blob can")]
pub struct Unprintable {
    /// The node that contains it.
    pub path: NodePath,
    /// The node's or the property's name.
    pub name: String,
    /// Why the text could not be read back as this tree.
    pub why: String,
}

/// Returns the source of a tree: the original text of an unchanged tree, otherwise a text that results in the
/// same tree. The format of each value is guessed from its bytes, since a tree has no types.
///
/// The result is read back first: [`read`](super::read) accepts it and returns the same nodes. The blob's boot
/// CPU is in a comment, as in dtc's output: source text can express it only in `/cpus`.
///
/// # Errors
///
/// A part that source text cannot express: a name, a duplicate name, or an invalid phandle.
pub fn write(tree: &DeviceTree) -> Result<String, Unprintable> {
    if let Some(text) = tree.unchanged_text() {
        return Ok(text.to_owned());
    }
    let mut text = String::from("/dts-v1/;\n");
    let boot_cpu = tree.header().boot_cpu;
    if boot_cpu != 0 {
        let _ = writeln!(text, "// boot_cpuid_phys: {boot_cpu:#x}");
    }
    text.push('\n');
    for (base, size) in &tree.header().reservations {
        let _ = writeln!(text, "/memreserve/ {base:#x} {size:#x};");
    }
    node(&mut text, tree.root(), &NodePath::root(), 0)?;
    let why = match super::read(&text) {
        Ok(again) if again.root() == tree.root() => return Ok(text),
        Ok(_) => "it reads back differently".to_owned(),
        Err(error) => format!("it does not read back: {}", error.fault),
    };
    Err(unprintable(&NodePath::root(), "/", why))
}

fn unprintable(path: &NodePath, name: &str, why: impl Into<String>) -> Unprintable {
    Unprintable {
        path: path.clone(),
        name: name.to_owned(),
        why: why.into(),
    }
}

fn node(out: &mut String, node: &Node, path: &NodePath, depth: usize) -> Result<(), Unprintable> {
    let indent = "\t".repeat(depth);
    // The root has no name in source text, but may have one in a blob.
    let is_named_right = match depth {
        0 => node.name().is_empty(),
        _ => is_node_name(node.name()),
    };
    if !is_named_right {
        return Err(unprintable(path, node.name(), "no node is called so there"));
    }
    if depth >= MAX_DEPTH {
        return Err(unprintable(path, node.name(), "it lies too deep"));
    }
    let name = if depth == 0 { "/" } else { node.name() };
    let _ = writeln!(out, "{indent}{name} {{");
    let mut names = HashSet::new();
    for property in node.properties() {
        let name = property.name();
        if !is_property_name(name) {
            return Err(unprintable(path, name, "no property is called so there"));
        }
        if !names.insert(name) {
            return Err(unprintable(path, name, "the node has two such properties"));
        }
        if name == "name" {
            let why = "a property of this name stands for the node's own";
            return Err(unprintable(path, name, why));
        }
        let _ = writeln!(out, "{indent}\t{name}{};", value(property));
    }
    let mut names = HashSet::new();
    for child in node.children() {
        if !names.insert(child.name()) {
            let why = "two nodes of this name lie beside each other";
            return Err(unprintable(path, child.name(), why));
        }
        if !out.ends_with("{\n") {
            out.push('\n');
        }
        self::node(out, child, &path.child(child.name()), depth + 1)?;
    }
    let _ = writeln!(out, "{indent}}};");
    Ok(())
}

/// ` = …`, or empty for a property without bytes.
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

/// Returns the strings of a property whose bytes look like strings.
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
