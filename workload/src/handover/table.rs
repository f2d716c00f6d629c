//! The connection table: the buffered data of each connection, in one memfd.
//!
//! ```text
//!   count x { state_len: u32, reserved: u32, input_len: u64, output_len: u64,
//!             state, input, output }                          all little-endian, no padding
//! ```
//!
//! One memfd instead of many packets keeps the freeze short, whatever the size of the buffers.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{MAX_CONNECTIONS, MAX_TABLE_BYTES};

/// Maximum size of a workload's own state for one connection, in bytes.
pub const MAX_CONNECTION_STATE_BYTES: usize = 64 * 1024;

/// The data of one connection apart from its socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionBuffers {
    /// The workload's own state, such as name and flags.
    pub state: Vec<u8>,
    /// Data read from the socket and not yet executed.
    pub input: Vec<u8>,
    /// Answers not yet written to the socket.
    pub output: Vec<u8>,
}

/// Writes `entries` to a new memfd. Returns it with its length.
///
/// # Errors
/// The system's error; `InvalidInput` if a limit is exceeded.
pub fn write<'a>(
    entries: impl Iterator<Item = (&'a [u8], &'a [u8], &'a [u8])>,
) -> io::Result<(OwnedFd, u64)> {
    let invalid = |text| io::Error::new(io::ErrorKind::InvalidInput, text);
    let mut file = File::from(memfd_create(c"kmorph-connections", MFdFlags::MFD_CLOEXEC)?);
    let mut out = io::BufWriter::with_capacity(64 * 1024, &mut file);
    let mut total = 0u64;
    for (count, (state, input, output)) in entries.enumerate() {
        if count >= MAX_CONNECTIONS || state.len() > MAX_CONNECTION_STATE_BYTES {
            return Err(invalid("too many connections, or too much state for one"));
        }
        let state_len = u32::try_from(state.len()).unwrap_or(u32::MAX);
        out.write_all(&state_len.to_le_bytes())?;
        out.write_all(&0u32.to_le_bytes())?;
        out.write_all(&(input.len() as u64).to_le_bytes())?;
        out.write_all(&(output.len() as u64).to_le_bytes())?;
        for bytes in [state, input, output] {
            out.write_all(bytes)?;
            total += bytes.len() as u64;
        }
        total += HEADER as u64;
        if total > MAX_TABLE_BYTES {
            return Err(invalid("too much is buffered for the connections"));
        }
    }
    out.flush()?;
    drop(out);
    Ok((file.into(), total))
}

const HEADER: usize = 24;

/// Reads a table of `count` entries and `len` bytes.
///
/// # Errors
/// The system's error; `InvalidData` if the table does not match its length and count.
pub fn read(fd: OwnedFd, count: u32, len: u64) -> io::Result<Vec<ConnectionBuffers>> {
    let invalid = |text| io::Error::new(io::ErrorKind::InvalidData, text);
    let count = count as usize;
    if count > MAX_CONNECTIONS || len > MAX_TABLE_BYTES {
        return Err(invalid("connection table over its limit"));
    }
    let mut file = File::from(fd);
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(len).read_to_end(&mut bytes)?;
    let mut rest = bytes.as_slice();
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        let (header, after) = rest
            .split_first_chunk::<HEADER>()
            .ok_or_else(|| invalid("truncated connection table"))?;
        rest = after;
        let [a, b, c, d, _, _, _, _, lengths @ ..] = header;
        let state_len = u64::from(u32::from_le_bytes([*a, *b, *c, *d]));
        let (input_len, output_len) = lengths.split_at(8);
        let mut take = |len: u64| -> io::Result<Vec<u8>> {
            let (taken, after) = usize::try_from(len)
                .ok()
                .and_then(|len| rest.split_at_checked(len))
                .ok_or_else(|| invalid("truncated connection table"))?;
            rest = after;
            Ok(taken.to_vec())
        };
        entries.push(ConnectionBuffers {
            state: take(state_len)?,
            input: take(word(input_len))?,
            output: take(word(output_len))?,
        });
    }
    if rest.is_empty() {
        Ok(entries)
    } else {
        Err(invalid("connection table longer than its entries"))
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes
        .first_chunk::<8>()
        .map_or(u64::MAX, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<ConnectionBuffers> {
        vec![
            ConnectionBuffers {
                state: b"name".to_vec(),
                input: b"*1\r\n$4\r\nPI".to_vec(),
                output: Vec::new(),
            },
            ConnectionBuffers {
                output: vec![7; 300_000],
                ..ConnectionBuffers::default()
            },
        ]
    }

    fn written() -> (OwnedFd, u64) {
        let entries = entries();
        write(
            entries
                .iter()
                .map(|e| (&e.state[..], &e.input[..], &e.output[..])),
        )
        .unwrap()
    }

    #[test]
    fn a_table_reads_back_as_written() {
        let (fd, len) = written();
        assert_eq!(read(fd, 2, len).unwrap(), entries());
    }

    #[test]
    fn a_table_that_is_cut_or_miscounted_is_refused() {
        for (count, cut) in [(3, 0), (1, 0), (2, 1), (2, 300_000)] {
            let (fd, len) = written();
            let error = read(fd, count, len - cut).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
