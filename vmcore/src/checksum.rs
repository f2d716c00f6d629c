//! The checksum of a dump written by kmorph: the CRC-32 of the whole file, combined from its pieces.

use crate::bytes::{self, Bytes};
use crate::dump::OwnNote;
use crate::error::DumpError;

/// Number of bytes per read.
const BUFFER_BYTES: usize = 1 << 20;

/// Computes the checksum of a file whose pieces arrive in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Running {
    crc: crc32fast::Hasher,
    zeros: Zeros,
    len: u64,
}

impl Running {
    /// Adds the next bytes.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.crc.update(bytes);
        self.len += bytes.len() as u64;
    }

    /// Adds the next bytes, whose checksum is known.
    pub(crate) fn add_piece(&mut self, crc: u32, len: u64) {
        self.crc
            .combine(&crc32fast::Hasher::new_with_initial_len(crc, len));
        self.len += len;
    }

    /// Adds this many zeros.
    pub(crate) fn add_zeros(&mut self, count: u64) {
        self.zeros.add_to(&mut self.crc, count);
        self.len += count;
    }

    /// Starts again.
    pub(crate) fn clear(&mut self) {
        self.crc.reset();
        self.len = 0;
    }

    /// Returns the number of bytes so far.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Returns the checksum.
    pub(crate) fn value(&self) -> u32 {
        self.crc.clone().finalize()
    }
}

/// Computes the checksum of numbered pieces, which are consecutive in the file and arrive in any order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pieces {
    all: Running,
    next: u64,
    /// Checksum and length of pieces that arrived before their predecessors.
    early: std::collections::BTreeMap<u64, (u32, u64)>,
}

impl Pieces {
    /// Adds piece `number`, counted from 0, with this checksum and length.
    pub(crate) fn add(&mut self, number: u64, crc: u32, len: u64) {
        self.early.insert(number, (crc, len));
        while let Some((crc, len)) = self.early.remove(&self.next) {
            self.all.add_piece(crc, len);
            self.next += 1;
        }
    }

    /// Returns all pieces, once all have arrived.
    pub(crate) fn all(&self) -> &Running {
        &self.all
    }
}

/// Checksums of 1, 2, 4 … zeros, which combine to any number of zeros in at most 64 steps.
#[derive(Clone, Debug, Default)]
struct Zeros {
    powers: Vec<crc32fast::Hasher>,
}

impl Zeros {
    fn add_to(&mut self, crc: &mut crc32fast::Hasher, mut count: u64) {
        let mut power = 0;
        while count != 0 {
            if self.powers.len() == power {
                let next = match self.powers.last() {
                    None => {
                        let mut one = crc32fast::Hasher::new();
                        one.update(&[0]);
                        one
                    }
                    Some(half) => {
                        let mut double = half.clone();
                        double.combine(half);
                        double
                    }
                };
                self.powers.push(next);
            }
            if count & 1 == 1 {
                crc.combine(&self.powers[power]);
            }
            count >>= 1;
            power += 1;
        }
    }
}

/// Returns the checksum of a file, with the contents of kmorph's note at `note` taken as zeros.
pub(crate) fn of_file(file: &dyn Bytes, note: u64) -> Result<u32, DumpError> {
    let mut running = Running::default();
    let mut buf = vec![0; BUFFER_BYTES];
    let note_end = note + size_of::<OwnNote>() as u64;
    let mut at = 0;
    while at < file.len() {
        let data = file.next_data(at);
        if data > at {
            running.add_zeros(data - at);
            at = data;
            continue;
        }
        let left = usize::try_from(file.len() - at).unwrap_or(usize::MAX);
        let part = &mut buf[..left.min(BUFFER_BYTES)];
        bytes::read(file, at, part, "the file")?;
        let end = at + part.len() as u64;
        if note < end && note_end > at {
            // `from` and `upto` are within the part.
            let from = usize::try_from(note.saturating_sub(at)).unwrap_or(0);
            let upto = usize::try_from(note_end.min(end) - at).unwrap_or(0);
            part[from..upto].fill(0);
        }
        running.add(part);
        at = end;
    }
    Ok(running.value())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_and_zeros_add_up_to_the_whole() {
        let mut whole = b"before".to_vec();
        whole.resize(whole.len() + 100_001, 0);
        whole.extend(b"behind");
        let mut running = Running::default();
        running.add(b"before");
        running.add_zeros(100_001);
        running.add_piece(crc32fast::hash(b"behind"), 6);
        assert_eq!(running.value(), crc32fast::hash(&whole));
        assert_eq!(running.len(), whole.len() as u64);
    }

    #[test]
    fn the_note_itself_counts_as_zeros_wherever_it_lies() {
        for note in [0, 5, BUFFER_BYTES - 40, 2 * BUFFER_BYTES - 88] {
            let mut file = vec![7; 2 * BUFFER_BYTES];
            let crc = of_file(&file, note as u64).unwrap();
            file[note..note + 88].fill(0);
            assert_eq!(crc, crc32fast::hash(&file), "{note}");
        }
    }
}
