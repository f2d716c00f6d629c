//! The capabilities of a backend's instances, and the alternatives where one is missing. Code asks for a capability
//! instead of comparing backends, so that a new backend is described in one place.

use std::time::Duration;

use super::BackendKind;

/// Why the memory of an instance cannot be captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uncaptured {
    /// The reason, which follows "cannot be captured: " in a message.
    pub reason: &'static str,
    /// The alternative.
    pub instead: &'static str,
}

/// Why there is no self-test of captures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Untested {
    /// The reason, which follows "the backend X " in a message.
    pub reason: &'static str,
    /// Whether a later version of kmorph will support it.
    pub planned: bool,
}

/// Downtime budget of a morph whose state stays in place: the figure that kmorph promises.
const BUDGET_BY_REFERENCE: Duration = Duration::from_millis(10);
/// Downtime budget of a morph of guests. Their memory is copied, and in software emulation agents and workloads
/// take ten times as long to answer: a morph takes 15 to 60 ms there, depending on the machine.
const BUDGET_OF_GUESTS: Duration = Duration::from_millis(100);

/// Part of the line of a kernel panic, on the console and in the kernel log (kernel/panic.c).
pub const PANIC_LINE: &str = "Kernel panic - not syncing";

impl BackendKind {
    /// Returns whether each instance has its own kernel, which can answer when its agent does not.
    pub fn boots_kernels(self) -> bool {
        matches!(self, Self::Qemu | Self::Multikernel)
    }

    /// Returns whether the memory of a failed instance can be captured.
    pub fn captures_memory(self) -> bool {
        self.uncaptured().is_none()
    }

    /// Returns why the memory of an instance cannot be captured; `None` if it can.
    pub fn uncaptured(self) -> Option<Uncaptured> {
        match self {
            Self::Qemu | Self::Multikernel => None,
            Self::Embedded => Some(Uncaptured {
                reason: "the instance is a process and has no kernel of its own (embedded)",
                instead: "`gcore` captures the memory of a process",
            }),
        }
    }

    /// Returns why a backend whose kernels do not panic on request has no self-test.
    pub fn untested(self) -> Untested {
        match self {
            Self::Multikernel => Untested {
                reason: "has no self-test yet: its kernels do not panic on request",
                planned: true,
            },
            Self::Embedded | Self::Qemu => Untested {
                reason: "captures no memory, so there is nothing to test",
                planned: false,
            },
        }
    }

    /// Returns whether the memory of a failed instance can be lent to survivors for reading.
    pub fn lends_memory(self) -> bool {
        matches!(self, Self::Qemu)
    }

    /// Returns the file in an instance's run directory that records its start.
    ///
    /// # Errors
    /// If there is no such file: another place to look at.
    pub fn start_log(self) -> Result<&'static str, &'static str> {
        match self {
            Self::Embedded => Ok("agent.log"),
            Self::Qemu => Ok("console.log"),
            Self::Multikernel => Err(
                "the console of its kernel is not logged: boot the kernel by hand with `kerf start --console`",
            ),
        }
    }

    /// Returns how to add CPUs and memory to the pool.
    pub fn enlarging_the_pool(self) -> &'static str {
        match self {
            Self::Embedded | Self::Qemu => "enlarge [pool] and reload",
            Self::Multikernel => "enlarge the kernel's pool with kerf init",
        }
    }

    /// Returns the default downtime budget of a morph.
    pub fn downtime_budget(self) -> Duration {
        match self {
            Self::Qemu => BUDGET_OF_GUESTS,
            Self::Embedded | Self::Multikernel => BUDGET_BY_REFERENCE,
        }
    }
}
