//! The life of an instance: what is under way with it, what may begin, and what a wish becomes.
//!
//! ```text
//!              ┌──────────────── verdict ─────────────────┐
//! Starting ─▶ Serving ─▶ Morphing ─▶ Serving              ▼
//!   │           │ ▲  └─▶ Capturing ─▶ Serving   BackingOff ─▶ Queued ─▶ Recovering ─▶ Serving
//!   │           ▼ │                                  ▲                     └─▶ Resting
//!   │         Asked (to recover) ────────────────────┘
//!   └ its program does not start          all but Capturing ─▶ Ending ─▶ Gone
//! ```
//!
//! Invariants:
//! * At most one of spawn, recovery, morph, capture and termination is under way: each is a state, and an engine has one.
//! * A wish (a recovery that an operator asks for, a termination) is in the journal before anything follows from it; one
//!   that cannot be written leaves the instance as it was, and what happened meanwhile is dealt with then.
//! * A termination that is in the journal comes about, whatever is under way: a recovery finishes its fence first, a morph
//!   is undone or finished.
//! * What is wanted of the instance ([`Desired`], all that survives a restart) follows from the state; nothing sets it.

mod desired;
mod engine;
mod events;
mod stage;
mod transitions;

pub use desired::Desired;
pub use engine::Engine;
pub use events::{
    Action, Answer, Doing, EndOrder, Event, Failure, JobNews, PortOrder, RecoveryEnd,
    RecoveryOrder, Request, Successor, WatchOrder, Wish,
};
pub use stage::{Condition, Stage};
pub use transitions::TRANSITIONS;

/// The evidence of a recovery that nothing but an operator's wish caused.
pub const ASKED_FOR: &str = "asked for by an operator";
