//! Checks on a running kernel which parts its vmcore would lack, before the kernel dies.

use crate::kernel::pages::Pages;
use crate::kernel::{Kernel, KernelError};
use crate::memory::PhysicalMemory;

/// Returns the gaps in the information about the kernel in `memory`, with the reasons: page tables, the log, symbols,
/// and the use of pages. Empty if all of it is available. The kernel may run in the meantime. Reads the descriptions
/// of all pages: about a second for 16 GiB.
///
/// A kernel before Linux 6.0 does not describe the location of its symbols; this does not count as a gap.
pub fn shortfalls(memory: &dyn PhysicalMemory) -> Vec<String> {
    let kernel = match Kernel::in_memory(memory) {
        Ok(kernel) => kernel,
        Err(error) => return vec![format!("the kernel: {error}")],
    };
    let mut found = Vec::new();
    match kernel.log() {
        Ok(log) if log.records.is_empty() => found.push("the log: it has no messages".to_owned()),
        Ok(_) => {}
        Err(error) => found.push(format!("the log: {error}")),
    }
    match names_its_own_code(&kernel) {
        Ok(true) | Err(KernelError::Missing(_)) => {}
        Ok(false) => found.push("symbols: none at the start of the kernel's code".to_owned()),
        Err(error) => found.push(format!("symbols: {error}")),
    }
    match Pages::of(&kernel).and_then(|pages| pages.count(memory.ranges())) {
        Ok(counts) if counts.free > 0 && counts.kernel > 0 && counts.slab > 0 => {}
        Ok(counts) => found.push(format!("page types: no kernel has {counts:?}")),
        Err(error) => found.push(format!("page types: {error}")),
    }
    found
}

/// Returns whether a symbol begins at the start of the kernel's code according to VMCOREINFO.
fn names_its_own_code(kernel: &Kernel<'_>) -> Result<bool, KernelError> {
    let code = kernel.info().symbol("_stext")?;
    let place = kernel.symbols()?.place(code);
    Ok(place.is_some_and(|place| place.offset == 0))
}
