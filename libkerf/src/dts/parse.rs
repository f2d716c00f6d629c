use std::collections::HashSet;

use super::draft::{DraftProperty, Drafts, Label, NodeId, ROOT};
use super::resolve::Resolver;
use super::scan::{Scanner, is_node_name, is_property_name};
use super::{DtsError, DtsFault, MAX_TEXT_BYTES, expression, value};
use crate::tree::{DeviceTree, Header, MAX_DEPTH};

/// Reads a source.
///
/// # Errors
///
/// The fault of the text and its position.
pub fn read(text: &str) -> Result<DeviceTree, DtsError> {
    read_while(text, &|| true)
}

/// Reads a source while `go_on` returns true; `go_on` is called once every few thousand words of the text.
///
/// # Errors
///
/// The fault of the text and its position; [`DtsFault::Stopped`] if `go_on` returned false.
pub fn read_while(text: &str, go_on: &dyn Fn() -> bool) -> Result<DeviceTree, DtsError> {
    let mut scan = Scanner::new(text, go_on);
    if text.len() > MAX_TEXT_BYTES {
        return scan.fail(DtsFault::TooLarge(text.len()));
    }
    if scan.eat("/multikernel-v1/")? {
        return scan.fail_at(0, DtsFault::KerfText);
    }
    scan.expect("/dts-v1/", "/dts-v1/; at the start")?;
    scan.expect(";", "';' after /dts-v1/")?;
    while scan.eat("/dts-v1/")? {
        scan.expect(";", "';' after /dts-v1/")?;
    }
    if scan.eat("/plugin/")? {
        let instead = "an overlay for multikernel names its targets with target-path";
        return scan.fail(DtsFault::Unsupported("/plugin/", instead));
    }
    let reservations = reservations(&mut scan)?;
    let mut drafts = Drafts::new();
    top(&mut scan, &mut drafts)?;
    let boot_cpu = boot_cpu(&drafts);
    let root = Resolver::new(&scan, &drafts).resolve()?;
    let header = Header {
        reservations,
        boot_cpu,
        ..Header::default()
    };
    Ok(DeviceTree::from_text(root, header, text))
}

/// Returns the boot CPU, as dtc guesses it: the `reg` of the first node in `/cpus`, if it is one cell. A deleted
/// first node counts too, and gives no value.
fn boot_cpu(drafts: &Drafts<'_>) -> u32 {
    let first = drafts
        .child(ROOT, "cpus")
        .and_then(|cpus| drafts.first_child(cpus));
    let reg = first.and_then(|first| drafts.property(first, "reg"));
    reg.and_then(|reg| value::cell(&reg.parts))
        .unwrap_or_default()
}

fn reservations(scan: &mut Scanner<'_>) -> Result<Vec<(u64, u64)>, DtsError> {
    let mut found = Vec::new();
    loop {
        let labels = scan.labels()?;
        if !scan.eat("/memreserve/")? {
            return match labels.first() {
                Some((at, _)) => scan.fail_at(*at, DtsFault::Expected("/memreserve/ or '/ {'")),
                None => Ok(found),
            };
        }
        let number = |scan: &mut Scanner<'_>| match expression::number(scan)? {
            Some(number) => Ok(number),
            None => scan.fail(DtsFault::Expected("a base and a size after /memreserve/")),
        };
        found.push((number(scan)?, number(scan)?));
        scan.expect(";", "';' after /memreserve/")?;
    }
}

/// Reads the nodes of the text in order: the root, and changes of earlier nodes.
fn top<'a>(scan: &mut Scanner<'a>, drafts: &mut Drafts<'a>) -> Result<(), DtsError> {
    scan.expect("/", "'/ {'")?;
    body(scan, drafts, ROOT, true, 1)?;
    loop {
        let labels = scan.labels()?;
        let at = scan.at();
        if scan.rest().is_empty() && labels.is_empty() {
            return Ok(());
        }
        let is_omission = labels.is_empty() && scan.eat("/omit-if-no-ref/")?;
        if is_omission || labels.is_empty() && scan.eat("/delete-node/")? {
            scan.expect("&", "&label")?;
            let reference = scan.reference()?;
            let Some(node) = drafts.find(reference) else {
                return scan.fail_at(at, reference.unknown());
            };
            match is_omission {
                true => drafts.omit_unused(node),
                false => drafts.delete(node),
            }
            scan.expect(";", "';'")?;
            continue;
        }
        if labels.len() < 2 && scan.eat("&")? {
            let reference = scan.reference()?;
            let Some(node) = drafts.find(reference) else {
                return scan.fail_at(at, reference.unknown());
            };
            for label in labels {
                drafts.add_label(node, label);
            }
            body(scan, drafts, node, false, 1)?;
            continue;
        }
        if !labels.is_empty() {
            return scan.fail(DtsFault::Expected("'&label {' after a label"));
        }
        scan.expect("/", "'/ {' or '&label {'")?;
        body(scan, drafts, ROOT, false, 1)?;
    }
}

/// The names in the braces of one node.
struct Body<'a> {
    node: NodeId,
    /// Whether the node is new: dtc uses a new node as it is, and merges another one into the existing node. Only a new
    /// node may not contain a name twice, and deletions in it have no effect.
    is_new: bool,
    has_children: bool,
    properties: HashSet<&'a str>,
    children: HashSet<&'a str>,
}

/// Reads the `{ … };` of a node.
fn body<'a>(
    scan: &mut Scanner<'a>,
    drafts: &mut Drafts<'a>,
    node: NodeId,
    is_new: bool,
    depth: usize,
) -> Result<(), DtsError> {
    if depth > MAX_DEPTH {
        return scan.fail(DtsFault::Depth);
    }
    scan.expect("{", "'{'")?;
    let mut body = Body {
        node,
        is_new,
        has_children: false,
        properties: HashSet::new(),
        children: HashSet::new(),
    };
    while !scan.eat("}")? {
        body.entry(scan, drafts, depth)?;
    }
    scan.expect(";", "';' after '}'")
}

impl<'a> Body<'a> {
    /// Reads one property, child or deletion.
    fn entry(
        &mut self,
        scan: &mut Scanner<'a>,
        drafts: &mut Drafts<'a>,
        depth: usize,
    ) -> Result<(), DtsError> {
        let (mut labels, mut omit_unused) = (scan.labels()?, false);
        while scan.eat("/omit-if-no-ref/")? {
            omit_unused = true;
            labels.extend(scan.labels()?);
        }
        let at = scan.at();
        if scan.eat("/delete-node/")? {
            let name = scan.name()?;
            self.has_children = true;
            scan.expect(";", "';'")?;
            return self.delete_child(scan, drafts, name, at);
        }
        if !omit_unused && scan.eat("/delete-property/")? {
            let name = scan.name()?;
            self.check_order(scan, at)?;
            scan.expect(";", "';'")?;
            if !self.is_new {
                drafts.delete_property(self.node, name);
            }
            return Ok(());
        }
        let name = scan.name()?;
        let at = scan.at() - name.len();
        if name.is_empty() {
            return scan.fail(DtsFault::Expected("a property, a node, or '}'"));
        }
        scan.space()?;
        if scan.rest().starts_with('{') {
            let (child, is_new) = self.child(scan, drafts, name, at)?;
            // dtc ignores the mark on a node that it merges into another one.
            if omit_unused && is_new {
                drafts.omit_unused(child);
            }
            for label in labels {
                drafts.add_label(child, label);
            }
            return body(scan, drafts, child, is_new, depth + 1);
        }
        if omit_unused {
            return scan.fail(DtsFault::Expected("a node after /omit-if-no-ref/"));
        }
        self.check_order(scan, at)?;
        if !is_property_name(name) {
            return scan.fail_at(at, DtsFault::BadName(name.to_owned()));
        }
        if !self.properties.insert(name) && self.is_new {
            return scan.fail_at(at, DtsFault::Twice(name.to_owned()));
        }
        let property = property(scan, name, at, labels)?;
        drafts.set_property(self.node, property);
        Ok(())
    }

    /// Properties must precede children and deletions of children.
    fn check_order(&self, scan: &Scanner<'a>, at: usize) -> Result<(), DtsError> {
        match self.has_children {
            true => scan.fail_at(at, DtsFault::Expected("properties before the first child")),
            false => Ok(()),
        }
    }

    fn delete_child(
        &mut self,
        scan: &Scanner<'a>,
        drafts: &mut Drafts<'a>,
        name: &'a str,
        at: usize,
    ) -> Result<(), DtsError> {
        if !self.is_new {
            if let Some(child) = drafts.child(self.node, name) {
                drafts.delete(child);
            }
            return Ok(());
        }
        // dtc 1.6 reports two nodes with the same name here.
        match self.children.contains(name) {
            true => scan.fail_at(at, DtsFault::Twice(name.to_owned())),
            false => Ok(()),
        }
    }

    /// Opens the child with this name. Returns whether it is new.
    fn child(
        &mut self,
        scan: &Scanner<'a>,
        drafts: &mut Drafts<'a>,
        name: &'a str,
        at: usize,
    ) -> Result<(NodeId, bool), DtsError> {
        self.has_children = true;
        if !is_node_name(name) {
            return scan.fail_at(at, DtsFault::BadName(name.to_owned()));
        }
        if !self.children.insert(name) && self.is_new {
            return scan.fail_at(at, DtsFault::Twice(name.to_owned()));
        }
        Ok(drafts.open_child(self.node, name))
    }
}

fn property<'a>(
    scan: &mut Scanner<'a>,
    name: &'a str,
    at: usize,
    labels: Vec<Label<'a>>,
) -> Result<DraftProperty<'a>, DtsError> {
    let mut property = DraftProperty::new(name, at, labels);
    if scan.eat("=")? {
        property.parts = value::read(scan, &mut property.inner_labels)?;
    }
    scan.expect(";", "';' after a property")?;
    Ok(property)
}
