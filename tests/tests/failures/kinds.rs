//! The kinds of failure, and the expected report of each.

use kmorph_tests::crashed_guest::{End, Plan};

/// One kind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    /// Name in the table.
    pub(crate) what: &'static str,
    pub(crate) end: End,
    /// Shell lines that the guest runs first.
    pub(crate) lines: &'static str,
    /// Kernel options.
    pub(crate) options: &'static str,
    pub(crate) cpus: u32,
    /// Part of the panic message; `None` for a failure without a panic.
    pub(crate) panic: Option<&'static str>,
    /// Part of the cause; `None` where the panic is the only event.
    pub(crate) cause: Option<&'static str>,
    /// Name of the current task; `None` where the task is arbitrary.
    pub(crate) comm: Option<&'static str>,
}

const DEFAULT: Failure = Failure {
    what: "",
    end: End::Sysrq,
    lines: "",
    options: "",
    cpus: 1,
    panic: Some("Fatal exception"),
    cause: None,
    comm: Some("insmod"),
};

/// Fills a tmpfs that is larger than the guest's memory.
const NO_MEMORY: &str = "mount -t tmpfs -o size=1g tmpfs /tmp; dd if=/dev/zero of=/tmp/all bs=1M";
const STALLS_ARE_FATAL: &str = "
echo 3 > /sys/module/rcupdate/parameters/rcu_cpu_stall_timeout
echo 1 > /proc/sys/kernel/panic_on_rcu_stall";
const HUNG_TASKS_ARE_FATAL: &str = "
echo 2 > /proc/sys/kernel/hung_task_timeout_secs
echo 1 > /proc/sys/kernel/hung_task_panic";
const NULL: &str = "BUG: kernel NULL pointer dereference, address: 0000000000000008";

/// All kinds.
pub(crate) const FAILURES: &[Failure] = &[
    Failure {
        what: "sysrq `c`",
        panic: Some("sysrq triggered crash"),
        comm: Some("init"),
        ..DEFAULT
    },
    Failure {
        what: "panic() in a module",
        end: End::Failing("panic"),
        panic: Some("failing: asked for"),
        ..DEFAULT
    },
    Failure {
        what: "init exits",
        end: End::Line("exit 3"),
        panic: Some("Attempted to kill init! exitcode=0x00000300"),
        comm: Some("init"),
        ..DEFAULT
    },
    Failure {
        what: "out of memory, panic_on_oom",
        end: End::Line(NO_MEMORY),
        lines: "echo 1 > /proc/sys/vm/panic_on_oom",
        panic: Some("Out of memory: system-wide panic_on_oom is enabled"),
        comm: Some("dd"),
        ..DEFAULT
    },
    Failure {
        what: "NMI, unknown_nmi_panic",
        end: End::Nmi,
        options: "unknown_nmi_panic",
        panic: Some("NMI: Not continuing"),
        comm: None,
        ..DEFAULT
    },
    Failure {
        what: "soft lockup, softlockup_panic",
        end: End::Failing("loop"),
        options: "softlockup_panic=1 watchdog_thresh=2",
        panic: Some("softlockup: hung tasks"),
        cause: Some("soft lockup - CPU#0 stuck"),
        ..DEFAULT
    },
    Failure {
        what: "RCU stall, panic_on_rcu_stall",
        end: End::Failing("loop"),
        lines: STALLS_ARE_FATAL,
        options: "nowatchdog",
        cpus: 2,
        panic: Some("RCU Stall"),
        cause: Some("rcu"),
        ..DEFAULT
    },
    Failure {
        what: "hung task, hung_task_panic",
        end: End::Failing("wait"),
        lines: HUNG_TASKS_ARE_FATAL,
        panic: Some("hung_task: blocked tasks"),
        cause: Some("insmod"),
        comm: Some("khungtaskd"),
        ..DEFAULT
    },
    Failure {
        what: "WARN(), panic_on_warn",
        end: End::Failing("warn"),
        options: "panic_on_warn=1",
        panic: Some("panic_on_warn set"),
        cause: Some("WARNING:"),
        ..DEFAULT
    },
    Failure {
        what: "NULL pointer",
        end: End::Failing("null"),
        cause: Some(NULL),
        ..DEFAULT
    },
    Failure {
        what: "NULL pointer, in an interrupt",
        end: End::Failing("irq"),
        panic: Some("Fatal exception in interrupt"),
        cause: Some(NULL),
        comm: None,
        ..DEFAULT
    },
    Failure {
        what: "NULL pointer, in a timer",
        end: End::Failing("softirq"),
        panic: Some("Fatal exception in interrupt"),
        cause: Some(NULL),
        comm: None,
        ..DEFAULT
    },
    Failure {
        what: "NULL pointer, in a kernel thread",
        end: End::Failing("kthread"),
        cause: Some(NULL),
        comm: Some("failing"),
        ..DEFAULT
    },
    Failure {
        what: "NULL pointer, in a workqueue",
        end: End::Failing("work"),
        cause: Some(NULL),
        comm: None,
        ..DEFAULT
    },
    Failure {
        what: "non-canonical address",
        end: End::Failing("wild"),
        cause: Some(
            "general protection fault, probably for non-canonical address 0xdead000000000010",
        ),
        ..DEFAULT
    },
    Failure {
        what: "BUG()",
        end: End::Failing("bug"),
        cause: Some("kernel BUG at "),
        ..DEFAULT
    },
    Failure {
        what: "division by zero",
        end: End::Failing("divide"),
        cause: Some("divide error"),
        ..DEFAULT
    },
    Failure {
        what: "invalid opcode",
        end: End::Failing("opcode"),
        cause: Some("invalid opcode"),
        ..DEFAULT
    },
    Failure {
        what: "kernel stack overflow",
        end: End::Failing("stack"),
        panic: Some("Fatal exception in interrupt"),
        cause: Some("stack guard page"),
        ..DEFAULT
    },
    Failure {
        what: "write to read-only data",
        end: End::Failing("rodata"),
        cause: Some("BUG: unable to handle page fault for address"),
        ..DEFAULT
    },
    Failure {
        what: "jump into data",
        end: End::Failing("nx"),
        cause: Some("BUG: unable to handle page fault for address"),
        ..DEFAULT
    },
    Failure {
        what: "list corruption",
        end: End::Failing("list"),
        cause: Some("kernel BUG at lib/list_debug.c"),
        ..DEFAULT
    },
    Failure {
        what: "stack protector",
        end: End::Failing("protector"),
        panic: Some("stack-protector: Kernel stack is corrupted in: failing_smash"),
        ..DEFAULT
    },
    Failure {
        what: "hardened usercopy",
        end: End::Failing("usercopy"),
        cause: Some("kernel BUG at mm/usercopy.c"),
        ..DEFAULT
    },
    Failure {
        what: "double free",
        end: End::Failing("free"),
        cause: Some("kernel BUG at mm/slub.c"),
        ..DEFAULT
    },
];

impl Failure {
    /// A guest of this series that fails in this way.
    pub(crate) fn plan(&self, series: &'static str) -> Plan<'static> {
        Plan {
            end: self.end,
            lines: self.lines,
            options: self.options,
            cpus: self.cpus,
            // crash would take them for the panic.
            fakes: false,
            ..Plan::small(series)
        }
    }
}
