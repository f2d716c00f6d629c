//! Bounds the size of a guest's console log, because a guest can print forever.
//!
//! QEMU appends to `console.log`. When the file exceeds its limit, it is copied to `console.log.old` and truncated;
//! an appending writer continues at the new end.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use kmorph_files::{OwnDir, PRIVATE_DIR};

use crate::contract::PANIC_LINE;

/// Maximum size of a log before it is rotated, in bytes. Disk usage is two logs of this size, plus
/// the output between two checks.
pub(super) const LOG_MAX_BYTES: u64 = 1024 * 1024;
/// Interval between two checks.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Number of bytes at the end of a log that an error message may quote.
const QUOTE_BYTES: u64 = 400;
/// Number of bytes at the end of a console that are searched for a panic: the output after a panic fits.
const SEARCH_BYTES: u64 = 64 * 1024;
/// A mark in the agent's log lines about connections.
const OF_CONNECTIONS: &str = " DEBG ";

/// Rotates the log if it is too large.
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

/// Returns the end of a log for a message, as one line of printable characters.
pub(super) fn tail(log: &Path) -> String {
    let Ok(bytes) = end_of(log) else {
        return String::new();
    };
    printable(&String::from_utf8_lossy(&bytes))
}

/// Returns the guest's last output, as evidence: the line of its panic, otherwise the last complete lines except the
/// agent's lines about connections. One line of printable characters.
pub(super) fn last_words(log: &Path) -> String {
    let Ok((bytes, cut)) = end_within(log, SEARCH_BYTES) else {
        return String::new();
    };
    let text = String::from_utf8_lossy(&bytes);
    // A line without its beginning is of little use.
    let lines = text.lines().skip(usize::from(cut));
    let lines: Vec<&str> = lines
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    if let Some(panic) = lines.iter().rfind(|line| line.contains(PANIC_LINE)) {
        return printable(panic);
    }
    let mut room = usize::try_from(QUOTE_BYTES).unwrap_or(usize::MAX);
    let told = lines
        .iter()
        .rev()
        .filter(|line| !line.contains(OF_CONNECTIONS));
    let mut quoted: Vec<&str> = told
        .take_while(|line| {
            let fits = line.len() <= room;
            room = room.saturating_sub(line.len());
            fits
        })
        .copied()
        .collect();
    quoted.reverse();
    printable(&quoted.join("\n"))
}

/// Returns the last [`QUOTE_BYTES`] of a log, or all of a shorter one.
fn end_of(log: &Path) -> io::Result<Vec<u8>> {
    end_within(log, QUOTE_BYTES).map(|(bytes, _)| bytes)
}

/// Returns the last `most` bytes of a log, and whether the log is longer.
fn end_within(log: &Path, most: u64) -> io::Result<(Vec<u8>, bool)> {
    let mut file = File::open(log)?;
    let from = file.metadata()?.len().saturating_sub(most);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok((bytes, from > 0))
}

/// Returns the lines of `text`, joined with ` | ` and without terminal control characters.
fn printable(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<String> = lines
        .map(|line| {
            let mut shown = String::with_capacity(line.len());
            for c in line.chars() {
                match c.is_control() {
                    true => shown.extend(c.escape_default()),
                    false => shown.push(c),
                }
            }
            shown
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
        let end = "x | INFO mounted | \\u{1b}[2JINFO module loaded";
        assert!(tail.ends_with(end), "{tail:?}");
        assert!(tail.len() <= usize::try_from(QUOTE_BYTES).unwrap() + 16);
    }

    #[test]
    fn the_last_words_of_a_guest_are_its_panic_or_whole_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        assert_eq!(last_words(&path), "");
        let panic = "[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs";
        let trace = "[    1.1]  entry_SYSCALL_64+0x68\n".repeat(500);
        std::fs::write(&path, format!("[    0.9] before\n{panic}\n{trace}")).unwrap();
        assert_eq!(last_words(&path), panic);
        let connection = format!("DATE DEBG connection, {}\n", "y".repeat(300));
        let text = format!(
            "{}\n\x1b[2Jlast but one\nlast\n{connection}",
            "x".repeat(400)
        );
        std::fs::write(&path, text).unwrap();
        assert_eq!(last_words(&path), "\\u{1b}[2Jlast but one | last");
        // The beginning of the only line is missing.
        std::fs::write(
            &path,
            "x".repeat(2 * usize::try_from(SEARCH_BYTES).unwrap()),
        )
        .unwrap();
        assert_eq!(last_words(&path), "");
    }
}
