//! What a run of a test sees of the engines: each step that one takes. The daemon shows nothing and keeps nothing.

use std::cell::RefCell;

/// Which engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Machine {
    /// Of an instance.
    Instance,
    /// Of a recovery.
    Recovery,
    /// Of a morph.
    Morph,
}

/// A step of an engine, in the names of its transition table.
#[derive(Clone, Debug)]
pub struct Step {
    /// The engine.
    pub machine: Machine,
    /// Name of the instance that it belongs to.
    pub instance: String,
    /// The state before.
    pub from: &'static str,
    /// The event.
    pub event: &'static str,
    /// The state after.
    pub to: &'static str,
    /// What followed, as far as that is known: of instances only.
    pub effects: Vec<&'static str>,
}

type Eye = Box<dyn FnMut(Step)>;

thread_local! {
    static EYE: RefCell<Option<Eye>> = const { RefCell::new(None) };
}

/// Shows `eye` all steps on this thread from now on. It may not take steps itself.
pub fn begin(eye: impl FnMut(Step) + 'static) {
    EYE.with_borrow_mut(|current| *current = Some(Box::new(eye)));
}

/// Shows a step.
pub(crate) fn show(step: impl FnOnce() -> Step) {
    EYE.with_borrow_mut(|eye| {
        if let Some(eye) = eye {
            eye(step());
        }
    });
}
