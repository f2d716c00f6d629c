//! What the daemon knows and reasons with, as types. No actor, no input or output.

pub mod capability;
pub(crate) mod guest_text;
pub(crate) mod repeated;
pub mod rows;
pub mod settings;
