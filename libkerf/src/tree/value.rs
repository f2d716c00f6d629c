//! Interprets the bytes of a property. A property has no type: the reader specifies the expected [`Shape`], and
//! receives that shape as the error otherwise.

use std::fmt;

use super::{Node, Property};

/// The expected format of a property's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// One cell: 4 bytes.
    U32,
    /// Two cells: 8 bytes.
    U64,
    /// Cells: a multiple of 4 bytes.
    U32List,
    /// Pairs of cells: a multiple of 8 bytes.
    U64List,
    /// A base and a size: 16 bytes.
    Range,
    /// One string: UTF-8, terminated by its only NUL.
    Text,
    /// Strings: UTF-8, each terminated by a NUL, at least one.
    TextList,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Shape::U32 => "one 32-bit cell (4 bytes)",
            Shape::U64 => "one 64-bit cell (8 bytes)",
            Shape::U32List => "32-bit cells (a multiple of 4 bytes)",
            Shape::U64List => "64-bit cells (a multiple of 8 bytes)",
            Shape::Range => "a base and a size, 64 bits each (16 bytes)",
            Shape::Text => "one string that ends with its only NUL",
            Shape::TextList => "strings that each end with a NUL",
        })
    }
}

impl Property {
    /// Returns the value of one cell.
    ///
    /// # Errors
    ///
    /// The shape, if the property does not have 4 bytes.
    pub fn u32(&self) -> Result<u32, Shape> {
        let bytes = self.value.as_slice().try_into().map_err(|_| Shape::U32)?;
        Ok(u32::from_be_bytes(bytes))
    }

    /// Returns the value of two cells, the high one first.
    ///
    /// # Errors
    ///
    /// The shape, if the property does not have 8 bytes.
    pub fn u64(&self) -> Result<u64, Shape> {
        let bytes = self.value.as_slice().try_into().map_err(|_| Shape::U64)?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// Returns the values of all cells.
    ///
    /// # Errors
    ///
    /// The shape, if the number of bytes is not a multiple of 4.
    pub fn u32_list(&self) -> Result<Vec<u32>, Shape> {
        let (cells, rest) = self.value.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(Shape::U32List);
        }
        Ok(cells.iter().map(|cell| u32::from_be_bytes(*cell)).collect())
    }

    /// Returns the values of all pairs of cells.
    ///
    /// # Errors
    ///
    /// The shape, if the number of bytes is not a multiple of 8.
    pub fn u64_list(&self) -> Result<Vec<u64>, Shape> {
        let (cells, rest) = self.value.as_chunks::<8>();
        if !rest.is_empty() {
            return Err(Shape::U64List);
        }
        Ok(cells.iter().map(|cell| u64::from_be_bytes(*cell)).collect())
    }

    /// Returns a base and a size, in bytes.
    ///
    /// # Errors
    ///
    /// The shape, if the property does not have 16 bytes.
    pub fn range(&self) -> Result<(u64, u64), Shape> {
        match self.u64_list().as_deref() {
            Ok([base, size]) => Ok((*base, *size)),
            _ => Err(Shape::Range),
        }
    }

    /// Returns one string, without its NUL.
    ///
    /// # Errors
    ///
    /// The shape, if the NUL is missing or not the only one, or the rest is not UTF-8.
    pub fn text(&self) -> Result<&str, Shape> {
        match self.value.split_last() {
            Some((0, text)) if !text.contains(&0) => {
                std::str::from_utf8(text).map_err(|_| Shape::Text)
            }
            _ => Err(Shape::Text),
        }
    }

    /// Returns all strings, without their NULs.
    ///
    /// # Errors
    ///
    /// The shape, if the last NUL is missing or a string is not UTF-8.
    pub fn text_list(&self) -> Result<Vec<&str>, Shape> {
        let Some((0, text)) = self.value.split_last() else {
            return Err(Shape::TextList);
        };
        text.split(|byte| *byte == 0)
            .map(|part| std::str::from_utf8(part).map_err(|_| Shape::TextList))
            .collect()
    }
}

impl Node {
    /// Adds one cell.
    #[must_use]
    pub fn with_u32(self, name: &str, value: u32) -> Self {
        self.with_property(Property::new(name, value.to_be_bytes()))
    }

    /// Adds two cells, the high one first.
    #[must_use]
    pub fn with_u64(self, name: &str, value: u64) -> Self {
        self.with_property(Property::new(name, value.to_be_bytes()))
    }

    /// Adds cells.
    #[must_use]
    pub fn with_u32_list(self, name: &str, values: &[u32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_be_bytes()).collect();
        self.with_property(Property::new(name, bytes))
    }

    /// Adds pairs of cells.
    #[must_use]
    pub fn with_u64_list(self, name: &str, values: &[u64]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_be_bytes()).collect();
        self.with_property(Property::new(name, bytes))
    }

    /// Adds a string and its NUL.
    #[must_use]
    pub fn with_text(self, name: &str, text: &str) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.with_property(Property::new(name, bytes))
    }

    /// Adds strings, each with its NUL.
    #[must_use]
    pub fn with_text_list<T: AsRef<str>>(self, name: &str, texts: &[T]) -> Self {
        let mut bytes = Vec::new();
        for text in texts {
            bytes.extend_from_slice(text.as_ref().as_bytes());
            bytes.push(0);
        }
        self.with_property(Property::new(name, bytes))
    }

    /// Adds a property without bytes: its presence is its value.
    #[must_use]
    pub fn with_flag(self, name: &str) -> Self {
        self.with_property(Property::new(name, []))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shape_is_exact() {
        let of = |bytes: &[u8]| Property::new("p", bytes);
        assert_eq!(of(&[0, 0, 1, 2]).u32(), Ok(258));
        assert_eq!(of(&[0, 1, 2]).u32(), Err(Shape::U32));
        assert_eq!(of(&[0; 12]).u64_list(), Err(Shape::U64List));
        assert_eq!(of(&[0; 12]).u32_list().unwrap().len(), 3);
        assert_eq!(of(&[0; 8]).range(), Err(Shape::Range));
        assert_eq!(of(&[]).u64_list(), Ok(vec![]));
        assert_eq!(of(b"a\0").text(), Ok("a"));
        assert_eq!(of(b"\0").text(), Ok(""));
        for wrong in [&b""[..], b"a", b"a\0b\0", b"\xff\0"] {
            assert_eq!(of(wrong).text(), Err(Shape::Text), "{wrong:?}");
        }
        assert_eq!(of(b"a\0b\0").text_list(), Ok(vec!["a", "b"]));
        assert_eq!(of(b"a\0b").text_list(), Err(Shape::TextList));
    }
}
