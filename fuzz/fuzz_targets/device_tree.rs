//! Blobs: any bytes are refused with their place, or read, judged, and written back as they were.

#![no_main]

use libkerf::check::{self, Context};
use libkerf::{dtb, dts};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(tree) = dtb::read(data) else { return };
    let blob = dtb::write(&tree).expect("what was not changed is written as it was");
    assert_eq!(blob, data[..blob.len()]);
    // By structure it may be larger: strings that lay within each other do not need to.
    let mut changed = tree.clone();
    changed.root_mut();
    if let Ok(written) = dtb::write(&changed) {
        assert_eq!(dtb::read(&written).as_ref(), Ok(&tree));
    }
    let _ = check::baseline(&tree, Context::default());
    let _ = check::system(&tree, Context::default());
    if let Some(instance) = check::instance(&tree).0 {
        assert_eq!(
            check::instance(&instance.to_tree()).0.as_ref(),
            Some(&instance)
        );
        let mut other = instance.clone();
        other.cpus.push(1);
        other.devices.push("nic".to_owned());
        other.write_to(&mut changed);
        assert_eq!(check::instance(&changed).0, Some(other));
    }
    // Source text cannot say what is there twice; all else it can.
    if let Ok(text) = dts::write(&tree)
        && let Ok(again) = dts::read(&text)
    {
        assert_eq!(again.root(), tree.root());
    }
});
