//! VMCOREINFO is looked for from the ends of memory, and found wherever it is.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::sync::atomic::{AtomicU64, Ordering};

use kmorph_vmcore::kernel::{Origin, VmcoreInfo};
use kmorph_vmcore::{MemoryError, PhysRange, PhysicalMemory};

use support::Pages;

/// Pages of 16 MiB.
const STRETCH: u64 = 4096;
/// The page that the second stretch begins with: it is above 4 GiB.
const HIGH: u64 = 1 << 20;

fn note(release: &str) -> Vec<u8> {
    let text = format!("OSRELEASE={release}\n");
    let mut page = Vec::new();
    for word in [11, u32::try_from(text.len()).unwrap(), 0] {
        page.extend(word.to_le_bytes());
    }
    page.extend(b"VMCOREINFO\0\0");
    page.extend(text.bytes());
    page.resize(4096, 0);
    page
}

fn found(memory: &dyn PhysicalMemory) -> Option<(String, u64)> {
    let info = VmcoreInfo::search(memory)?;
    let Origin::Memory { phys } = info.origin() else {
        return None;
    };
    Some((info.release().unwrap().to_owned(), phys / 4096))
}

#[test]
fn it_is_found_wherever_it_is() {
    let mut memory = Pages::new(&[(0, STRETCH), (HIGH, STRETCH)]);
    assert_eq!(found(&memory), None);
    for start in [0, HIGH] {
        for page in [0, 1, 255, 256, 2047, 2048, 3000, STRETCH - 1] {
            let pfn = start + page;
            memory.pages.insert(pfn, note("here"));
            assert_eq!(found(&memory), Some(("here".to_owned(), pfn)));
            // In the same window there is a page that cannot be read.
            memory.broken = Some(pfn ^ 2);
            assert_eq!(found(&memory), Some(("here".to_owned(), pfn)));
            memory.broken = Some(pfn);
            assert_eq!(found(&memory), None);
            memory.broken = None;
            memory.pages.clear();
        }
    }
}

/// Counts what is read.
struct Counted(Pages, AtomicU64);

impl PhysicalMemory for Counted {
    fn ranges(&self) -> &[PhysRange] {
        self.0.ranges()
    }

    fn read(&self, phys: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.1.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.0.read(phys, buf)
    }
}

#[test]
fn near_an_end_it_is_found_before_the_middle_is_read() {
    for pfn in [300, STRETCH - 300, HIGH + 300, HIGH + STRETCH - 300] {
        let mut pages = Pages::new(&[(0, STRETCH), (HIGH, STRETCH)]);
        pages.pages.insert(pfn, note("here"));
        let memory = Counted(pages, AtomicU64::new(0));
        assert_eq!(found(&memory), Some(("here".to_owned(), pfn)));
        // Two megabytes of each of four ends.
        assert!(memory.1.into_inner() <= 8 << 20);
    }
}
