//! Reports each step of the engines to a test run. The daemon reports and stores nothing.

use std::cell::RefCell;

/// The engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Machine {
    /// An instance's.
    Instance,
    /// A recovery's.
    Recovery,
    /// A morph's.
    Morph,
}

/// A step of an engine, with the names of its transition table.
#[derive(Clone, Debug)]
pub struct Step {
    /// The engine.
    pub machine: Machine,
    /// Name of its instance.
    pub instance: String,
    /// The state before.
    pub from: &'static str,
    /// The event.
    pub event: &'static str,
    /// The state after.
    pub to: &'static str,
    /// Effects of the step, as far as known; only for instances.
    pub effects: Vec<&'static str>,
}

type Eye = Box<dyn FnMut(Step)>;

thread_local! {
    static EYE: RefCell<Option<Eye>> = const { RefCell::new(None) };
}

/// Passes all later steps on this thread to `eye`, which must not take steps itself.
pub fn begin(eye: impl FnMut(Step) + 'static) {
    EYE.with_borrow_mut(|current| *current = Some(Box::new(eye)));
}

/// Reports a step.
pub(crate) fn show(step: impl FnOnce() -> Step) {
    EYE.with_borrow_mut(|eye| {
        if let Some(eye) = eye {
            eye(step());
        }
    });
}
