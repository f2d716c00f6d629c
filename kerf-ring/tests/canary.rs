//! Faults that are planted: `make sanitize` runs them, and each sanitizer must find its own. A run that does not find
//! them proves nothing about the other tests. Nothing else runs them: what they do is undefined.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::cell::UnsafeCell;

use kmorph_kerf_ring::{Mapped, Memory};
use support::Shared;

#[test]
#[ignore = "reads behind the end of its memory: for AddressSanitizer"]
fn address() {
    let shared = Shared::new(64);
    // SAFETY: none. The memory has half of that.
    let mapped = unsafe { Mapped::new(shared.start(), 128) };
    let mut byte = [0];
    mapped.read(64, &mut byte);
    std::hint::black_box(byte);
}

struct Raced(UnsafeCell<u64>);

// SAFETY: none. Two threads write it.
unsafe impl Sync for Raced {}

#[test]
#[ignore = "two threads write the same word: for ThreadSanitizer"]
fn thread() {
    let raced = Raced(UnsafeCell::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| planted(&raced));
        scope.spawn(|| planted(&raced));
    });
}

/// By this name the report is known.
#[inline(never)]
fn planted(raced: &Raced) {
    for value in 0..1_000 {
        // SAFETY: none. The other thread does the same.
        unsafe { *raced.0.get() = value };
        std::thread::yield_now();
    }
}
