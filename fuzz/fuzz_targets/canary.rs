//! A planted bug that only a fuzzer led by coverage finds in seconds: four bytes, one after another.
//! `scripts/fuzz` fails when it is not found.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut steps = 0;
    for (byte, expected) in data.iter().zip(b"KMP1") {
        if byte != expected {
            return;
        }
        steps += 1;
    }
    assert!(steps < 4, "the canary sings");
});
