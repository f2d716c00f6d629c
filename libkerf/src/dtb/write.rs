use std::collections::HashMap;

use super::ends::Ends;
use super::{
    BEGIN_NODE, DtbError, DtbFault, END, END_NODE, HEADER_BYTES, LAST_COMPATIBLE, MAGIC,
    MAX_BLOB_BYTES, PROP, VERSION,
};
use crate::tree::{DeviceTree, MAX_DEPTH, MAX_NAME_BYTES, Node};

/// Returns the blob of a tree: the original bytes of an unchanged tree, otherwise version 17
/// without gaps between or after the blocks.
///
/// # Errors
///
/// When a name is invalid, nodes are nested too deep, or the blob would be larger than the kernel
/// accepts.
pub fn write(tree: &DeviceTree) -> Result<Vec<u8>, DtbError> {
    if let Some(blob) = tree.unchanged_blob() {
        return Ok(blob.to_vec());
    }
    let mut writer = Writer::new(&tree.header().strings);
    writer.node(tree.root(), 1)?;
    writer.cell(END);
    assemble(tree, &writer.structure, &writer.strings)
}

fn assemble(tree: &DeviceTree, structure: &[u8], strings: &[u8]) -> Result<Vec<u8>, DtbError> {
    let header = tree.header();
    let structure_at = HEADER_BYTES + (header.reservations.len() + 1) * 16;
    let strings_at = structure_at + structure.len();
    let total = strings_at + strings.len();
    if total > MAX_BLOB_BYTES {
        return Err(DtbError {
            offset: MAX_BLOB_BYTES,
            fault: DtbFault::TooLarge(total),
        });
    }
    let mut blob = Vec::with_capacity(total);
    let sizes = [total, structure_at, strings_at, HEADER_BYTES];
    blob.extend_from_slice(&MAGIC.to_be_bytes());
    for size in sizes {
        blob.extend_from_slice(&cell_of(size));
    }
    blob.extend_from_slice(&VERSION.to_be_bytes());
    blob.extend_from_slice(&LAST_COMPATIBLE.to_be_bytes());
    blob.extend_from_slice(&header.boot_cpu.to_be_bytes());
    blob.extend_from_slice(&cell_of(strings.len()));
    blob.extend_from_slice(&cell_of(structure.len()));
    for (base, size) in header.reservations.iter().copied().chain([(0, 0)]) {
        blob.extend_from_slice(&base.to_be_bytes());
        blob.extend_from_slice(&size.to_be_bytes());
    }
    blob.extend_from_slice(structure);
    blob.extend_from_slice(strings);
    Ok(blob)
}

/// Returns a size as a cell. Sizes here are parts of a blob; a blob that is too large is refused by
/// its total size before the cell is used.
fn cell_of(size: usize) -> [u8; 4] {
    u32::try_from(size).unwrap_or(u32::MAX).to_be_bytes()
}

struct Writer {
    structure: Vec<u8>,
    strings: Vec<u8>,
    ends: Ends,
    offsets: HashMap<String, u32>,
}

impl Writer {
    fn new(strings: &[u8]) -> Self {
        let mut ends = Ends::default();
        ends.add(strings, 0);
        Self {
            structure: Vec::new(),
            strings: strings.to_vec(),
            ends,
            offsets: HashMap::new(),
        }
    }

    fn cell(&mut self, value: u32) {
        self.structure.extend_from_slice(&value.to_be_bytes());
    }

    fn pad(&mut self) {
        let end = self.structure.len().next_multiple_of(4);
        self.structure.resize(end, 0);
    }

    fn refuse<T>(&self, fault: DtbFault) -> Result<T, DtbError> {
        Err(DtbError {
            offset: self.structure.len(),
            fault,
        })
    }

    fn node(&mut self, node: &Node, depth: usize) -> Result<(), DtbError> {
        if depth > MAX_DEPTH {
            return self.refuse(DtbFault::Depth);
        }
        // Only the root has no name.
        if !writable(node.name()) && (depth > 1 || !node.name().is_empty()) {
            return self.refuse(DtbFault::Unwritable(node.name().to_owned()));
        }
        if self.structure.len() > MAX_BLOB_BYTES {
            return self.refuse(DtbFault::TooLarge(self.structure.len()));
        }
        self.cell(BEGIN_NODE);
        self.structure.extend_from_slice(node.name().as_bytes());
        self.structure.push(0);
        self.pad();
        for property in node.properties() {
            let name = self.string(property.name())?;
            self.cell(PROP);
            self.structure
                .extend_from_slice(&cell_of(property.bytes().len()));
            self.cell(name);
            self.structure.extend_from_slice(property.bytes());
            self.pad();
        }
        for child in node.children() {
            self.node(child, depth + 1)?;
        }
        self.cell(END_NODE);
        Ok(())
    }

    fn string(&mut self, name: &str) -> Result<u32, DtbError> {
        if let Some(offset) = self.offsets.get(name) {
            return Ok(*offset);
        }
        if !writable(name) {
            return self.refuse(DtbFault::Unwritable(name.to_owned()));
        }
        let at = self.ends.find(&self.strings, name).unwrap_or_else(|| {
            let end = self.strings.len();
            self.strings.extend_from_slice(name.as_bytes());
            self.strings.push(0);
            self.ends.add(&self.strings, end);
            end
        });
        let Ok(offset) = u32::try_from(at) else {
            return self.refuse(DtbFault::TooLarge(at));
        };
        self.offsets.insert(name.to_owned(), offset);
        Ok(offset)
    }
}

/// Returns whether a name is valid in a blob and in a path.
fn writable(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME_BYTES && !name.contains(['\0', '/'])
}
