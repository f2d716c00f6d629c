//! The types of a kernel, by number and by name.

use std::collections::HashMap;

use thiserror::Error;

use super::elf;
use crate::image::{u16_at, u32_at};

const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;
/// Size of a type without the data that follows it, bytes.
const TYPE: usize = 12;
/// Size of a member of a structure, and of an array's data, bytes.
pub(super) const MEMBER: usize = 12;

/// Why the types cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BtfError {
    /// The kernel is not a 64-bit ELF file.
    #[error("not a 64-bit ELF file")]
    NotElf,
    /// The section does not exist.
    #[error("it has no section .BTF: it was built without CONFIG_DEBUG_INFO_BTF")]
    Missing,
    /// The section ends too early.
    #[error("truncated types")]
    Cut,
    /// The section has an invalid header, or a different byte order.
    #[error("invalid header of section .BTF")]
    Magic,
    /// The version of the format is not supported.
    #[error("its types have format version {0}; only {VERSION} is supported")]
    Version(u8),
    /// The kind of a type is unknown.
    #[error("its types have the unknown kind {0}")]
    Kind(u32),
}

/// Kinds of types, by number.
pub(super) mod kind {
    pub(in super::super) const INT: u32 = 1;
    pub(in super::super) const PTR: u32 = 2;
    pub(in super::super) const ARRAY: u32 = 3;
    pub(in super::super) const STRUCT: u32 = 4;
    pub(in super::super) const UNION: u32 = 5;
    pub(in super::super) const ENUM: u32 = 6;
    pub(in super::super) const TYPEDEF: u32 = 8;
    pub(in super::super) const VOLATILE: u32 = 9;
    pub(in super::super) const CONST: u32 = 10;
    pub(in super::super) const RESTRICT: u32 = 11;
    pub(in super::super) const FLOAT: u32 = 16;
    pub(in super::super) const TYPE_TAG: u32 = 18;
    pub(in super::super) const ENUM64: u32 = 19;
}

/// All types of a kernel.
#[derive(Debug)]
pub struct Types<'b> {
    types: &'b [u8],
    strings: &'b [u8],
    /// Offset of each type in `types`, by its number minus 1.
    starts: Vec<usize>,
    /// Structures by name; of several with the same name, the first.
    structures: HashMap<&'b str, u32>,
}

/// One type.
#[derive(Clone, Copy, Debug)]
pub(super) struct Type<'b> {
    pub(super) name: u32,
    pub(super) kind: u32,
    /// Number of members that follow.
    pub(super) length: usize,
    /// Whether the members' offsets contain the size of a bit field.
    pub(super) flag: bool,
    /// Its size in bytes, or the number of another type.
    pub(super) size_or_type: u32,
    /// The bytes after it.
    pub(super) rest: &'b [u8],
}

impl<'b> Types<'b> {
    /// Reads the types of an uncompressed kernel, `vmlinux`.
    ///
    /// # Errors
    ///
    /// Why the types cannot be read.
    pub fn of_kernel(vmlinux: &'b [u8]) -> Result<Self, BtfError> {
        Self::read(elf::section(vmlinux, ".BTF")?)
    }

    /// Reads the types in `bytes`: a section `.BTF`, or [`super::RUNNING`].
    ///
    /// # Errors
    ///
    /// The error in the types.
    pub fn read(bytes: &'b [u8]) -> Result<Self, BtfError> {
        let field = |at| {
            let value = u32_at(bytes, at).ok_or(BtfError::Cut)?;
            usize::try_from(value).map_err(|_| BtfError::Cut)
        };
        match (u16_at(bytes, 0), bytes.get(2)) {
            (Some(MAGIC), Some(&VERSION)) => {}
            (Some(MAGIC), Some(&other)) => return Err(BtfError::Version(other)),
            _ => return Err(BtfError::Magic),
        }
        let behind = bytes.get(field(4)?..).ok_or(BtfError::Cut)?;
        let part = |start: usize, length: usize| {
            let end = start.checked_add(length).ok_or(BtfError::Cut)?;
            behind.get(start..end).ok_or(BtfError::Cut)
        };
        let mut read = Self {
            types: part(field(8)?, field(12)?)?,
            strings: part(field(16)?, field(20)?)?,
            starts: Vec::new(),
            structures: HashMap::new(),
        };
        read.index()?;
        Ok(read)
    }

    fn index(&mut self) -> Result<(), BtfError> {
        let mut at = 0;
        while at < self.types.len() {
            let found = type_at(self.types, at).ok_or(BtfError::Cut)?;
            self.starts.push(at);
            if found.kind == kind::STRUCT
                && let Some(name) = self.name(found.name)
                && let Ok(number) = u32::try_from(self.starts.len())
            {
                self.structures.entry(name).or_insert(number);
            }
            at += TYPE + following(&found)?;
        }
        match at == self.types.len() {
            true => Ok(()),
            false => Err(BtfError::Cut),
        }
    }

    /// Returns the type with this number; `None` for `void` and for unused numbers.
    pub(super) fn get(&self, number: u32) -> Option<Type<'b>> {
        let index = usize::try_from(number).ok()?.checked_sub(1)?;
        type_at(self.types, *self.starts.get(index)?)
    }

    /// Returns the number of the structure with this name.
    pub(super) fn structure(&self, name: &str) -> Option<u32> {
        self.structures.get(name).copied()
    }

    /// Returns the name at this offset; `None` for a type without a name.
    pub(super) fn name(&self, at: u32) -> Option<&'b str> {
        let text = self.strings.get(usize::try_from(at).ok()?..)?;
        let end = text.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(&text[..end])
            .ok()
            .filter(|name| !name.is_empty())
    }
}

fn type_at(types: &[u8], at: usize) -> Option<Type<'_>> {
    let info = u32_at(types, at + 4)?;
    Some(Type {
        name: u32_at(types, at)?,
        kind: (info >> 24) & 0x1f,
        length: usize::try_from(info & 0xffff).ok()?,
        flag: info >> 31 == 1,
        size_or_type: u32_at(types, at + 8)?,
        rest: types.get(at + TYPE..)?,
    })
}

/// Returns the size of the data that follows a type, bytes.
fn following(found: &Type<'_>) -> Result<usize, BtfError> {
    Ok(match found.kind {
        // An integer's encoding, a variable's linkage, a tag's member.
        kind::INT | 14 | 17 => 4,
        kind::ARRAY => MEMBER,
        // A function's parameter has the size of an enumeration's value.
        kind::ENUM | 13 => 8 * found.length,
        kind::STRUCT | kind::UNION | 15 | kind::ENUM64 => MEMBER * found.length,
        // A forward declaration, a function.
        kind::PTR
        | 7
        | kind::TYPEDEF
        | kind::VOLATILE
        | kind::CONST
        | kind::RESTRICT
        | 12
        | kind::FLOAT
        | kind::TYPE_TAG => 0,
        other => return Err(BtfError::Kind(other)),
    })
}
