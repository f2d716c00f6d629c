//! What a backend can do for a policy.

use kmorph_backends::contract::BackendKind;
use kmorph_control_api::{Policy, VmcorePolicy};

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
