//! Reasons why the story failed.

use std::time::Duration;

/// A reason why the story failed; see the module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("{0}")]
    NotAsTold(String),
    /// The demo has started nothing.
    #[error("a multikernel kernel cannot be emulated here: {obstacle}\n  hint: {hint}")]
    NotHere { obstacle: String, hint: String },
    #[error("waited {} s in vain for {what}", .limit.as_secs())]
    Late { what: String, limit: Duration },
    #[error("`{command}` ended with {status}")]
    Command {
        command: String,
        status: std::process::ExitStatus,
    },
    #[error("the daemon did not answer {path}: {reason}")]
    Daemon { path: String, reason: String },
    #[error("the key-value server: {0}")]
    Client(std::io::Error),
    #[error("the output cannot be written: {0}")]
    Output(std::io::Error),
    #[error("`{command}` cannot be started: {source}")]
    Start {
        command: String,
        source: std::io::Error,
    },
}

/// Fails with the text of `text` unless `told` is true.
pub(crate) fn expect(told: bool, text: impl FnOnce() -> String) -> Result<(), Trouble> {
    if told {
        return Ok(());
    }
    Err(Trouble::NotAsTold(text()))
}
