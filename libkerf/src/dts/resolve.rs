//! Builds the tree that a source describes: resolves references to phandles and paths, and refuses the errors that
//! dtc's checks refuse.

use std::collections::{HashMap, HashSet};

use super::draft::{DraftProperty, Drafts, Label, NodeId, ROOT};
use super::scan::{Reference, Scanner};
use super::value::{self, Part};
use super::{DtsError, DtsFault};
use crate::dtb::MAX_BLOB_BYTES;
use crate::tree::{Node, Property};

/// The properties that set a node's phandle; the second one is the older name.
const HANDLES: [&str; 2] = ["phandle", "linux,phandle"];

/// Assigns phandles to referenced nodes, and builds the tree.
pub(super) struct Resolver<'s, 'a> {
    scan: &'s Scanner<'a>,
    drafts: &'s Drafts<'a>,
    /// The node of each label.
    labels: HashMap<&'a str, NodeId>,
    /// The phandle of each node, if any.
    handles: HashMap<NodeId, u32>,
    /// The phandles from the text, and those assigned since.
    taken: HashSet<u32>,
    /// The lowest phandle that may be free.
    next: u32,
    /// The referenced nodes.
    referenced: HashSet<NodeId>,
    bytes: usize,
}

impl<'s, 'a> Resolver<'s, 'a> {
    pub(super) fn new(scan: &'s Scanner<'a>, drafts: &'s Drafts<'a>) -> Self {
        Self {
            scan,
            drafts,
            labels: HashMap::new(),
            handles: HashMap::new(),
            taken: HashSet::new(),
            next: 1,
            referenced: HashSet::new(),
            bytes: 0,
        }
    }

    pub(super) fn resolve(mut self) -> Result<Node, DtsError> {
        let mut all = Vec::with_capacity(self.drafts.len());
        self.list(ROOT, &mut all);
        self.read_labels(&all)?;
        for id in all {
            self.read_handle(id)?;
            self.check_name(id)?;
        }
        let root = self.build(ROOT)?;
        Ok(self.finish(ROOT, root))
    }

    /// Collects all existing nodes, in the order of the tree.
    fn list(&self, id: NodeId, all: &mut Vec<NodeId>) {
        all.push(id);
        for child in self.drafts.children(id) {
            self.list(child, all);
        }
    }

    /// Reads the labels. A label must be unique: it names a node, a property, or a position in a value.
    fn read_labels(&mut self, all: &[NodeId]) -> Result<(), DtsError> {
        let mut seen = HashSet::new();
        let mut check = |(at, label): &Label<'a>| match seen.insert(*label) {
            true => Ok(()),
            false => self.scan.fail_at(*at, DtsFault::Twice((*label).to_owned())),
        };
        for id in all {
            for label in self.drafts.labels(*id) {
                // A node may receive the same label again.
                if self.labels.insert(label.1, *id) != Some(*id) {
                    check(label)?;
                }
            }
            for property in self.drafts.properties(*id) {
                let mut own = HashSet::new();
                let once = property
                    .labels
                    .iter()
                    .filter(|(_, label)| own.insert(*label));
                once.chain(&property.inner_labels)
                    .try_for_each(&mut check)?;
            }
        }
        Ok(())
    }

    fn find(&self, reference: Reference<'a>) -> Option<NodeId> {
        match reference {
            Reference::Label(label) => self.labels.get(label).copied(),
            Reference::Path(path) => self.drafts.at_path(path),
        }
    }

    /// Reads the phandle of a node from the text.
    fn read_handle(&mut self, id: NodeId) -> Result<(), DtsError> {
        let mut given = None;
        for name in HANDLES {
            let Some(property) = self.drafts.property(id, name) else {
                continue;
            };
            let Some(handle) = self.handle_of(id, property)? else {
                continue;
            };
            if given.is_some_and(|given| given != handle) {
                let fault = DtsFault::Handle(format!("{handle:#x}"), "phandle is another");
                return self.scan.fail_at(property.at, fault);
            }
            if given.is_none() && !self.taken.insert(handle) {
                let twice = DtsFault::Twice(format!("phandle {handle:#x}"));
                return self.scan.fail_at(property.at, twice);
            }
            given = Some(handle);
        }
        if let Some(handle) = given {
            self.handles.insert(id, handle);
        }
        Ok(())
    }

    /// Checks that a property `name` equals the name of its node, without the unit address.
    fn check_name(&self, id: NodeId) -> Result<(), DtsError> {
        let Some(property) = self.drafts.property(id, "name") else {
            return Ok(());
        };
        let base = self
            .drafts
            .node(id)
            .name
            .split('@')
            .next()
            .unwrap_or_default();
        let is_own = match property.parts.as_slice() {
            [Part::Bytes(bytes)] => bytes.split_last() == Some((&0, base.as_bytes())),
            _ => false,
        };
        match is_own {
            true => Ok(()),
            false => self.scan.fail_at(property.at, DtsFault::NodeName),
        }
    }

    /// Returns the phandle in a property; `None` if the property refers to its own node, which then gets a free one.
    fn handle_of(&self, id: NodeId, property: &DraftProperty<'a>) -> Result<Option<u32>, DtsError> {
        let fail = |text: String, why| {
            let fault = DtsFault::Handle(text, why);
            self.scan.fail_at(property.at, fault)
        };
        if value::has_handle(&property.parts) {
            let own = property.parts.iter().all(|part| match part {
                Part::Handle(_, reference) => self.find(*reference) == Some(id),
                Part::Bytes(bytes) => bytes.is_empty(),
                Part::Path(..) => false,
            });
            return match own && value::cell(&property.parts).is_some() {
                true => Ok(None),
                false => fail(property.name.to_owned(), "it points at another node"),
            };
        }
        match value::cell(&property.parts) {
            None => fail(property.name.to_owned(), "it is not one cell"),
            Some(handle @ (0 | u32::MAX)) => {
                fail(format!("{handle:#x}"), "phandles are from 1 to 0xfffffffe")
            }
            Some(handle) => Ok(Some(handle)),
        }
    }

    fn build(&mut self, id: NodeId) -> Result<Node, DtsError> {
        let drafts = self.drafts;
        self.scan.step()?;
        let mut node = Node::new(drafts.node(id).name);
        for property in drafts.properties(id) {
            self.scan.step()?;
            // `check_name` has found it equal to the node's name: dtc omits it.
            if property.name == "name" {
                continue;
            }
            let mut bytes = Vec::new();
            for part in &property.parts {
                self.part(part, &mut bytes)?;
            }
            self.bytes += bytes.len();
            if self.bytes > MAX_BLOB_BYTES {
                return self.scan.fail_at(property.at, DtsFault::ValuesTooLarge);
            }
            node.append(Property::new(property.name, bytes));
        }
        for child in drafts.children(id) {
            node.push(self.build(child)?);
        }
        Ok(node)
    }

    fn part(&mut self, part: &Part<'a>, bytes: &mut Vec<u8>) -> Result<(), DtsError> {
        let scan = self.scan;
        let (at, reference) = match part {
            Part::Bytes(own) => {
                bytes.extend_from_slice(own);
                return Ok(());
            }
            Part::Path(at, reference) | Part::Handle(at, reference) => (*at, *reference),
        };
        let Some(node) = self.find(reference) else {
            return scan.fail_at(at, reference.unknown());
        };
        self.referenced.insert(node);
        match part {
            Part::Handle(..) => bytes.extend_from_slice(&self.handle(node).to_be_bytes()),
            _ if node == ROOT => bytes.extend_from_slice(b"/\0"),
            _ => {
                self.drafts.write_path(node, bytes);
                bytes.push(0);
            }
        }
        // A path may be long, and have many references.
        match self.bytes + bytes.len() > MAX_BLOB_BYTES {
            true => scan.fail_at(at, DtsFault::ValuesTooLarge),
            false => Ok(()),
        }
    }

    /// Returns the phandle of a node; assigns the lowest free one if it has none.
    fn handle(&mut self, node: NodeId) -> u32 {
        if let Some(handle) = self.handles.get(&node) {
            return *handle;
        }
        while !self.taken.insert(self.next) {
            self.next += 1;
        }
        self.handles.insert(node, self.next);
        self.next
    }

    /// Adds the assigned phandles, and drops nodes marked with `/omit-if-no-ref/` that have no reference.
    fn finish(&self, id: NodeId, mut node: Node) -> Node {
        if let Some(handle) = self.handles.get(&id)
            && HANDLES.iter().all(|name| node.property(name).is_none())
        {
            node.append(Property::new("phandle", handle.to_be_bytes()));
        }
        let children = std::mem::take(node.children_mut());
        for (id, child) in self.drafts.children(id).zip(children) {
            if !self.drafts.node(id).omit_unused || self.referenced.contains(&id) {
                node.push(self.finish(id, child));
            }
        }
        node
    }
}
