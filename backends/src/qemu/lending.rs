//! Lends a dead guest's memory to a survivor, as an ivshmem-plain device in a port that every guest has for this
//! purpose.
//!
//! ```text
//!  dead guest's memfd ──offset, size──▶ memory-backend-file ──▶ ivshmem-plain, BAR 2 ──▶ pcie-root-port 0000:00:1e.0
//!  (held by the daemon)                 lent-memory-<n>         lent                     lending
//! ```
//!
//! * The memory backend opens the file read-only, so that no guest and no QEMU can write to it. That also makes it
//!   ROM for QEMU, and QEMU never reports ROM to vhost devices.
//! * QEMU exits over a BAR whose size is not a power of two, and over a file that is shorter than its mapping. This
//!   would kill a survivor, so both are ruled out before anything is plugged.
//! * The names are fixed, so that a later daemon can take a loan back. Only the backend's name has a part that is new
//!   each time: QEMU forgets the name of unplugged memory later than the device, and exits if the next backend has
//!   the same name.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{SealFlags, fcntl_get_seals};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{qmp, run_dir};
use crate::contract::{LentPlace, LentWindow, Loan, MemoryRange};

/// Maximum size of a loan, bytes: a power of two. Even on a processor with 39-bit addresses (512 GiB), the reserved
/// address space leaves most of the rest to the guest's memory.
const LENT_MAX_BYTES: u64 = 16 << 30;
/// Address space that the firmware reserves for the port, bytes. A BAR is aligned to its size, but the port's window
/// need not be (SeaBIOS 1.16 aligns it to 2 GiB): a window of twice the size always contains an aligned place.
const RESERVED_BYTES: u64 = 2 * LENT_MAX_BYTES;
/// Minimum size of a loan, bytes: QEMU maps whole pages.
const LENT_MIN_BYTES: u64 = 4096;
/// Maximum time for a guest to release a loan. An idle guest takes milliseconds, in software emulation too.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval between requests for the release: a guest may miss a request during its boot.
const ASK_AGAIN_EVERY: Duration = Duration::from_secs(1);
/// Interval between checks for the release.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// QEMU's name for the port.
const PORT: &str = "lending";
/// Its address in the guest; QEMU gets only the last part.
const PORT_ADDRESS: &str = "0000:00:1e.0";
const PORT_SLOT: &str = "1e.0";
/// QEMU's name for the device.
const DEVICE: &str = "lent";
/// QEMU's type of a backend that maps a file.
const BACKEND: &str = "memory-backend-file";
/// Prefix of QEMU's name for the memory.
const MEMORY_PREFIX: &str = "lent-memory-";
/// Path of named devices in QEMU's object tree.
const DEVICES: &str = "/machine/peripheral";
/// Path of backends in QEMU's object tree.
const OBJECTS: &str = "/objects";

/// Returns the port, as an argument of QEMU's `-device`.
pub(super) fn port() -> String {
    format!(
        "pcie-root-port,id={PORT},bus=pcie.0,addr={PORT_SLOT},chassis=1,pref64-reserve={RESERVED_BYTES}"
    )
}

/// Lends the end of this memory to the guest with this run directory. Returns `None` if the guest has no port for it,
/// its QEMU does not support it, or there is no memory.
pub(super) async fn lend(run_dir: &Path, memory: &[MemoryRange]) -> io::Result<Option<Loan>> {
    let commands = run_dir.join(run_dir::COMMANDS);
    let Some(first) = memory.first() else {
        return Ok(None);
    };
    let typename = Some(json!({ "typename": BACKEND }));
    let can = names(&commands, "qom-list-properties", typename).await?;
    // A guest from an older daemon has no port; QEMU before 8.1 can map only the beginning of a file.
    if !holds(&children(&commands, DEVICES).await?, PORT) || !holds(&can, "offset") {
        return Ok(None);
    }
    let file = File::open(&first.host_path)?;
    let piece = Piece::of(memory, measured(&file)?)?;
    take_back(run_dir).await?;
    plug(&commands, &file, &piece).await?;
    Ok(Some(Loan {
        place: LentPlace::PciPort(PORT_ADDRESS.to_owned()),
        windows: piece.windows,
    }))
}

/// Takes back the loan of the guest with this run directory.
pub(super) async fn take_back(run_dir: &Path) -> io::Result<()> {
    let commands = run_dir.join(run_dir::COMMANDS);
    unplug(&commands).await?;
    for name in children(&commands, OBJECTS).await? {
        if name.starts_with(MEMORY_PREFIX) {
            qmp::command(&commands, "object-del", Some(json!({ "id": name }))).await?;
        }
    }
    Ok(())
}

/// Returns the length of a file, which must be suitable for lending.
fn measured(file: &File) -> io::Result<u64> {
    // Only a memfd has seals, so this is not another file that has reused the descriptor.
    if !fcntl_get_seals(file)?.contains(SealFlags::SHRINK) {
        return Err(invalid(
            "the memory's file could be truncated under the survivor, which would kill it"
                .to_owned(),
        ));
    }
    Ok(file.metadata()?.len())
}

/// The part of a memory to lend.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    /// Its offset in the file, a multiple of [`LENT_MIN_BYTES`].
    offset: u64,
    /// A power of two from [`LENT_MIN_BYTES`] to [`LENT_MAX_BYTES`].
    bytes: u64,
    windows: Vec<LentWindow>,
}

impl Piece {
    /// Returns the end of a file of this length, with the memory in it.
    fn of(memory: &[MemoryRange], file_bytes: u64) -> io::Result<Self> {
        if file_bytes < LENT_MIN_BYTES || !file_bytes.is_multiple_of(LENT_MIN_BYTES) {
            return Err(invalid(format!(
                "the memory's file has {file_bytes} bytes, which is not a multiple of the page size"
            )));
        }
        let bytes = 1 << file_bytes.min(LENT_MAX_BYTES).ilog2();
        let offset = file_bytes - bytes;
        let mut windows = Vec::with_capacity(memory.len());
        for range in memory {
            let end = range.host_offset.checked_add(range.length);
            let end = end.filter(|end| *end <= file_bytes).ok_or_else(|| {
                invalid(format!(
                    "the memory's file has {file_bytes} bytes and does not contain {:#x} at {:#x}",
                    range.length, range.host_offset
                ))
            })?;
            let begin = range.host_offset.max(offset);
            if begin < end {
                windows.push(LentWindow {
                    guest_address: range
                        .guest_address
                        .saturating_add(begin - range.host_offset),
                    length: end - begin,
                    offset: begin - offset,
                });
            }
        }
        if memory
            .iter()
            .any(|range| range.host_path != memory[0].host_path)
        {
            return Err(invalid("the memory lies in several files".to_owned()));
        }
        windows.sort_by_key(|window| window.offset);
        Ok(Self {
            offset,
            bytes,
            windows,
        })
    }
}

async fn plug(commands: &Path, file: &File, piece: &Piece) -> io::Result<()> {
    let random = getrandom::u64().map_err(io::Error::other)?;
    let name = format!("{MEMORY_PREFIX}{random:016x}");
    let backend = json!({
        "qom-type": BACKEND,
        "id": name,
        // QEMU, with the same user, opens the file before it answers.
        "mem-path": format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()),
        "share": true,
        "readonly": true,
        "offset": piece.offset,
        "size": piece.bytes,
    });
    qmp::command(commands, "object-add", Some(backend)).await?;
    let device = json!({ "driver": "ivshmem-plain", "id": DEVICE, "bus": PORT, "memdev": name });
    let plugged = qmp::command(commands, "device_add", Some(device)).await;
    if plugged.is_err() {
        // QEMU refuses this if it has plugged the device but not answered; then the next take-back removes it.
        let _ = qmp::command(commands, "object-del", Some(json!({ "id": name }))).await;
    }
    plugged.map(drop)
}

/// Asks the guest to release the device, and waits until it is gone.
async fn unplug(commands: &Path) -> io::Result<()> {
    let begun = Instant::now();
    let mut asked: Option<Instant> = None;
    let mut refused = None;
    while holds(&children(commands, DEVICES).await?, DEVICE) {
        if begun.elapsed() > LET_GO_TIMEOUT {
            let why = refused.map_or_else(String::new, |error| format!(" (QEMU said: {error})"));
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("its kernel has not released the device within {LET_GO_TIMEOUT:?}{why}"),
            ));
        }
        if asked.is_none_or(|at| at.elapsed() >= ASK_AGAIN_EVERY) {
            asked = Some(Instant::now());
            let device = Some(json!({ "id": DEVICE }));
            // A refusal is not a failure yet: the device may be gone already, or about to go.
            refused = qmp::command(commands, "device_del", device).await.err();
        } else {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    Ok(())
}

/// Returns the names of the objects at this path in QEMU.
async fn children(commands: &Path, place: &str) -> io::Result<Vec<String>> {
    names(commands, "qom-list", Some(json!({ "path": place }))).await
}

/// Returns the names in the answer to a command.
async fn names(
    commands: &Path,
    command: &str,
    arguments: Option<Value>,
) -> io::Result<Vec<String>> {
    let answer = qmp::command(commands, command, arguments).await?;
    let entries = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    let name = |entry: &Value| entry["name"].as_str().map(str::to_owned);
    Ok(entries.iter().filter_map(name).collect())
}

fn holds(names: &[String], name: &str) -> bool {
    names.iter().any(|other| other == name)
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixListener;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn range(guest_address: u64, host_offset: u64, length: u64) -> MemoryRange {
        MemoryRange {
            guest_address,
            length,
            host_path: "/proc/1/fd/9".into(),
            host_offset,
        }
    }

    fn window(guest_address: u64, length: u64, offset: u64) -> LentWindow {
        LentWindow {
            guest_address,
            length,
            offset,
        }
    }

    #[test]
    fn the_end_of_the_memory_is_lent_in_a_size_that_a_bar_can_have() {
        let piece = Piece::of(&[range(0, 0, 192 * MIB)], 192 * MIB).unwrap();
        assert_eq!((piece.offset, piece.bytes), (64 * MIB, 128 * MIB));
        assert_eq!(piece.windows, [window(64 * MIB, 128 * MIB, 0)]);

        // Below and above the hole: 1 GiB of the lower memory, and all of the upper memory.
        let memory = [range(0, 0, 2 * GIB), range(4 * GIB, 2 * GIB, GIB)];
        let piece = Piece::of(&memory, 3 * GIB).unwrap();
        assert_eq!((piece.offset, piece.bytes), (GIB, 2 * GIB));
        let expected = [window(GIB, GIB, 0), window(4 * GIB, GIB, GIB)];
        assert_eq!(piece.windows, expected);

        let memory = [range(0, 0, 2 * GIB), range(4 * GIB, 2 * GIB, 38 * GIB)];
        let piece = Piece::of(&memory, 40 * GIB).unwrap();
        assert_eq!((piece.offset, piece.bytes), (24 * GIB, LENT_MAX_BYTES));
        assert_eq!(piece.windows, [window(26 * GIB, 16 * GIB, 0)]);
    }

    #[test]
    fn what_is_not_as_the_map_says_is_not_lent() {
        for (memory, bytes) in [
            (vec![range(0, 0, 2 * MIB)], MIB),
            (vec![range(0, u64::MAX, 2)], MIB),
            (vec![range(0, 0, 100)], 100),
            (vec![range(0, 0, MIB)], MIB + 1),
            (vec![range(0, 0, 0)], 0),
        ] {
            assert!(Piece::of(&memory, bytes).is_err(), "{memory:?} in {bytes}");
        }
        let elsewhere = MemoryRange {
            host_path: "/proc/1/fd/8".into(),
            ..range(MIB, MIB, MIB)
        };
        assert!(Piece::of(&[range(0, 0, MIB), elsewhere], 2 * MIB).is_err());
    }

    fn memory_file() -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = File::from(memfd_create("memory", flags).unwrap());
        memory.set_len(MIB).unwrap();
        memory
    }

    fn seal(memory: &File) {
        fcntl_add_seals(memory, SealFlags::SHRINK).unwrap();
    }

    #[test]
    fn only_memory_that_cannot_be_shortened_is_lent() {
        let memory = memory_file();
        let error = measured(&memory).unwrap_err().to_string();
        assert!(error.contains("truncated"), "{error}");
        seal(&memory);
        assert_eq!(measured(&memory).unwrap(), MIB);
        assert!(measured(&tempfile::tempfile_in("/var/tmp").unwrap()).is_err());
    }

    const DEADLINE: Duration = Duration::from_secs(30);
    const OFFSET: (&str, &str) = ("qom-list-properties", r#""return": [{"name": "offset"}]"#);
    const HAS_PORT: (&str, &str) = ("qom-list", r#""return": [{"name": "lending"}]"#);
    const NONE: (&str, &str) = ("qom-list", r#""return": []"#);
    const DONE: &str = r#""return": {}"#;

    /// Runs a QEMU that follows a script: expects each command on a new connection, and sends its answer.
    async fn qemu(listener: UnixListener, script: &[(&str, &str)]) {
        for (command, answer) in script {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let said = [
                (r#""QMP": {}"#, "qmp_capabilities"),
                (DONE, *command),
                (*answer, ""),
            ];
            for (says, next) in said {
                let line = format!("{{{says}}}\n");
                stream.get_mut().write_all(line.as_bytes()).await.unwrap();
                let mut heard = String::new();
                stream.read_line(&mut heard).await.unwrap();
                let named: serde_json::Result<Value> = serde_json::from_str(&heard);
                let named = named.map_or(Value::Null, |said| said["execute"].clone());
                assert_eq!(named.as_str().unwrap_or_default(), next);
            }
        }
    }

    async fn lend_with(memory: &File, script: &[(&str, &str)]) -> io::Result<Option<Loan>> {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(run_dir::COMMANDS)).unwrap();
        let range = MemoryRange {
            host_path: format!("/proc/self/fd/{}", memory.as_raw_fd()).into(),
            ..range(0, 0, MIB)
        };
        let ranges = [range];
        let both = async { tokio::join!(lend(dir.path(), &ranges), qemu(listener, script)) };
        let (lent, ()) = tokio::time::timeout(DEADLINE, both).await.unwrap();
        lent
    }

    #[tokio::test]
    async fn a_guest_without_the_port_and_an_older_qemu_are_lent_nothing() {
        let memory = memory_file();
        let without = lend_with(&memory, &[OFFSET, NONE]).await;
        assert_eq!(without.unwrap(), None);
        let older = ("qom-list-properties", r#""return": [{"name": "share"}]"#);
        let older = lend_with(&memory, &[older, HAS_PORT]).await;
        assert_eq!(older.unwrap(), None);
    }

    #[tokio::test]
    async fn a_device_that_is_refused_leaves_no_memory_behind() {
        let memory = memory_file();
        seal(&memory);
        let script = [
            OFFSET,
            HAS_PORT,
            HAS_PORT,
            NONE,
            ("object-add", DONE),
            ("device_add", r#""error": {"desc": "no such driver"}"#),
            ("object-del", DONE),
        ];
        let error = lend_with(&memory, &script).await.unwrap_err().to_string();
        assert!(error.contains("no such driver"), "{error}");
    }
}
