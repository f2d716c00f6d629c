//! The layout of a structure.

use std::fmt;

use super::read::{MEMBER, Type, Types, kind};
use crate::image::u32_at;

/// Maximum nesting of types. The types of Linux stay far below; those of a hostile file may be circular.
const MAX_DEPTH: usize = 64;
/// Maximum number of members of one structure, including the structures in it.
const MAX_MEMBERS: usize = 16_384;

/// A member of a structure that is not a structure itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its path from the structure, such as `ring.entries[64].type`. Empty for the end of the structure.
    pub path: String,
    /// Its offset in bits; for an array, the offset in its first element.
    pub bit: u64,
    /// Its class and size. The names of types may differ between two kernels.
    pub what: String,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let byte = self.bit / 8;
        match (self.path.is_empty(), self.bit % 8) {
            (true, _) => write!(f, "its end at byte {byte}"),
            (false, 0) => write!(f, "{} ({}) at byte {byte}", self.path, self.what),
            (false, bit) => write!(f, "{} ({}) at byte {byte}, bit {bit}", self.path, self.what),
        }
    }
}

impl Types<'_> {
    /// Returns the members of the structure with this name, in source order, and its end. `None` if the structure
    /// does not exist or is invalid.
    #[must_use]
    pub fn layout(&self, structure: &str) -> Option<Vec<Member>> {
        let found = self.get(self.structure(structure)?)?;
        let mut members = Vec::new();
        self.inside(&found, "", 0, 0, &mut members)?;
        members.push(Member {
            path: String::new(),
            bit: u64::from(found.size_or_type) * 8,
            what: "end".to_owned(),
        });
        Some(members)
    }

    /// Returns the members of a structure or union that begins at `bit`.
    fn inside(
        &self,
        of: &Type<'_>,
        path: &str,
        bit: u64,
        depth: usize,
        members: &mut Vec<Member>,
    ) -> Option<()> {
        for index in 0..of.length {
            let at = index * MEMBER;
            let (name, number) = (u32_at(of.rest, at)?, u32_at(of.rest, at + 4)?);
            let place = u32_at(of.rest, at + 8)?;
            // With the flag, the highest byte is the size of the bit field.
            let (bits, place) = match of.flag {
                true => (place >> 24, place & 0xff_ffff),
                false => (0, place),
            };
            let name = self.name(name).unwrap_or_default();
            let dot = if path.is_empty() || name.is_empty() {
                ""
            } else {
                "."
            };
            let path = format!("{path}{dot}{name}");
            let bit = bit.checked_add(place.into())?;
            match bits {
                0 => self.value(number, path, bit, depth + 1, members)?,
                bits => push(members, path, bit, format!("{bits} bits"))?,
            }
        }
        Some(())
    }

    /// Returns the members of a value of the type `number` that starts at `bit`.
    fn value(
        &self,
        number: u32,
        path: String,
        bit: u64,
        depth: usize,
        members: &mut Vec<Member>,
    ) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        let found = self.get(number)?;
        let bytes = found.size_or_type;
        match found.kind {
            kind::STRUCT | kind::UNION => self.inside(&found, &path, bit, depth, members),
            kind::ARRAY => {
                let (element, count) = (u32_at(found.rest, 0)?, u32_at(found.rest, 8)?);
                self.value(element, format!("{path}[{count}]"), bit, depth + 1, members)
            }
            kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                self.value(found.size_or_type, path, bit, depth + 1, members)
            }
            kind::PTR => push(members, path, bit, "pointer".to_owned()),
            kind::FLOAT => push(members, path, bit, format!("float of {bytes} bytes")),
            // An enumeration is an integer in memory.
            kind::INT | kind::ENUM | kind::ENUM64 => {
                push(members, path, bit, format!("integer of {bytes} bytes"))
            }
            _ => None,
        }
    }
}

fn push(members: &mut Vec<Member>, path: String, bit: u64, what: String) -> Option<()> {
    members.push(Member { path, bit, what });
    (members.len() <= MAX_MEMBERS).then_some(())
}
