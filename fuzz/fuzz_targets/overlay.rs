//! Overlays: any blob is refused, or changes a state so that it still holds together. What was read is
//! written so that it is read again.

#![no_main]

use std::sync::LazyLock;

use libkerf::check::{self, Context, Rule};
use libkerf::overlay::{MAX_OVERLAY_BYTES, State, Status};
use libkerf::{dtb, dts};

static STATE: LazyLock<State> = LazyLock::new(|| {
    let tree = dts::read(include_str!("../../libkerf/tests/trees/system.dts"));
    let (system, report) = check::system(&tree.expect("it is good"), Context::default());
    assert!(report.is_valid());
    State::new(system).with_status("db", Status::Active)
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(tree) = dtb::read(data) else { return };
    let (overlay, report) = check::overlay(&tree, Some(&STATE));
    let again = check::overlay(&overlay.to_tree(), None).0;
    assert_eq!(again, overlay);
    if let Ok(parts) = overlay.split() {
        for part in &parts {
            let blob = part.to_blob().expect("it was written to be split");
            assert!(blob.len() <= MAX_OVERLAY_BYTES);
        }
        // A valid one of that size is applied in parts as it is as a whole.
        let whole = STATE.apply(&overlay);
        let mut parts = parts.iter();
        let made = parts.try_fold(STATE.clone(), |state, part| state.apply(part));
        assert!(whole.is_err() || made == whole);
    }
    if !report.is_valid() {
        return;
    }
    let after = STATE.apply(&overlay).expect("it was judged valid");
    let broken = after.check();
    for rule in [
        Rule::CpuShared,
        Rule::CpuForeign,
        Rule::IdTwice,
        Rule::InstanceTwice,
        Rule::MemoryExceedsPool,
    ] {
        assert!(!broken.breaks(rule), "{broken}");
    }
});
