//! Stores the newest event id in a file that outlives the daemon.
//!
//! The file is written without waiting for the disk: the kernel keeps the data when a daemon is killed. A crash of
//! the host may lose it, so the file also contains the host's boot id.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Maximum size of the content, bytes: a boot id and a number.
const CONTENT_MAX_BYTES: usize = 128;

/// The file.
#[derive(Debug)]
pub(super) struct Mark {
    file: File,
    boot_id: String,
}

impl Mark {
    /// Opens or creates the file at `path`. Also returns the newest id that a daemon has assigned since the
    /// host's boot `boot_id`, if known.
    pub(super) fn open(path: &Path, boot_id: &str) -> io::Result<(Self, Option<u64>)> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
            .open(path)?;
        let mut content = [0; CONTENT_MAX_BYTES];
        let length = file.read_at(&mut content, 0)?;
        let found = parse(&content[..length], boot_id);
        let boot_id = boot_id.to_owned();
        Ok((Self { file, boot_id }, found))
    }

    /// Writes the newest id.
    pub(super) fn note(&self, id: u64) -> io::Result<()> {
        // The length is constant, so that the content replaces the older one completely.
        let content = format!("{} {id:020}\n", self.boot_id);
        self.file.write_all_at(content.as_bytes(), 0)
    }
}

fn parse(content: &[u8], boot_id: &str) -> Option<u64> {
    let text = std::str::from_utf8(content).ok()?;
    let (boot, id) = text.strip_suffix('\n')?.split_once(' ')?;
    (boot == boot_id).then(|| id.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_found_again_in_the_same_boot_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("event-id");
        let (mark, found) = Mark::open(&path, "boot-1").unwrap();
        assert_eq!(found, None);
        mark.note(7).unwrap();
        mark.note(8).unwrap();
        assert_eq!(Mark::open(&path, "boot-1").unwrap().1, Some(8));
        assert_eq!(Mark::open(&path, "boot-2").unwrap().1, None);
        for damaged in ["", "boot-1", "boot-1 x\n", "boot-1 12"] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(Mark::open(&path, "boot-1").unwrap().1, None, "{damaged}");
        }
    }
}
