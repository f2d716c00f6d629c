//! Source text: any text is refused with its place, or means the same when it is printed. The text
//! form of kerf 0.1 never does more than be read or refused.

#![no_main]

use libkerf::{dtb, dts, kerf_text};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let _ = kerf_text::read(text);
    let Ok(mut tree) = dts::read(text) else {
        return;
    };
    assert_eq!(dts::write(&tree).as_deref(), Ok(text));
    tree.root_mut();
    let printed = dts::write(&tree).expect("names that were read can be written");
    let again = dts::read(&printed).expect("what was printed can be read");
    assert_eq!(again.root(), tree.root());
    if let Ok(blob) = dtb::write(&tree) {
        assert_eq!(dtb::read(&blob).as_ref().map(|t| t.root()), Ok(tree.root()));
    }
});
