//! The taint flags and the modules of a kernel.

use super::report::{ModulesReport, TaintReport};
use crate::kernel::{Kernel, KernelError};

/// Letter and meaning of each bit of the kernel's mask.
const TAINTS: [(char, &str); 19] = [
    ('P', "proprietary module was loaded"),
    ('F', "module was force loaded"),
    ('S', "kernel runs out of its specification"),
    ('R', "module was force unloaded"),
    ('M', "processor reported a machine check"),
    ('B', "bad page referenced"),
    ('U', "taint requested by user space"),
    ('D', "kernel died recently: there was an oops or bug"),
    ('A', "ACPI table was overridden"),
    ('W', "kernel issued a warning"),
    ('C', "staging driver was loaded"),
    ('I', "workaround for a bug in the firmware"),
    ('O', "module from outside the kernel's tree was loaded"),
    ('E', "unsigned module was loaded"),
    ('L', "soft lockup occurred"),
    ('K', "kernel was live patched"),
    ('X', "auxiliary taint of the distribution"),
    ('T', "structures were laid out at random"),
    ('N', "in-kernel test ran"),
];
/// Maximum number of modules in the list.
const MODULES_MAX: usize = 1024;
/// Maximum length of a module's name, bytes.
const NAME_MAX_BYTES: usize = 56;
/// Distance from the links to the name, bytes. `struct module` begins with a state, the links of the list at 8, and the
/// name at 24, unchanged from Linux 2.6 to 6.12. VMCOREINFO does not contain these offsets.
const LINKS_TO_NAME: u64 = 16;

/// Reads the flags from the kernel's mask, at this address.
pub(super) fn of_mask(kernel: &Kernel<'_>, address: u64) -> Result<TaintReport, KernelError> {
    let mask = kernel.u64_at(address, "the taint mask")?;
    let set = (0..).zip(TAINTS).filter(|(bit, _)| mask >> bit & 1 == 1);
    let (letters, meanings) = set.map(|(_, taint)| taint).unzip();
    Ok(TaintReport {
        letters,
        meanings,
        source: "tainted_mask in the kernel's memory",
    })
}

/// Reads the flags from a line of the log: `… Comm: init Tainted: G            E      6.12.9 #1`, or `Not tainted`.
pub(super) fn of_line(line: &str) -> Option<TaintReport> {
    let source = "the log";
    if line.contains(" Not tainted ") {
        return Some(TaintReport {
            letters: String::new(),
            meanings: Vec::new(),
            source,
        });
    }
    let (_, rest) = line.split_once(" Tainted: ")?;
    let letters: String = rest
        .chars()
        .take_while(|c| c.is_ascii_uppercase() || *c == ' ')
        .filter(|c| TAINTS.iter().any(|(letter, _)| letter == c))
        .collect();
    let meanings = TAINTS
        .iter()
        .filter(|(letter, _)| letters.contains(*letter));
    Some(TaintReport {
        meanings: meanings.map(|(_, meaning)| *meaning).collect(),
        letters,
        source,
    })
}

/// Reads the modules from the kernel's list with its head at `head`.
pub(super) fn modules(kernel: &Kernel<'_>, head: u64) -> Option<ModulesReport> {
    let mut names = Vec::new();
    let mut links = kernel.u64_at(head, "the list of modules").ok()?;
    while links != head {
        let name = kernel.text_at(links.wrapping_add(LINKS_TO_NAME), NAME_MAX_BYTES);
        let name = String::from_utf8(name).ok()?;
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        // Anything else is not a list of modules: better none than a wrong one.
        if name.is_empty() || !name.chars().all(plain) || names.len() == MODULES_MAX {
            return None;
        }
        names.push(name);
        links = kernel.u64_at(links, "the list of modules").ok()?;
    }
    Some(ModulesReport {
        names,
        source: "the kernel's list of modules",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taint_is_read_from_the_log() {
        let of = |line| of_line(line).map(|taint| taint.letters);
        let tainted = "CPU: 1 PID: 77 Comm: a Tainted: G        W  E      6.12.9 #1";
        assert_eq!(of(tainted).as_deref(), Some("WE"));
        assert_eq!(
            of("CPU: 0 PID: 1 Comm: b Not tainted 6.1.0 #1").as_deref(),
            Some("")
        );
        assert_eq!(of("CPU: 0"), None);
    }
}
