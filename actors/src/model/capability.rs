//! Checks whether a backend can apply a policy.

use crate::model::{Failure, FailureKind, Policy, VmcorePolicy};
use kmorph_backends::contract::BackendKind;

/// Returns the key of the first rule in `policy` that the backend `kind` does not support, and the reason.
pub fn unkept(kind: BackendKind, policy: &Policy) -> Option<(&'static str, String)> {
    if policy.vmcore == VmcorePolicy::Off || kind.captures_memory() {
        return None;
    }
    let reason = format!(
        "{:?} cannot be kept: the backend {} captures no memory; only \"off\" is possible",
        policy.vmcore.as_str(),
        kind.as_str()
    );
    Some(("vmcore", reason))
}

/// Refuses a policy with a value out of range, or with a rule that the backend `kind` does not support. The message
/// begins with `whose`.
///
/// # Errors
/// The key and the reason. Nothing has changed.
pub fn check_policy(kind: BackendKind, whose: &str, policy: &Policy) -> Result<(), Failure> {
    let refuse = |code, (key, fault): (&str, String)| {
        Failure::new(code, format!("{whose}{key}: {fault}")).hint("nothing was changed")
    };
    if let Some(fault) = policy.fault() {
        return Err(refuse(FailureKind::InvalidRequest, fault));
    }
    match unkept(kind, policy) {
        Some(fault) => Err(refuse(FailureKind::WrongState, fault)),
        None => Ok(()),
    }
}
