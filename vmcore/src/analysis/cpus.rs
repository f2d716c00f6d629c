//! The state of the CPUs.

use super::report::CpuReport;
use crate::dump::Cpu;
use crate::kernel::symbols::Symbols;
use crate::kernel::{Kernel, START_KERNEL_MAP};

/// Maximum number of bytes of a stack to search: the kernel's stacks have 16 KiB.
const STACK_MAX_BYTES: usize = 16 << 10;
/// Maximum number of CPUs whose stack is searched: hostile notes have thousands.
const STACKS_MAX: usize = 512;
/// Maximum number of addresses from one stack.
const STACK_ADDRESSES_MAX: usize = 24;
/// Functions in which an idle CPU waits.
const IDLE: [&str; 6] = [
    "default_idle",
    "pv_native_safe_halt",
    "native_safe_halt",
    "acpi_idle_do_entry",
    "intel_idle",
    "mwait_idle",
];

/// Reports the CPUs' activity, as far as the kernel's symbols are known.
pub(super) fn report(
    index: usize,
    cpu: &Cpu,
    kernel: Option<&Kernel<'_>>,
    symbols: Option<&Symbols>,
    code: Option<(u64, u64)>,
) -> CpuReport {
    let r = &cpu.status.registers;
    let rip = r.rip.get();
    let at = symbols.and_then(|symbols| symbols.place(rip));
    let idle = at
        .as_ref()
        .is_some_and(|place| IDLE.iter().any(|name| place.symbol.starts_with(name)));
    let in_kernel = r.cs.get() & 3 == 0;
    let stack = match (kernel, symbols, code) {
        (Some(kernel), Some(symbols), Some(code)) if in_kernel && index < STACKS_MAX => {
            stack(kernel, symbols, code, r.rsp.get())
        }
        _ => Vec::new(),
    };
    let mut registers = vec![
        ("RIP", r.rip),
        ("RSP", r.rsp),
        ("RFLAGS", r.rflags),
        ("RAX", r.rax),
        ("RBX", r.rbx),
        ("RCX", r.rcx),
        ("RDX", r.rdx),
        ("RSI", r.rsi),
        ("RDI", r.rdi),
        ("RBP", r.rbp),
        ("R8", r.r8),
        ("R9", r.r9),
        ("R10", r.r10),
        ("R11", r.r11),
        ("R12", r.r12),
        ("R13", r.r13),
        ("R14", r.r14),
        ("R15", r.r15),
        ("CS", r.cs),
        ("SS", r.ss),
        ("FS_BASE", r.fs_base),
        ("GS_BASE", r.gs_base),
    ];
    registers.extend(cpu.cr3.map(|cr3| ("CR3", cr3.into())));
    CpuReport {
        index,
        mode: if in_kernel { "kernel" } else { "user" },
        at: at.map(|place| place.to_string()),
        idle,
        registers: registers
            .into_iter()
            .map(|(name, value)| (name, format!("{:016x}", value.get())))
            .collect(),
        stack,
    }
}

/// Returns possible return addresses on the stack: addresses within a function of the kernel.
fn stack(kernel: &Kernel<'_>, symbols: &Symbols, code: (u64, u64), rsp: u64) -> Vec<String> {
    let mut found = Vec::new();
    let start = rsp & !7;
    for at in (0..STACK_MAX_BYTES as u64).step_by(8) {
        // The stack ends at the end of the memory, at the latest.
        let Ok(value) = kernel.u64_at(start.wrapping_add(at), "a stack") else {
            break;
        };
        if value < START_KERNEL_MAP || !(code.0..code.1).contains(&value) {
            continue;
        }
        // A return address is behind the beginning of the calling function.
        if let Some(place) = symbols.place(value).filter(|place| place.offset > 0) {
            found.push(place.to_string());
            if found.len() == STACK_ADDRESSES_MAX {
                break;
            }
        }
    }
    found
}
