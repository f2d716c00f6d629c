use std::collections::{HashMap, HashSet};

use super::scan::{Reference, Scanner};
use super::value::{self, Part};
use super::{DtsError, DtsFault, MAX_TEXT_BYTES, expression};
use crate::dtb::MAX_BLOB_BYTES;
use crate::tree::{DeviceTree, Header, MAX_DEPTH, Node, Property};

/// Reads a source.
///
/// # Errors
///
/// What is wrong with the text, and where.
pub fn read(text: &str) -> Result<DeviceTree, DtsError> {
    let mut scan = Scanner::new(text);
    if text.len() > MAX_TEXT_BYTES {
        return scan.fail(DtsFault::TooLarge(text.len()));
    }
    if scan.eat("/multikernel-v1/")? {
        return scan.fail_at(0, DtsFault::KerfText);
    }
    scan.expect("/dts-v1/", "/dts-v1/; at the start")?;
    scan.expect(";", "';' after /dts-v1/")?;
    if scan.eat("/plugin/")? {
        let instead = "an overlay for multikernel names its targets with target-path";
        return scan.fail(DtsFault::Unsupported("/plugin/", instead));
    }
    let reservations = reservations(&mut scan)?;
    let mut root = Draft::default();
    top(&mut scan, &mut root)?;
    let root = Resolver::new(&scan).resolve(&mut root)?;
    let header = Header {
        reservations,
        ..Header::default()
    };
    Ok(DeviceTree::from_text(root, header, text))
}

/// A node while the text is read: its values may point at what is yet to come.
#[derive(Default)]
struct Draft<'a> {
    name: &'a str,
    labels: Vec<&'a str>,
    properties: Vec<DraftProperty<'a>>,
    children: Vec<Draft<'a>>,
}

struct DraftProperty<'a> {
    name: &'a str,
    parts: Vec<Part<'a>>,
}

impl<'a> Draft<'a> {
    /// The phandle that the text gives this node.
    fn phandle(&self) -> Option<u32> {
        let property = self.properties.iter().find(|p| p.name == "phandle")?;
        match property.parts.as_slice() {
            [Part::Bytes(bytes)] => Some(u32::from_be_bytes(bytes.as_slice().try_into().ok()?)),
            _ => None,
        }
    }

    fn child_mut(&mut self, name: &str) -> Option<&mut Draft<'a>> {
        self.children.iter_mut().find(|child| child.name == name)
    }

    fn find(&mut self, reference: Reference<'_>) -> Option<&mut Draft<'a>> {
        match reference {
            Reference::Label(label) => self.find_label(label),
            Reference::Path(path) => {
                let parts = path.split('/').filter(|part| !part.is_empty());
                let mut node = self;
                for part in parts {
                    node = node.child_mut(part)?;
                }
                Some(node)
            }
        }
    }

    fn find_label(&mut self, label: &str) -> Option<&mut Draft<'a>> {
        if self.labels.contains(&label) {
            return Some(self);
        }
        self.children
            .iter_mut()
            .find_map(|child| child.find_label(label))
    }

    fn remove(&mut self, reference: Reference<'_>) -> bool {
        let is_meant = |child: &Draft<'_>, path: &str| match reference {
            Reference::Label(label) => child.labels.contains(&label),
            Reference::Path(wanted) => path == wanted,
        };
        fn walk<'a>(
            node: &mut Draft<'a>,
            path: &str,
            is_meant: &dyn Fn(&Draft<'a>, &str) -> bool,
        ) -> bool {
            let before = node.children.len();
            node.children
                .retain(|child| !is_meant(child, &format!("{path}/{}", child.name)));
            let mut removed = node.children.len() < before;
            for child in &mut node.children {
                let path = format!("{path}/{}", child.name);
                removed |= walk(child, &path, is_meant);
            }
            removed
        }
        walk(self, "", &is_meant)
    }
}

fn reservations(scan: &mut Scanner<'_>) -> Result<Vec<(u64, u64)>, DtsError> {
    let mut found = Vec::new();
    loop {
        scan.labels()?;
        if !scan.eat("/memreserve/")? {
            return Ok(found);
        }
        let number = |scan: &mut Scanner<'_>| match expression::number(scan)? {
            Some(number) => Ok(number),
            None => scan.fail(DtsFault::Expected("a base and a size after /memreserve/")),
        };
        found.push((number(scan)?, number(scan)?));
        scan.expect(";", "';' after /memreserve/")?;
    }
}

/// The nodes of the text, one after the other: the root, and changes of what was read above.
fn top<'a>(scan: &mut Scanner<'a>, root: &mut Draft<'a>) -> Result<(), DtsError> {
    let mut any = false;
    loop {
        let labels = scan.labels()?;
        let at = scan.at();
        if scan.rest().is_empty() && any && labels.is_empty() {
            return Ok(());
        }
        if scan.eat("/delete-node/")? {
            scan.expect("&", "&label after /delete-node/")?;
            let reference = scan.reference()?;
            if !root.remove(reference) {
                return scan.fail_at(at, reference.unknown());
            }
            scan.expect(";", "';'")?;
            continue;
        }
        let node = if scan.eat("&")? {
            let reference = scan.reference()?;
            match root.find(reference) {
                Some(node) => node,
                None => return scan.fail_at(at, reference.unknown()),
            }
        } else if scan.eat("/include/")? {
            return scan.fail(DtsFault::Unsupported(
                "/include/",
                "put it all into one text",
            ));
        } else {
            scan.expect("/", "'/ {' or '&label {'")?;
            any = true;
            &mut *root
        };
        node.labels.extend(labels);
        body(scan, node, 1)?;
    }
}

/// The `{ … };` of a node, laid over what it has already.
fn body<'a>(scan: &mut Scanner<'a>, node: &mut Draft<'a>, depth: usize) -> Result<(), DtsError> {
    if depth > MAX_DEPTH {
        return scan.fail(DtsFault::Depth);
    }
    scan.expect("{", "'{'")?;
    let (mut properties, mut children) = (HashSet::new(), HashSet::new());
    let mut above = index(node);
    while !scan.eat("}")? {
        if scan.eat("/delete-node/")? {
            let name = scan.name()?;
            node.children.retain(|child| child.name != name);
            above = index(node);
            scan.expect(";", "';'")?;
            continue;
        }
        if scan.eat("/delete-property/")? {
            let name = scan.name()?;
            node.properties.retain(|property| property.name != name);
            scan.expect(";", "';'")?;
            continue;
        }
        let labels = scan.labels()?;
        let name = scan.name()?;
        let at = scan.at() - name.len();
        if name.is_empty() {
            return scan.fail(DtsFault::Expected("a property, a node, or '}'"));
        }
        scan.space()?;
        let is_node = scan.rest().starts_with('{');
        let there = if is_node {
            &mut children
        } else {
            &mut properties
        };
        if !there.insert(name) {
            return scan.fail_at(at, DtsFault::Twice(name.to_owned()));
        }
        if is_node {
            let place = *above.entry(name).or_insert_with(|| {
                node.children.push(Draft {
                    name,
                    ..Draft::default()
                });
                node.children.len() - 1
            });
            let child = &mut node.children[place];
            child.labels.extend(labels);
            body(scan, child, depth + 1)?;
        } else if children.is_empty() {
            property(scan, node, name)?;
        } else {
            return scan.fail_at(at, DtsFault::Expected("properties before the first child"));
        }
    }
    scan.expect(";", "';' after '}'")
}

/// Where the child of each name is.
fn index<'a>(node: &Draft<'a>) -> HashMap<&'a str, usize> {
    let names = node.children.iter().map(|child| child.name);
    names.zip(0..).collect()
}

fn property<'a>(
    scan: &mut Scanner<'a>,
    node: &mut Draft<'a>,
    name: &'a str,
) -> Result<(), DtsError> {
    let parts = if scan.eat("=")? {
        value::read(scan)?
    } else {
        Vec::new()
    };
    scan.expect(";", "';' after a property")?;
    match node.properties.iter_mut().find(|there| there.name == name) {
        Some(there) => there.parts = parts,
        None => node.properties.push(DraftProperty { name, parts }),
    }
    Ok(())
}

/// Gives the nodes that are pointed at a phandle, and makes the tree.
struct Resolver<'s, 'a> {
    scan: &'s Scanner<'a>,
    /// The nodes that there are, and the phandle of each that has one.
    handles: HashMap<String, Option<u32>>,
    taken: HashSet<u32>,
    next: u32,
    bytes: usize,
}

impl<'s, 'a> Resolver<'s, 'a> {
    fn new(scan: &'s Scanner<'a>) -> Self {
        Self {
            scan,
            handles: HashMap::new(),
            taken: HashSet::new(),
            next: 1,
            bytes: 0,
        }
    }

    fn resolve(mut self, root: &mut Draft<'a>) -> Result<Node, DtsError> {
        let mut labels = HashMap::new();
        self.survey(root, "", &mut labels)?;
        let mut node = self.build(root, &labels)?;
        self.give_handles(&mut node, "");
        Ok(node)
    }

    fn give_handles(&self, node: &mut Node, path: &str) {
        if let Some(Some(handle)) = self.handles.get(path)
            && node.property("phandle").is_none()
        {
            node.set(Property::new("phandle", handle.to_be_bytes()));
        }
        for child in node.children_mut() {
            let path = format!("{path}/{}", child.name());
            self.give_handles(child, &path);
        }
    }

    /// Finds out where each label and each written phandle is.
    fn survey(
        &mut self,
        node: &Draft<'a>,
        path: &str,
        labels: &mut HashMap<&'a str, String>,
    ) -> Result<(), DtsError> {
        for label in &node.labels {
            let there = labels.insert(label, path.to_owned());
            if there.is_some_and(|there| there != path) {
                return self.scan.fail(DtsFault::Twice((*label).to_owned()));
            }
        }
        let handle = node.phandle();
        if let Some(handle) = handle
            && !self.taken.insert(handle)
        {
            return self
                .scan
                .fail(DtsFault::Twice(format!("phandle {handle:#x}")));
        }
        self.handles.insert(path.to_owned(), handle);
        for child in &node.children {
            self.survey(child, &format!("{path}/{}", child.name), labels)?;
        }
        Ok(())
    }

    fn build(
        &mut self,
        draft: &Draft<'a>,
        labels: &HashMap<&str, String>,
    ) -> Result<Node, DtsError> {
        let mut node = Node::new(draft.name);
        for property in &draft.properties {
            let mut bytes = Vec::new();
            for part in &property.parts {
                self.part(part, labels, &mut bytes)?;
            }
            self.bytes += bytes.len();
            if self.bytes > MAX_BLOB_BYTES {
                return self.scan.fail(DtsFault::ValuesTooLarge);
            }
            node.append(Property::new(property.name, bytes));
        }
        for child in &draft.children {
            node.push(self.build(child, labels)?);
        }
        Ok(node)
    }

    fn part(
        &mut self,
        part: &Part<'a>,
        labels: &HashMap<&str, String>,
        bytes: &mut Vec<u8>,
    ) -> Result<(), DtsError> {
        let path_of = |at, reference: Reference<'_>| {
            let path = match reference {
                Reference::Label(label) => labels.get(label).map_or("?", String::as_str),
                Reference::Path(path) => path.trim_end_matches('/'),
            };
            match self.handles.contains_key(path) {
                true => Ok(path.to_owned()),
                false => self.scan.fail_at(at, reference.unknown()),
            }
        };
        match part {
            Part::Bytes(own) => bytes.extend_from_slice(own),
            Part::Path(at, reference) => {
                let path = path_of(*at, *reference)?;
                let path = if path.is_empty() { "/" } else { &path };
                bytes.extend_from_slice(path.as_bytes());
                bytes.push(0);
            }
            Part::Handle(at, reference) => {
                let path = path_of(*at, *reference)?;
                bytes.extend_from_slice(&self.handle(path).to_be_bytes());
            }
        }
        Ok(())
    }

    /// The phandle of a node; the lowest free one when it has none yet.
    fn handle(&mut self, path: String) -> u32 {
        if let Some(Some(handle)) = self.handles.get(&path) {
            return *handle;
        }
        while !self.taken.insert(self.next) {
            self.next += 1;
        }
        self.handles.insert(path, Some(self.next));
        self.next
    }
}
