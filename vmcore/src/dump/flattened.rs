//! The flattened format, which QEMU and `makedumpfile -F` write to a pipe. Records contain the offset of their bytes
//! in the real file; a later record replaces an earlier one.

use std::sync::Mutex;

use super::layout::{FLATTENED_HEADER_BYTES, FLATTENED_MAGIC, FlattenedHeader, FlattenedRecord};
use crate::bytes::{self, Bytes};
use crate::error::DumpError;

/// Maximum number of records, at 40 bytes each. QEMU's records have 16 KiB.
const RECORDS_MAX: usize = 1 << 21;
/// Whether the last record is incomplete: data that it describes may be missing.
pub(crate) type Unfinished = bool;

/// A piece of the real file.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Offset of its start in the real file.
    start: u64,
    end: u64,
    /// Offset of its bytes in the flattened file.
    at: u64,
}

/// The real file, reconstructed from its flattened form.
pub(crate) struct Unflattened {
    file: Box<dyn Bytes>,
    /// Sorted and disjoint.
    pieces: Vec<Piece>,
    len: u64,
    /// The piece of the last read: most reads continue there.
    last: Mutex<usize>,
}

/// Returns true if the bytes begin like a flattened file.
pub(crate) fn is_flattened(first: &[u8]) -> bool {
    first.starts_with(&FLATTENED_MAGIC)
}

impl Unflattened {
    /// Reads the locations of all records.
    ///
    /// # Errors
    ///
    /// If the offset of a record is negative or too large, or there are too many records. A file without an end mark
    /// is not an error, but unfinished.
    pub(crate) fn open(file: Box<dyn Bytes>) -> Result<(Self, Unfinished), DumpError> {
        let header: FlattenedHeader = bytes::read_struct(&*file, 0, "the header")?;
        if (header.kind.get(), header.version.get()) != (1, 1) {
            return Err(DumpError::Unsupported(
                "a flattened file of another version",
            ));
        }
        let mut at = FLATTENED_HEADER_BYTES;
        let mut records = Vec::new();
        let unfinished = loop {
            let head = bytes::read_struct::<FlattenedRecord>(&*file, at, "a record");
            let head = match head {
                Ok(head) => head,
                Err(DumpError::CutOff { .. }) => break true,
                Err(error) => return Err(error),
            };
            if (head.offset.get(), head.bytes.get()) == (-1, -1) {
                break false;
            }
            let damaged = |what| DumpError::Damaged { offset: at, what };
            let length = u64::try_from(head.bytes.get()).ok().filter(|&n| n > 0);
            let length = length.ok_or_else(|| damaged("a record without a length"))?;
            let start = u64::try_from(head.offset.get())
                .map_err(|_| damaged("a record with a negative offset"))?;
            let data = at + size_of::<FlattenedRecord>() as u64;
            let next = data.checked_add(length);
            let end = start.checked_add(length);
            let (Some(next), Some(end)) = (next, end) else {
                return Err(damaged("a record of impossible length"));
            };
            if next > file.len() {
                break true;
            }
            if records.len() == RECORDS_MAX {
                return Err(DumpError::Unsupported(
                    "a flattened file of more than 2 million records; \
                     `makedumpfile -R` makes a plain file of it",
                ));
            }
            records.push(Piece {
                start,
                end,
                at: data,
            });
            at = next;
        };
        let pieces = later_wins(records);
        let len = pieces.last().map_or(0, |piece| piece.end);
        let unflattened = Self {
            file,
            pieces,
            len,
            last: Mutex::new(0),
        };
        Ok((unflattened, unfinished))
    }

    /// Returns the index of the first piece whose end is after `offset`.
    fn find(&self, offset: u64) -> usize {
        let last = self.last.lock().map_or(0, |last| *last);
        let ends_behind = |index: usize| self.pieces.get(index).is_none_or(|p| p.end > offset);
        let follows = |index: usize| index == 0 || self.pieces[index - 1].end <= offset;
        for index in [last, last + 1] {
            if index <= self.pieces.len() && follows(index) && ends_behind(index) {
                return index;
            }
        }
        self.pieces.partition_point(|piece| piece.end <= offset)
    }
}

/// Returns disjoint, sorted pieces; where records overlap, the later one counts.
fn later_wins(records: Vec<Piece>) -> Vec<Piece> {
    let sorted = |pieces: &[Piece]| pieces.windows(2).all(|two| two[0].end <= two[1].start);
    if sorted(&records) {
        return records;
    }
    let mut pieces: Vec<Piece> = Vec::with_capacity(records.len());
    let mut by_start: Vec<(usize, Piece)> = records.into_iter().enumerate().collect();
    by_start.sort_unstable_by_key(|(order, piece)| (piece.start, *order));
    // The records at the present place, by their order: the last one counts.
    let mut open: std::collections::BTreeMap<usize, Piece> = std::collections::BTreeMap::new();
    let mut upcoming = by_start.into_iter().peekable();
    let mut place = 0;
    loop {
        while let Some((order, piece)) = upcoming.next_if(|(_, piece)| piece.start <= place) {
            open.insert(order, piece);
        }
        // A record that is hidden below the top and has ended is dropped once it becomes the top.
        while open.last_entry().is_some_and(|top| top.get().end <= place) {
            open.pop_last();
        }
        let Some((_, top)) = open.last_key_value() else {
            match upcoming.peek() {
                Some((_, piece)) => place = piece.start,
                None => return pieces,
            }
            continue;
        };
        let next = upcoming.peek().map_or(u64::MAX, |(_, piece)| piece.start);
        let end = top.end.min(next);
        let at = top.at + (place - top.start);
        match pieces.last_mut() {
            Some(last) if last.end == place && last.at + (place - last.start) == at => {
                last.end = end;
            }
            _ => pieces.push(Piece {
                start: place,
                end,
                at,
            }),
        }
        place = end;
    }
}

impl Bytes for Unflattened {
    fn len(&self) -> u64 {
        self.len
    }

    fn holds(&self, offset: u64, length: u64) -> bool {
        let Some(end) = offset.checked_add(length) else {
            return false;
        };
        let mut at = offset;
        let mut index = self.find(offset);
        while at < end {
            match self.pieces.get(index) {
                Some(piece) if piece.start <= at => at = piece.end,
                _ => return false,
            }
            index += 1;
        }
        if let Ok(mut last) = self.last.lock() {
            *last = index.saturating_sub(1);
        }
        true
    }

    /// Returns the next record, if no record covers this offset.
    fn next_data(&self, offset: u64) -> u64 {
        let piece = self.pieces.get(self.find(offset));
        piece.map_or(self.len.max(offset), |piece| piece.start.max(offset))
    }

    /// Ranges that no record wrote are zero, as in a sparse file.
    fn read_exact_at(&self, mut buf: &mut [u8], mut offset: u64) -> std::io::Result<()> {
        let mut index = self.find(offset);
        while !buf.is_empty() {
            let piece = self
                .pieces
                .get(index)
                .ok_or(std::io::ErrorKind::UnexpectedEof)?;
            let upto = if offset < piece.start {
                piece.start
            } else {
                piece.end
            };
            let left = usize::try_from(upto - offset).unwrap_or(usize::MAX);
            let (now, later) = buf.split_at_mut(left.min(buf.len()));
            if offset < piece.start {
                now.fill(0);
            } else {
                self.file
                    .read_exact_at(now, piece.at + (offset - piece.start))?;
            }
            offset += now.len() as u64;
            buf = later;
            if offset >= piece.end {
                index += 1;
            }
        }
        if let Ok(mut last) = self.last.lock() {
            *last = index;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // any bytes will do
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    fn flattened(records: &[(i64, &[u8])], end: bool) -> Vec<u8> {
        let header = FlattenedHeader {
            signature: FLATTENED_MAGIC,
            kind: 1.into(),
            version: 1.into(),
        };
        let mut file = header.as_bytes().to_vec();
        file.resize(4096, 0);
        let mut put = |offset: i64, bytes: i64, data: &[u8]| {
            let record = FlattenedRecord {
                offset: offset.into(),
                bytes: bytes.into(),
            };
            file.extend(record.as_bytes());
            file.extend(data);
        };
        for (offset, data) in records {
            put(*offset, data.len() as i64, data);
        }
        if end {
            put(-1, -1, &[]);
        }
        file
    }

    #[test]
    fn a_later_record_replaces_what_an_earlier_one_wrote() {
        let records: [(i64, &[u8]); 4] = [(8, b"aaaa"), (0, b"bb"), (9, b"cc"), (3, b"dd")];
        let (file, unfinished) = Unflattened::open(Box::new(flattened(&records, true))).unwrap();
        assert!(!unfinished);
        let mut all = [9; 12];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!(&all, b"bb\0dd\0\0\0acca");
    }

    #[test]
    fn a_file_that_ends_early_is_unfinished_and_a_false_place_is_told() {
        let cut = flattened(&[(0, b"ab")], false);
        assert!(Unflattened::open(Box::new(cut)).unwrap().1);
        for records in [[(-5_i64, &b"ab"[..])], [(0, b"")], [(i64::MAX, b"ab")]] {
            let file = flattened(&records, true);
            let opened = Unflattened::open(Box::new(file));
            match (records[0].0, opened) {
                (i64::MAX, Ok(_)) => {}
                (_, Err(DumpError::Damaged { offset: 4096, .. })) => {}
                (place, _) => panic!("{place}"),
            }
        }
    }

    proptest! {
        #[test]
        fn any_order_of_records_gives_the_file_that_writing_them_gives(
            records in prop::collection::vec((0_usize..200, 1_usize..60, any::<u8>()), 1..20),
            reads in prop::collection::vec((0_usize..200, 0_usize..60), 1..10),
        ) {
            let mut expected = Vec::new();
            let mut list = Vec::new();
            for (at, length, byte) in records {
                let data: Vec<u8> = (0..length).map(|n| byte.wrapping_add(n as u8)).collect();
                if expected.len() < at + length {
                    expected.resize(at + length, 0);
                }
                expected[at..at + length].copy_from_slice(&data);
                list.push((at as i64, data));
            }
            let list: Vec<(i64, &[u8])> = list.iter().map(|(at, d)| (*at, d.as_slice())).collect();
            let (file, _) = Unflattened::open(Box::new(flattened(&list, true))).unwrap();
            prop_assert_eq!(file.len(), expected.len() as u64);
            for (at, length) in reads {
                let mut read = vec![0; length];
                let whole = file.read_exact_at(&mut read, at as u64).is_ok();
                let fits = at + length <= expected.len() || length == 0;
                prop_assert_eq!(whole, fits);
                if whole && length > 0 {
                    prop_assert_eq!(&read[..], &expected[at..at + length]);
                }
            }
        }
    }
}
