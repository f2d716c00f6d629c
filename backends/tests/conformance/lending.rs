//! Memory of a dead guest, lent to a survivor and read there.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use kmorph_backends::contract::{LentPlace, Loan, MemoryRange, Placement};
use kmorph_launch::PublishedPort;
use kmp_transport::link::BoxedLink;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use super::ground::Ground;

const PORT: u16 = 7000;
/// Size of the dead guest's memory, bytes: below and above the PCI hole, and not a valid size of a BAR.
const DEAD_BYTES: u64 = 3 << 30;
/// Size of a block that is compared, bytes.
const BLOCK: usize = 256 * 1024;
/// A generous time bound for a backend's attempt to take back memory that a guest does not release.
const BOUND: Duration = Duration::from_secs(15);

/// Connection to the program in the survivor that reads the lent memory.
struct Reader(BufReader<BoxedLink>);

impl Reader {
    /// Sends a command; returns the number in the answer and, if `with_bytes`, as many bytes.
    async fn ask(&mut self, command: &str, with_bytes: bool) -> Result<(u64, Vec<u8>), String> {
        let line = format!("{command}\n");
        self.0.get_mut().write_all(line.as_bytes()).await.unwrap();
        let mut said = String::new();
        self.0.read_line(&mut said).await.unwrap();
        let number = said.trim().strip_prefix("ok ").map(|n| n.parse().unwrap());
        let number: u64 = number.ok_or_else(|| said.clone())?;
        let follow = if with_bytes { number } else { 0 };
        let mut bytes = vec![0; usize::try_from(follow).unwrap()];
        self.0.read_exact(&mut bytes).await.unwrap();
        Ok((number, bytes))
    }

    async fn open(&mut self, loan: &Loan) -> u64 {
        let (bytes, _) = self
            .ask(&format!("open {}", port(loan)), false)
            .await
            .unwrap();
        bytes
    }

    async fn read(&mut self, offset: u64) -> Result<Vec<u8>, String> {
        let read = self.ask(&format!("read {offset} {BLOCK}"), true).await;
        read.map(|(_, bytes)| bytes)
    }

    /// Compares the lent memory with the dead guest's memory at the addresses of the loan.
    async fn compare(&mut self, loan: &Loan, dead: &Memory) {
        let end = loan.windows.iter().map(|w| w.offset + w.length).max();
        assert_eq!(self.open(loan).await, end.unwrap());
        for window in &loan.windows {
            let last = window.length - BLOCK as u64;
            // The beginning, the end, and a block in use.
            let used = (0..=last).rev().step_by(BLOCK).find(|at| {
                let block = dead.block(window.guest_address + at);
                block.iter().filter(|byte| **byte != 0).count() > BLOCK / 2
            });
            for at in [0, last, used.expect("memory in use")] {
                let read = self.read(window.offset + at).await.unwrap();
                let expected = dead.block(window.guest_address + at);
                assert!(read == expected, "{at:#x} in {window:?}");
            }
        }
    }
}

/// Lent memory.
struct Memory {
    ranges: Vec<MemoryRange>,
    file: File,
}

impl Memory {
    fn of(ranges: Vec<MemoryRange>) -> Self {
        let file = File::open(&ranges[0].host_path).unwrap();
        Self { ranges, file }
    }

    fn block(&self, guest_address: u64) -> Vec<u8> {
        let within = |range: &&MemoryRange| {
            guest_address.checked_sub(range.guest_address) < Some(range.length)
                && guest_address >= range.guest_address
        };
        let range = self.ranges.iter().find(within).unwrap();
        let at = range.host_offset + (guest_address - range.guest_address);
        let mut block = vec![0; BLOCK];
        self.file.read_exact_at(&mut block, at).unwrap();
        block
    }
}

fn port(loan: &Loan) -> &str {
    let LentPlace::PciPort(port) = &loan.place;
    port
}

async fn survivor(ground: &Ground) -> (Placement, Reader) {
    let mut spec = ground.spec();
    spec.workload = Some(ground.workload("kmorph-test-lent-reader"));
    spec.ports = vec![PublishedPort {
        port: PORT,
        name: format!("port-{PORT}"),
    }];
    let placement = ground.spawn(spec).await;
    let link = ground.port(&placement, u32::from(PORT)).await;
    (placement, Reader(BufReader::new(link)))
}

/// Spawns and fences a guest; returns its placement and memory.
async fn dead(ground: &Ground, memory_bytes: u64) -> (Placement, Memory) {
    let mut spec = ground.spec();
    spec.name = "dead".parse().unwrap();
    spec.memory_bytes = memory_bytes;
    let placement = ground.spawn(spec).await;
    ground.answers(&placement).await;
    ground.fence(&placement).await;
    let ranges = ground.backend.memory_map(&placement).await.unwrap();
    (placement, Memory::of(ranges))
}

async fn lend(ground: &Ground, survivor: &Placement, dead: &Memory) -> Loan {
    let lent = ground.backend.lend(survivor, &dead.ranges).await.unwrap();
    lent.expect("a place for it")
}

/// Returns true if a process of the survivor maps the dead guest's memory.
fn maps(survivor: &Placement, dead: &Memory) -> bool {
    let pid = survivor.processes[0].pid;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let inode = dead.file.metadata().unwrap().ino().to_string();
    maps.lines()
        .any(|line| line.split_whitespace().nth(4) == Some(&inode))
}

async fn a_survivor_reads_what_it_was_lent(ground: &Ground) {
    let (survivor, mut reader) = survivor(ground).await;
    let (_, dead) = dead(ground, DEAD_BYTES).await;

    let loan = lend(ground, &survivor, &dead).await;
    reader.compare(&loan, &dead).await;
    let of = |loan: &Loan| -> Vec<_> {
        let windows = loan.windows.iter();
        windows.map(|w| (w.guest_address, w.length)).collect()
    };
    assert_eq!(of(&loan), [(1 << 30, 1 << 30), (4 << 30, 1 << 30)]);

    // The memory is read-only, although the survivor's kernel has tried to write.
    let before = dead.block(loan.windows[0].guest_address);
    let write = format!("write {}", port(&loan));
    reader.ask(&write, false).await.unwrap();
    assert!(dead.block(loan.windows[0].guest_address) == before);
    assert!(reader.read(0).await.unwrap() == before);

    // Another daemon takes the memory back, although a program has it open; the call can be repeated.
    assert!(maps(&survivor, &dead));
    let other = ground.another_daemon();
    other.take_back(&survivor).await.unwrap();
    other.take_back(&survivor).await.unwrap();
    let gone = async {
        while maps(&survivor, &dead) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    ground.in_time(gone, "the end of its mapping").await;
    let error = reader.read(0).await.unwrap_err();
    assert!(error.contains("reading"), "{error}");

    // Lends again immediately, in place of the present loan.
    for _ in 0..5 {
        let loan = lend(ground, &survivor, &dead).await;
        reader.compare(&loan, &dead).await;
    }
    ground.answers(&survivor).await;
    ground.fence(&survivor).await;
    other.take_back(&survivor).await.unwrap();
}

#[tokio::test]
async fn a_guest_of_linux_6_1_reads_what_it_was_lent() {
    a_survivor_reads_what_it_was_lent(&Ground::qemu()).await;
}

/// Its module for kerf-vsock, which drives devices of the same kind, ignores lent memory.
#[tokio::test]
async fn a_guest_of_linux_6_12_with_kerf_vsock_reads_what_it_was_lent() {
    a_survivor_reads_what_it_was_lent(&Ground::kerf("6.12")).await;
}

#[tokio::test]
async fn what_a_guest_does_not_let_go_is_taken_back_once_it_does() {
    let ground = Ground::qemu();
    let (survivor, mut reader) = survivor(&ground).await;
    let (_, dead) = dead(&ground, 256 << 20).await;
    let loan = lend(&ground, &survivor, &dead).await;
    reader.compare(&loan, &dead).await;
    assert!(ground.backend.freeze(&survivor).await.unwrap());
    let begun = Instant::now();
    let error = ground.backend.take_back(&survivor).await.unwrap_err();
    assert!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
    assert!(error.to_string().contains("has not released"), "{error}");
    let again = ground.backend.lend(&survivor, &dead.ranges).await;
    assert!(again.is_err(), "{again:?}");
    ground.backend.resume(&survivor).await.unwrap();
    ground.backend.take_back(&survivor).await.unwrap();
    let loan = lend(&ground, &survivor, &dead).await;
    reader.compare(&loan, &dead).await;
    ground.fence(&survivor).await;
}

#[tokio::test]
async fn a_release_gives_memory_back_that_a_survivor_still_has() {
    let ground = Ground::qemu();
    let (survivor, mut reader) = survivor(&ground).await;
    let (placement, dead) = dead(&ground, 256 << 20).await;
    let loan = lend(&ground, &survivor, &dead).await;
    reader.compare(&loan, &dead).await;
    assert!(dead.file.metadata().unwrap().blocks() > 0);
    let proof = ground.fence(&placement).await;
    ground.backend.release(&placement, &proof).await.unwrap();
    assert_eq!(dead.file.metadata().unwrap().blocks(), 0);
    assert!(reader.read(0).await.unwrap() == vec![0; BLOCK]);
    ground.backend.take_back(&survivor).await.unwrap();
    ground.answers(&survivor).await;
    ground.fence(&survivor).await;
}

/// The address space reserved for the largest loan suffices wherever the firmware places it beside the guest's devices.
#[tokio::test]
async fn the_end_of_a_large_memory_is_lent() {
    const BYTES: u64 = 40 << 30;
    const LENT: u64 = 16 << 30;
    let ground = Ground::qemu();
    let (survivor, mut reader) = survivor(&ground).await;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("large", flags).unwrap());
    file.set_len(BYTES).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    let host_path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let range = |guest_address, host_offset, length| MemoryRange {
        guest_address,
        length,
        host_path: host_path.clone().into(),
        host_offset,
    };
    let high = BYTES - (2 << 30);
    let memory = Memory::of(vec![range(0, 0, 2 << 30), range(4 << 30, 2 << 30, high)]);
    for (at, byte) in [(BYTES - LENT, 1), (BYTES - BLOCK as u64, 2)] {
        file.write_all_at(&vec![byte; BLOCK], at).unwrap();
    }
    let loan = lend(&ground, &survivor, &memory).await;
    reader.compare(&loan, &memory).await;
    assert_eq!(loan.windows.len(), 1);
    assert_eq!(loan.windows[0].length, LENT);
    ground.backend.take_back(&survivor).await.unwrap();
    ground.fence(&survivor).await;
}
