//! Policy files: any text is refused with its place, or can be exported and imported alike.

#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| kmorphctl::fuzzing::policy_file(text));
