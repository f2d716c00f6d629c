//! The life of an instance: the work under way, the work that may begin, and the effect of wishes.
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
//! * At most one of spawn, recovery, morph, capture and termination is under way: each is a state, and an engine has
//!   one state.
//! * A wish (a recovery that an operator asks for, a termination) is in the journal before it has any effect. A wish
//!   that cannot be written leaves the instance unchanged; the engine then handles the postponed events.
//! * A termination in the journal always completes, whatever work is under way: a recovery finishes its fence first, a
//!   morph is rolled back or finished.
//! * The desired state ([`Desired`], the only part that survives a restart) follows from the state; nothing sets it.

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

/// The evidence of a recovery whose only cause is an operator's request.
pub const ASKED_FOR: &str = "asked for by an operator";
