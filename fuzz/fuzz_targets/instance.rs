//! The instance engine under any sequence of events: the rules are in `kmp-proto/tests/operations`.

#![no_main]

#[allow(dead_code, reason = "each engine has a target of its own")]
#[path = "../../kmp-proto/tests/operations/mod.rs"]
mod operations;

libfuzzer_sys::fuzz_target!(|data: &[u8]| operations::instance::run(data));
