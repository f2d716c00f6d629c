//! What a backend can do for a policy.

use crate::model::{Failure, FailureKind, Policy, VmcorePolicy};
use kmorph_backends::contract::BackendKind;

/// The key and the reason of the first rule in `policy` that instances of the backend `kind` cannot keep.
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

/// Refuses a policy with a value out of its range, or one that instances of the backend `kind` cannot keep. `whose`
/// begins the message.
///
/// # Errors
/// With the key and the reason; nothing was changed.
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
