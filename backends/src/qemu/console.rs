//! What a guest prints is kept, but not without bound: a guest can print for ever.
//!
//! QEMU appends to `console.log`. When it is over its bound it is copied to `console.log.old` and
//! emptied; an appending writer goes on at the new end.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use kmorph_files::{OwnDir, PRIVATE_DIR};

/// Largest log, in bytes, before it is turned over. Two of this size are kept, and what comes in
/// between two looks.
pub(super) const LOG_MAX_BYTES: u64 = 1024 * 1024;
/// How often is looked.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The end of a log that an error message may quote, bytes.
const QUOTE_BYTES: u64 = 400;

/// Turns the log over if it is too large.
pub(super) fn bound(log: &Path) -> io::Result<()> {
    match std::fs::metadata(log) {
        Ok(meta) if meta.len() > LOG_MAX_BYTES => {}
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    let (Some(directory), Some(name)) = (log.parent(), log.file_name()) else {
        return Err(io::ErrorKind::InvalidFilename.into());
    };
    let mut old = name.to_owned();
    old.push(".old");
    let directory = OwnDir::make(directory, PRIVATE_DIR)?;
    let mut log = directory.file(name)?;
    io::copy(&mut log, &mut directory.empty_file(old)?)?;
    log.set_len(0)
}

/// The end of a log, for a message: what a guest printed there is made printable, and one line.
pub(super) fn tail(log: &Path) -> String {
    let Ok(bytes) = end_of(log) else {
        return String::new();
    };
    printable(&String::from_utf8_lossy(&bytes))
}

/// The last [`QUOTE_BYTES`] of a log, or all of a shorter one.
fn end_of(log: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(QUOTE_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(QUOTE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The lines of `text`, with ` | ` between them and without what a terminal would act upon.
fn printable(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<String> = lines
        .map(|line| {
            let shown = |c: char| if c.is_control() { '\u{fffd}' } else { c };
            line.chars().map(shown).collect()
        })
        .collect();
    lines.join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_log_over_its_bound_is_turned_over_under_its_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        bound(&path).unwrap();
        let options = std::fs::File::options().append(true).create(true).clone();
        let mut writer = options.open(&path).unwrap();
        let size = usize::try_from(LOG_MAX_BYTES).unwrap() + 1;
        writer.write_all(&vec![b'x'; size]).unwrap();
        bound(&path).unwrap();
        writer.write_all(b"after").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"after");
        let old = std::fs::metadata(dir.path().join("console.log.old")).unwrap();
        assert_eq!(old.len(), LOG_MAX_BYTES + 1);
    }

    #[test]
    fn the_end_of_a_log_is_one_line_that_no_terminal_acts_upon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        assert_eq!(tail(&path), "");
        let mut text = "x".repeat(2 * usize::try_from(QUOTE_BYTES).unwrap());
        text.push_str("\r\nINFO mounted\r\n\r\n\x1b[2JINFO module loaded\n");
        std::fs::write(&path, &text).unwrap();
        let tail = tail(&path);
        let end = "x | INFO mounted | \u{fffd}[2JINFO module loaded";
        assert!(tail.ends_with(end), "{tail:?}");
        assert!(tail.len() <= usize::try_from(QUOTE_BYTES).unwrap() + 16);
    }
}
