use std::collections::HashMap;
use std::sync::Arc;

use super::{
    BEGIN_NODE, DtbError, DtbFault, END, END_NODE, HEADER_BYTES, MAGIC, MAX_BLOB_BYTES, NOP, PROP,
    VERSION,
};
use crate::tree::{DeviceTree, Header, MAX_DEPTH, MAX_NAME_BYTES, Node, Property};

/// Reads a blob. Bytes after the size in its header are ignored, as libfdt ignores them.
///
/// Memory use stays below a fixed multiple of the blob's size, for any contents.
///
/// # Errors
///
/// The fault of the blob and its byte offset.
pub fn read(bytes: &[u8]) -> Result<DeviceTree, DtbError> {
    let layout = Layout::read(bytes)?;
    let blob = &bytes[..layout.total];
    let header = Header {
        boot_cpu: layout.boot_cpu,
        reservations: reservations(blob, layout.reservations)?,
        strings: blob[layout.strings..layout.strings_end].to_vec(),
    };
    let root = Structure::new(blob, &layout).root()?;
    Ok(DeviceTree::from_blob(root, header, blob))
}

fn fault<T>(offset: usize, fault: DtbFault) -> Result<T, DtbError> {
    Err(DtbError { offset, fault })
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let cell = bytes.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_be_bytes(cell.try_into().ok()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    let cells = bytes.get(offset..offset.checked_add(8)?)?;
    Some(u64::from_be_bytes(cells.try_into().ok()?))
}

/// Location of a blob's blocks. All offsets are within `total`, which is within the given bytes.
struct Layout {
    total: usize,
    structure: usize,
    structure_end: usize,
    strings: usize,
    strings_end: usize,
    reservations: usize,
    boot_cpu: u32,
}

impl Layout {
    fn read(bytes: &[u8]) -> Result<Self, DtbError> {
        let short = |need| DtbFault::Short {
            have: bytes.len(),
            need,
        };
        let field = |index: usize| {
            u32_at(bytes, index * 4).ok_or(DtbError {
                offset: bytes.len(),
                fault: short(HEADER_BYTES),
            })
        };
        let at = |index: usize| field(index).map(|value| value as usize);

        let magic = field(0)?;
        if magic != MAGIC {
            return fault(0, DtbFault::Magic(magic));
        }
        let (version, last_compatible) = (field(5)?, field(6)?);
        if version < VERSION || last_compatible > VERSION || last_compatible > version {
            return fault(
                0x14,
                DtbFault::Version {
                    version,
                    last_compatible,
                },
            );
        }
        let total = at(1)?;
        if total > MAX_BLOB_BYTES {
            return fault(4, DtbFault::TooLarge(total));
        }
        if total > bytes.len() || total < HEADER_BYTES {
            return fault(4, short(total.max(HEADER_BYTES)));
        }
        let (structure, strings, reservations) = (at(2)?, at(3)?, at(4)?);
        let (strings_size, structure_size) = (at(8)?, at(9)?);
        let block = |field, block, start: usize, size: usize| match start.checked_add(size) {
            Some(end) if start >= HEADER_BYTES && end <= total => Ok(end),
            _ => fault(field, DtbFault::Block { block, start, size }),
        };
        if structure % 4 != 0 {
            return fault(8, DtbFault::Alignment("structure block"));
        }
        if reservations % 8 != 0 {
            return fault(16, DtbFault::Alignment("memory reservation block"));
        }
        block(16, "memory reservation block", reservations, 0)?;
        Ok(Self {
            total,
            structure,
            structure_end: block(8, "structure block", structure, structure_size)?,
            strings,
            strings_end: block(12, "strings block", strings, strings_size)?,
            reservations,
            boot_cpu: field(7)?,
        })
    }
}

fn reservations(blob: &[u8], mut at: usize) -> Result<Vec<(u64, u64)>, DtbError> {
    let mut found = Vec::new();
    loop {
        match (u64_at(blob, at), u64_at(blob, at + 8)) {
            (Some(0), Some(0)) => return Ok(found),
            (Some(base), Some(size)) => found.push((base, size)),
            _ => return fault(at, DtbFault::Ends("the memory reservations")),
        }
        at += 16;
    }
}

/// Parses the structure block.
struct Structure<'a> {
    bytes: &'a [u8],
    at: usize,
    strings: &'a [u8],
    names: HashMap<u32, Arc<str>>,
}

impl<'a> Structure<'a> {
    fn new(blob: &'a [u8], layout: &Layout) -> Self {
        Self {
            bytes: &blob[..layout.structure_end],
            at: layout.structure,
            strings: &blob[layout.strings..layout.strings_end],
            names: HashMap::new(),
        }
    }

    fn root(mut self) -> Result<Node, DtbError> {
        let start = self.at;
        if self.token()? != BEGIN_NODE {
            return fault(
                start,
                DtbFault::Order("the structure does not start with a node"),
            );
        }
        // The open nodes; the last one is the innermost.
        let mut open = vec![Node::new(self.node_name()?)];
        loop {
            let at = self.at;
            match self.token()? {
                BEGIN_NODE if open.len() == MAX_DEPTH => return fault(at, DtbFault::Depth),
                BEGIN_NODE => open.push(Node::new(self.node_name()?)),
                PROP => self.property(at, open.last_mut())?,
                END_NODE => {
                    let Some(node) = open.pop() else { break };
                    match open.last_mut() {
                        Some(parent) => parent.push(node),
                        None => return self.end(node),
                    }
                }
                END => return fault(at, DtbFault::Ends("a node")),
                other => return fault(at, DtbFault::Token(other)),
            }
        }
        fault(self.at, DtbFault::Ends("a node"))
    }

    /// Checks that only the end follows the root.
    fn end(mut self, root: Node) -> Result<Node, DtbError> {
        let at = self.at;
        match self.token()? {
            END => Ok(root),
            _ => fault(at, DtbFault::Order("something follows the root node")),
        }
    }

    /// Returns the next token other than a NOP.
    fn token(&mut self) -> Result<u32, DtbError> {
        loop {
            let Some(token) = u32_at(self.bytes, self.at) else {
                return fault(self.at, DtbFault::Ends("the list of tokens"));
            };
            self.at += 4;
            if token != NOP {
                return Ok(token);
            }
        }
    }

    fn node_name(&mut self) -> Result<String, DtbError> {
        let Some(name) = name_at(self.bytes, self.at) else {
            return fault(self.at, DtbFault::Name("node"));
        };
        self.at = align(self.at + name.len() + 1);
        Ok(name.to_owned())
    }

    fn property(&mut self, start: usize, node: Option<&mut Node>) -> Result<(), DtbError> {
        let (Some(length), Some(name_offset)) =
            (u32_at(self.bytes, self.at), u32_at(self.bytes, self.at + 4))
        else {
            return fault(start, DtbFault::Ends("a property"));
        };
        let value = self.at + 8;
        let end = value.saturating_add(length as usize);
        let Some(bytes) = self.bytes.get(value..end) else {
            return fault(start, DtbFault::Ends("a property's value"));
        };
        let name = self.property_name(start, name_offset)?;
        self.at = align(end);
        match node {
            Some(node) if node.children().is_empty() => {
                node.append(Property::new(name, bytes));
                Ok(())
            }
            // libfdt would not find this property, so kerf and the kernel would not see it.
            _ => fault(
                start,
                DtbFault::Order("a property follows a child of its node"),
            ),
        }
    }

    fn property_name(&mut self, start: usize, offset: u32) -> Result<Arc<str>, DtbError> {
        if let Some(name) = self.names.get(&offset) {
            return Ok(Arc::clone(name));
        }
        match name_at(self.strings, offset as usize) {
            Some(name) if !name.is_empty() => {
                let name: Arc<str> = name.into();
                self.names.insert(offset, Arc::clone(&name));
                Ok(name)
            }
            _ => fault(start, DtbFault::Name("property")),
        }
    }
}

/// Returns the string that starts here, if it ends within the maximum length.
fn name_at(bytes: &[u8], at: usize) -> Option<&str> {
    let rest = bytes.get(at..)?;
    let near = &rest[..rest.len().min(MAX_NAME_BYTES + 1)];
    let end = near.iter().position(|byte| *byte == 0)?;
    std::str::from_utf8(&near[..end]).ok()
}

/// Returns the next multiple of 4. Checks against the block's end happen before each read.
fn align(at: usize) -> usize {
    at.saturating_add(3) & !3
}
