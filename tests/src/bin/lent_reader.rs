//! A workload that reads memory lent to its kernel, with the agent's own code, and tries to write it. Each line of
//! input is a command. The answer is a line, `ok N` or the error, and N bytes:
//!
//! ```text
//! open PORT              ok, number of bytes lent
//! read OFFSET LENGTH     ok, LENGTH, and that many bytes of the memory opened last
//! write PORT             ok 0: from this kernel's view, the whole first page was overwritten
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

/// The first socket passed by the agent (`LISTEN_FDS`, docs/workloads.md).
const LISTENER: i32 = 3;
const SYSFS: &str = "/sys";
const PAGE: usize = 4096;

fn main() -> io::Result<()> {
    // Like the agent, this process locks every mapping in memory.
    assert!(kmorph_launch::stay_resident()?);
    loop {
        let client = nix::sys::socket::accept(LISTENER)?;
        // SAFETY: accept has just created this descriptor, and no other code knows its number.
        let client = File::from(unsafe { OwnedFd::from_raw_fd(client) });
        // When a client hangs up, the next one is served.
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

/// Returns the path of the memory of the device below the port.
fn memory_below(port: &PciAddress) -> io::Result<PathBuf> {
    let port = format!("{SYSFS}/bus/pci/devices/{port}");
    let entries = std::fs::read_dir(port)?.flatten();
    let mut memory = entries.map(|entry| entry.path().join("resource2"));
    let found = memory.find(|path| path.exists());
    found.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Overwrites the first page of the memory.
fn overwrite(memory: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(memory)?;
    let length = NonZeroUsize::new(PAGE).unwrap();
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address that the system chooses replaces no other mapping.
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
