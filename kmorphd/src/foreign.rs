//! Refuses to start if the journal has instances of another backend.
//!
//! A backend cannot see generations that another one started, and would consider them ended: the daemon would fence
//! them and start successors, and their data would be lost.

use std::collections::BTreeMap;
use std::path::Path;

use kmorph_actors::platform::journal::Snapshot;
use kmorph_backends::contract::BackendKind;

/// Most instances that the refusal names.
const NAMED_MAX: usize = 16;

/// Refuses to start with the backend `kind` while the journal in `state_dir` has instances, or generations that still
/// hold something, of another backend.
///
/// # Errors
/// If it has; the text names them and says what to do.
pub(crate) fn refuse(
    snapshot: &Snapshot,
    kind: BackendKind,
    state_dir: &Path,
) -> Result<(), String> {
    let mut of = BTreeMap::new();
    for row in &snapshot.generations {
        if let Some(placement) = row.placement() {
            of.insert(row.instance.as_str(), placement.backend);
        }
    }
    for row in &snapshot.instances {
        of.insert(row.name.as_str(), row.spec.backend);
    }
    of.retain(|_, backend| *backend != kind);
    let Some(other) = of.values().next().copied() else {
        return Ok(());
    };
    let names: Vec<_> = of.keys().take(NAMED_MAX).copied().collect();
    let more = match of.len().saturating_sub(NAMED_MAX) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let (kind, other) = (kind.as_str(), other.as_str());
    Err(format!(
        "invalid backend: {kind:?}: the journal in {state_dir:?} has instances of the {other} backend: \
         {}{more}; nothing was changed. Start kmorphd with backend = {other:?} and terminate them, or use \
         another state directory and run directory",
        names.join(", ")
    ))
}
