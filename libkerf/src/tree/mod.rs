//! A device tree in memory: nodes, properties, paths. This module is independent of multikernel.
//!
//! All contents keep their order, known or unknown. An unchanged tree is written back byte for byte.

mod edit;
mod path;
mod value;

use serde::{Deserialize, Serialize};
use std::sync::Arc;

pub use path::NodePath;
pub use value::Shape;

/// Maximum nesting of nodes, including the root. The deepest tree of kerf or the kernel has nine
/// levels.
pub const MAX_DEPTH: usize = 64;

/// Maximum length of the name of a node or property, in bytes. The specification allows 31 and a unit address.
pub const MAX_NAME_BYTES: usize = 255;

/// A device tree: its root, and the other contents of its blob.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct DeviceTree {
    root: Node,
    header: Header,
    origin: Origin,
}

/// The contents of a blob apart from its nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Header {
    /// The physical id of the CPU that boots, from the blob's header.
    pub boot_cpu: u32,
    /// The memory reservations: base and size, in bytes.
    pub reservations: Vec<(u64, u64)>,
    /// The blob's strings. A changed tree keeps them and appends new ones, so that unchanged parts
    /// stay in place.
    pub(crate) strings: Vec<u8>,
}

/// The source of a tree. It is dropped when the tree is changed.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
enum Origin {
    #[default]
    Made,
    Blob(Arc<[u8]>),
    Text(Arc<str>),
}

/// A node: a name, properties and children, each in their original order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Node {
    name: String,
    properties: Vec<Property>,
    children: Vec<Node>,
}

/// A property: a name and bytes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Property {
    // Shared: a large tree repeats few names.
    name: Arc<str>,
    value: Vec<u8>,
}

impl DeviceTree {
    /// Creates a tree with this root, without an original blob or text.
    #[must_use]
    pub fn new(root: Node) -> Self {
        Self {
            root,
            ..Self::default()
        }
    }

    pub(crate) fn from_blob(root: Node, header: Header, blob: &[u8]) -> Self {
        Self {
            root,
            header,
            origin: Origin::Blob(blob.into()),
        }
    }

    pub(crate) fn from_text(root: Node, header: Header, text: &str) -> Self {
        Self {
            root,
            header,
            origin: Origin::Text(text.into()),
        }
    }

    /// Returns the root node.
    #[must_use]
    pub fn root(&self) -> &Node {
        &self.root
    }

    /// Returns the root node, mutable. From then on the tree is encoded again, not copied from its source.
    pub fn root_mut(&mut self) -> &mut Node {
        self.origin = Origin::Made;
        &mut self.root
    }

    /// Returns the contents of the blob apart from its nodes.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns the original blob of an unchanged tree.
    #[must_use]
    pub fn unchanged_blob(&self) -> Option<&[u8]> {
        match &self.origin {
            Origin::Blob(blob) => Some(blob),
            _ => None,
        }
    }

    /// Returns the original source text of an unchanged tree.
    #[must_use]
    pub fn unchanged_text(&self) -> Option<&str> {
        match &self.origin {
            Origin::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns the node at an absolute path; each part is looked up as by [`Node::child`].
    #[must_use]
    pub fn node(&self, path: &str) -> Option<&Node> {
        let mut node = &self.root;
        for part in path::parts(path)? {
            node = node.child(part)?;
        }
        Some(node)
    }
}

/// Two trees are equal if their nodes and reservations are; their origin does not count.
impl PartialEq for DeviceTree {
    fn eq(&self, other: &Self) -> bool {
        self.root == other.root
            && self.header.boot_cpu == other.header.boot_cpu
            && self.header.reservations == other.header.reservations
    }
}

impl Eq for DeviceTree {}

impl Node {
    /// Creates a node without properties or children. The root's name is empty.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            properties: Vec::new(),
            children: Vec::new(),
        }
    }

    /// Returns the name, with its unit address.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the part of the name after `@`.
    #[must_use]
    pub fn unit_address(&self) -> Option<&str> {
        self.name.split_once('@').map(|(_, unit)| unit)
    }

    /// Returns the properties, in order.
    #[must_use]
    pub fn properties(&self) -> &[Property] {
        &self.properties
    }

    /// Returns the children, in order.
    #[must_use]
    pub fn children(&self) -> &[Node] {
        &self.children
    }

    /// Returns the children whose name starts with `prefix`, in order.
    pub fn children_with_prefix<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = &'a Node> + 'a {
        self.children
            .iter()
            .filter(move |child| child.name.starts_with(prefix))
    }

    /// Returns the first child with this name, by the rules of libfdt, kerf and the kernel: a name
    /// without a unit address also finds a node that has one.
    #[must_use]
    pub fn child(&self, name: &str) -> Option<&Node> {
        self.children
            .iter()
            .find(|child| path::is_found_by(&child.name, name))
    }

    /// Returns the first property with this name.
    #[must_use]
    pub fn property(&self, name: &str) -> Option<&Property> {
        self.properties
            .iter()
            .find(|property| &*property.name == name)
    }

    /// Returns the number of levels of nodes, including this one.
    #[must_use]
    pub fn depth(&self) -> usize {
        1 + self.children.iter().map(Node::depth).max().unwrap_or(0)
    }
}

impl Property {
    /// Creates a property with these bytes; an empty value for a flag.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>, value: impl Into<Vec<u8>>) -> Self {
        Self {
            name: name.into(),
            value: value.into(),
        }
    }

    /// Returns the name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> DeviceTree {
        DeviceTree::new(Node::new("").with_child(
            Node::new("resources@7").with_child(Node::new("memory@0").with_u64("size", 4096)),
        ))
    }

    #[test]
    fn a_name_without_unit_address_finds_a_node_that_has_one() {
        let tree = tree();
        assert_eq!(tree.node("/").unwrap().name(), "");
        assert_eq!(tree.node("/resources").unwrap().name(), "resources@7");
        assert_eq!(tree.node("/resources/memory@0").unwrap().name(), "memory@0");
        assert!(tree.node("/resources/memory@1").is_none());
        assert!(tree.node("/resource").is_none());
        assert!(tree.node("resources").is_none(), "not absolute");
    }

    #[test]
    fn depth_counts_the_root() {
        assert_eq!(tree().root().depth(), 3);
        assert_eq!(Node::new("").depth(), 1);
    }
}
