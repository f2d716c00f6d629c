//! A workload that reads memory which its kernel was lent, with the agent's own code, and tries to write it. Each
//! line that it gets is a command, answered with a line, `ok N` or why not, and N bytes:
//!
//! ```text
//! open PORT              ok, bytes that were lent
//! read OFFSET LENGTH     ok, LENGTH, and so many bytes; of what was opened last
//! write PORT             ok 0: the whole first page was overwritten, as far as this kernel can tell
//! ```

#![allow(
    clippy::unwrap_used,
    reason = "a workload that panics fails the test that runs it"
)]

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use kmorph_agent::lent::{Lent, PciAddress};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The first socket that an agent passes on (`LISTEN_FDS`, docs/workloads.md).
const LISTENER: i32 = 3;
const SYSFS: &str = "/sys";
const PAGE: usize = 4096;

fn main() -> io::Result<()> {
    // As the agent, whose every mapping is locked in memory then.
    assert!(kmorph_launch::stay_resident()?);
    loop {
        let client = nix::sys::socket::accept(LISTENER)?;
        // SAFETY: accept has just made this descriptor and nothing else knows its number.
        let client = File::from(unsafe { OwnedFd::from_raw_fd(client) });
        // A client that hangs up is followed by the next.
        let _ = serve(client);
    }
}

fn serve(mut client: File) -> io::Result<()> {
    let mut lent = None;
    for line in BufReader::new(client.try_clone()?).lines() {
        match answer(&line?, &mut lent) {
            Ok((number, bytes)) => {
                writeln!(client, "ok {number}")?;
                client.write_all(&bytes)?;
            }
            Err(error) => writeln!(client, "{error}")?,
        }
    }
    Ok(())
}

type Answer = Result<(u64, Vec<u8>), Box<dyn std::error::Error>>;

fn answer(line: &str, lent: &mut Option<Lent>) -> Answer {
    match line.split(' ').collect::<Vec<_>>()[..] {
        ["open", port] => {
            let opened = Lent::below_port(Path::new(SYSFS), port)?;
            Ok((lent.insert(opened).len(), Vec::new()))
        }
        ["read", offset, length] => {
            let mut bytes = vec![0; length.parse()?];
            lent.as_ref()
                .ok_or("nothing is open")?
                .read(offset.parse()?, &mut bytes)?;
            Ok((bytes.len() as u64, bytes))
        }
        ["write", port] => {
            overwrite(&memory_below(&port.parse()?)?)?;
            Ok((0, Vec::new()))
        }
        _ => Err("no such command".into()),
    }
}

/// The memory of the device below the port.
fn memory_below(port: &PciAddress) -> io::Result<PathBuf> {
    let port = format!("{SYSFS}/bus/pci/devices/{port}");
    let entries = std::fs::read_dir(port)?.flatten();
    let mut memory = entries.map(|entry| entry.path().join("resource2"));
    let found = memory.find(|path| path.exists());
    found.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Writes over its first page.
fn overwrite(memory: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(memory)?;
    let length = NonZeroUsize::new(PAGE).unwrap();
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the system's choice takes nothing from anybody.
    let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, &file, 0) }?;
    let pattern = File::open("/dev/urandom")?;
    // SAFETY: the page is mapped until after the call, and only the kernel writes to it.
    let written = unsafe { nix::libc::read(pattern.as_raw_fd(), start.as_ptr(), PAGE) };
    let written = Errno::result(written);
    // SAFETY: mapped above, and nothing points into it.
    unsafe { munmap(start, PAGE) }?;
    if written? == PAGE.cast_signed() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}
