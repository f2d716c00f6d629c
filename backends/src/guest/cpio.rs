//! Writes cpio archives in the format that Linux unpacks at boot.
//!
//! Source of the layout: Linux, Documentation/driver-api/early-userspace/buffer-format.rst ("newc").
//! An image may contain several archives; a later file replaces an earlier one of the same name.

use std::io::{self, Write};

/// Alignment of every part of an archive, bytes.
const ALIGN: usize = 4;
const TRAILER: &str = "TRAILER!!!";

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFCHR: u32 = 0o020_000;

/// An archive under construction, written to `W`.
pub(super) struct Archive<W: Write> {
    to: W,
    inode: u32,
    written: usize,
}

/// The fields of an entry's header.
#[derive(Default)]
struct Meta {
    mode: u32,
    device: (u32, u32),
}

impl<W: Write> Archive<W> {
    /// Begins an archive; `to` must be at a multiple of four bytes.
    pub(super) fn new(to: W) -> Self {
        Self {
            to,
            inode: 0,
            written: 0,
        }
    }

    /// Adds a directory. `name` has no leading slash.
    pub(super) fn directory(&mut self, name: &str) -> io::Result<()> {
        let mode = S_IFDIR | 0o755;
        self.entry(
            name,
            &Meta {
                mode,
                device: (0, 0),
            },
            b"",
        )
    }

    /// Adds a character device.
    pub(super) fn device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        let meta = Meta {
            mode: S_IFCHR | 0o600,
            device: (major, minor),
        };
        self.entry(name, &meta, b"")
    }

    /// Adds a file with these permissions.
    pub(super) fn file(&mut self, name: &str, permissions: u32, data: &[u8]) -> io::Result<()> {
        let mode = S_IFREG | permissions & 0o7777;
        self.entry(
            name,
            &Meta {
                mode,
                device: (0, 0),
            },
            data,
        )
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry(TRAILER, &Meta::default(), b"")?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn entry(&mut self, name: &str, meta: &Meta, data: &[u8]) -> io::Result<()> {
        let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let size = u32::try_from(data.len()).map_err(too_large)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
        self.inode += 1;
        let (major, minor) = meta.device;
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [
            self.inode, meta.mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0,
        ];
        self.put(b"070701")?;
        for field in fields {
            self.put(format!("{field:08x}").as_bytes())?;
        }
        self.put(name.as_bytes())?;
        self.put(b"\0")?;
        self.pad()?;
        self.put(data)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.to.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = self.written.next_multiple_of(ALIGN) - self.written;
        self.put(&[0; ALIGN][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.directory("etc").unwrap();
        archive.file("etc/a", 0o644, b"hello").unwrap();
        archive.device("console", 5, 1).unwrap();
        archive.finish().unwrap()
    }

    #[test]
    fn entries_are_laid_out_as_linux_reads_them() {
        let bytes = sample();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("07070100000001000041ed"), "{text}");
        assert_eq!(bytes.len() % ALIGN, 0);
        // The header has 110 bytes; with "etc\0" 114, padded to 116; the next entry begins there.
        assert_eq!(&bytes[116..122], b"070701");
        let data = text.find("hello").unwrap();
        assert_eq!(data % ALIGN, 0);
        assert!(text.contains("0000000500000001"), "the device's numbers");
        assert!(text.contains(TRAILER));
    }

    #[test]
    fn what_is_written_another_reader_lists() {
        use std::process::{Command, Stdio};
        let spawned = Command::new("cpio")
            .args(["--list", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        // A minimal machine may lack cpio; the test above covers the layout itself.
        let Ok(mut child) = spawned else { return };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "etc\netc/a\nconsole\n"
        );
    }
}
