//! The tree while its source is being read: values may refer to later nodes, and a deleted node or property keeps its
//! place, which dtc gives to a later one of the same name.
//!
//! Each deletion, redefinition and reference is one look-up in a table, so reading takes time linear in the size of
//! the text. A deletion does not visit the contents: a node counts its lives, and each statement about it belongs to
//! one of them.

use std::collections::{HashMap, VecDeque};

use super::scan::Reference;
use super::value::Part;

/// A node's index among the drafts.
pub(super) type NodeId = usize;

/// The root's index.
pub(super) const ROOT: NodeId = 0;

/// A node's life: each deletion of the node ends one.
type Life = u32;

/// A parent's life to which no child belongs.
const NONE: Life = Life::MAX;

/// A node while the text is read.
#[derive(Default)]
pub(super) struct Draft<'a> {
    pub(super) name: &'a str,
    /// The node is dropped if nothing refers to it (`/omit-if-no-ref/`).
    pub(super) omit_unused: bool,
    life: Life,
    parent: NodeId,
    /// The life of its parent to which it belongs.
    within: Life,
    labels: Vec<(Life, Label<'a>)>,
    properties: Vec<DraftProperty<'a>>,
    children: Vec<NodeId>,
}

/// A label, and its offset in the text.
pub(super) type Label<'a> = (usize, &'a str);

/// A property while the text is read.
#[derive(Default)]
pub(super) struct DraftProperty<'a> {
    pub(super) name: &'a str,
    /// Offset in the text of its assignment.
    pub(super) at: usize,
    /// Its own labels.
    pub(super) labels: Vec<Label<'a>>,
    /// The labels within its value.
    pub(super) inner_labels: Vec<Label<'a>>,
    pub(super) parts: Vec<Part<'a>>,
    /// The life of its node to which it belongs.
    life: Life,
}

impl<'a> DraftProperty<'a> {
    /// Creates a property without a value, not yet in a node.
    pub(super) fn new(name: &'a str, at: usize, labels: Vec<Label<'a>>) -> Self {
        Self {
            name,
            at,
            labels,
            ..Self::default()
        }
    }
}

/// All nodes, indexed by name.
pub(super) struct Drafts<'a> {
    nodes: Vec<Draft<'a>>,
    children: HashMap<(NodeId, &'a str), NodeId>,
    properties: HashMap<(NodeId, &'a str), usize>,
    /// For each label, the nodes that received it, with their lives. In a valid text, at most one of them still has it.
    labels: HashMap<&'a str, VecDeque<(NodeId, Life)>>,
}

impl<'a> Drafts<'a> {
    pub(super) fn new() -> Self {
        Self {
            nodes: vec![Draft::default()],
            children: HashMap::new(),
            properties: HashMap::new(),
            labels: HashMap::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn node(&self, id: NodeId) -> &Draft<'a> {
        &self.nodes[id]
    }

    /// Returns the child with this name, if any.
    pub(super) fn child(&self, parent: NodeId, name: &str) -> Option<NodeId> {
        let child = *self.children.get(&(parent, name))?;
        (self.nodes[child].within == self.nodes[parent].life).then_some(child)
    }

    /// Returns the children, in order.
    pub(super) fn children(&self, parent: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        let Draft { life, children, .. } = &self.nodes[parent];
        let is_there = |child: &NodeId| self.nodes[*child].within == *life;
        children.iter().copied().filter(is_there)
    }

    /// Returns the first child ever added, if it still exists.
    pub(super) fn first_child(&self, parent: NodeId) -> Option<NodeId> {
        let first = *self.nodes[parent].children.first()?;
        (self.nodes[first].within == self.nodes[parent].life).then_some(first)
    }

    /// Returns the properties of a node, in order.
    pub(super) fn properties(&self, id: NodeId) -> impl Iterator<Item = &DraftProperty<'a>> {
        let Draft {
            life, properties, ..
        } = &self.nodes[id];
        properties.iter().filter(|property| property.life == *life)
    }

    /// Returns the property with this name, if any.
    pub(super) fn property(&self, id: NodeId, name: &str) -> Option<&DraftProperty<'a>> {
        let place = *self.properties.get(&(id, name))?;
        let property = &self.nodes[id].properties[place];
        (property.life == self.nodes[id].life).then_some(property)
    }

    /// Returns the labels of a node.
    pub(super) fn labels(&self, id: NodeId) -> impl Iterator<Item = &Label<'a>> {
        let Draft { life, labels, .. } = &self.nodes[id];
        let own = labels.iter().filter(move |(of, _)| of == life);
        own.map(|(_, label)| label)
    }

    /// Returns the child with this name, adds it if it is missing, or restores it if it was deleted. Also returns
    /// whether no node with this name ever existed.
    pub(super) fn open_child(&mut self, parent: NodeId, name: &'a str) -> (NodeId, bool) {
        let within = self.nodes[parent].life;
        if let Some(child) = self.children.get(&(parent, name)).copied() {
            let draft = &mut self.nodes[child];
            if draft.within != within {
                // The deletion included the node's contents.
                draft.life += 1;
                draft.within = within;
            }
            return (child, false);
        }
        let child = self.nodes.len();
        self.nodes.push(Draft {
            name,
            parent,
            within,
            ..Draft::default()
        });
        self.nodes[parent].children.push(child);
        self.children.insert((parent, name), child);
        (child, true)
    }

    /// Marks a node to be dropped if nothing refers to it.
    pub(super) fn omit_unused(&mut self, id: NodeId) {
        self.nodes[id].omit_unused = true;
    }

    pub(super) fn add_label(&mut self, id: NodeId, label: Label<'a>) {
        let life = self.nodes[id].life;
        self.nodes[id].labels.push((life, label));
        let there = self.labels.entry(label.1).or_default();
        there.push_back((id, life));
    }

    /// Sets a property: replaces the one with its name, or adds it after all others.
    pub(super) fn set_property(&mut self, id: NodeId, mut property: DraftProperty<'a>) {
        let Draft {
            life, properties, ..
        } = &mut self.nodes[id];
        property.life = *life;
        let Some(place) = self.properties.get(&(id, property.name)) else {
            self.properties
                .insert((id, property.name), properties.len());
            properties.push(property);
            return;
        };
        let there = &mut properties[*place];
        if there.life == *life {
            // dtc keeps the labels of the property itself, and not those in its value.
            let mut labels = std::mem::take(&mut there.labels);
            labels.append(&mut property.labels);
            property.labels = labels;
        }
        *there = property;
    }

    pub(super) fn delete_property(&mut self, id: NodeId, name: &str) {
        if let Some(place) = self.properties.get(&(id, name)) {
            self.nodes[id].properties[*place].life = NONE;
        }
    }

    /// Deletes a node and its contents.
    pub(super) fn delete(&mut self, id: NodeId) {
        let draft = &mut self.nodes[id];
        draft.life += 1;
        draft.within = NONE;
    }

    /// Returns the node to which a reference points at this moment.
    pub(super) fn find(&mut self, reference: Reference<'a>) -> Option<NodeId> {
        let label = match reference {
            Reference::Path(path) => return self.at_path(path),
            Reference::Label(label) => label,
        };
        loop {
            let (id, life) = *self.labels.get(label)?.front()?;
            if self.nodes[id].life == life && self.is_there(id) {
                return Some(id);
            }
            // The node's life with this label has ended.
            self.labels.get_mut(label)?.pop_front();
        }
    }

    /// Returns the node at an absolute path.
    pub(super) fn at_path(&self, path: &str) -> Option<NodeId> {
        let mut parts = path.split('/').filter(|part| !part.is_empty());
        parts.try_fold(ROOT, |node, part| self.child(node, part))
    }

    /// Returns whether neither the node nor one of its ancestors was deleted.
    fn is_there(&self, mut id: NodeId) -> bool {
        while id != ROOT {
            let draft = &self.nodes[id];
            if draft.within != self.nodes[draft.parent].life {
                return false;
            }
            id = draft.parent;
        }
        true
    }

    /// Writes the path of a node; empty for the root.
    pub(super) fn write_path(&self, id: NodeId, bytes: &mut Vec<u8>) {
        if id != ROOT {
            let draft = &self.nodes[id];
            self.write_path(draft.parent, bytes);
            bytes.push(b'/');
            bytes.extend_from_slice(draft.name.as_bytes());
        }
    }
}
