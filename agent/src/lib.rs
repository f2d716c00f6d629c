//! `kmorph-agent`: the instance's side of KMP.
//!
//! ```text
//!   kmorphd ══ heartbeat ══▶ [server] ── figures (/proc) ── [figures]
//!           ══ control ════▶    │ ─ MORPH_* ─ [morph] ─ [provider] ── [workload] ─▶ the program
//!                               ├─────── RECOVER_* ─────── [topology]    ▲
//!           ══ bulk ═══════▶    └─ VMCORE_* ─ [capture] ── [lent]        │
//!   next generation's agent ── TakeOver ── [handover] ───────────────────┘
//! ```
//!
//! The agent is one process with one thread, another one while it reads lent memory, and in a guest one for each CPU
//! ([`pulse`]). It answers for its instance, starts and supervises the instance's program (the workload), and passes
//! a morph's steps on to the state provider. It makes no decisions about instances: a frozen workload stays frozen
//! until the daemon says what follows, however long that takes.
//!
//! This crate may start the workload, read `/proc` and change its own process; as PID 1 of a small guest it may mount
//! file systems, load modules and power off ([`init`]). It does not know about backends, the journal or actors.

pub mod capture;
pub mod confine;
pub mod figures;
pub mod handover;
pub mod inherited;
pub mod init;
pub mod interrupts;
pub mod lent;
pub mod logging;
pub mod morph;
pub mod priority;
pub mod provider;
pub mod pulse;
pub mod reap;
pub mod refusal;
pub mod rounds;
pub mod server;
pub mod topology;
pub mod workload;

mod run;

pub use run::{RunError, run};
