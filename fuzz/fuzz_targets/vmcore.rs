//! Vmcores from anywhere: opened, analysed whole, and read.
#![no_main]

use kmorph_vmcore::analysis::{AnalysisOptions, analyse};
use kmorph_vmcore::{Dump, PhysicalMemory};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Ok(dump) = Dump::from_bytes(Box::new(input.to_vec())) else {
        return;
    };
    let scan = input.len() < 1 << 16;
    let _ = analyse(&dump, AnalysisOptions { scan });
    let mut page = [0; 4097];
    for range in dump.ranges().iter().take(16) {
        assert!(range.start < range.end);
        let _ = dump.read(range.start, &mut page);
        let _ = dump.read(range.end - 1, &mut page);
        let next = dump.next_present(range.start, range.end);
        assert!((range.start..=range.end).contains(&next));
    }
});
