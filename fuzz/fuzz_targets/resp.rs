//! kmorph-kv's parser: any bytes, in any pieces, give the same commands and the same refusal.

#![no_main]

#[allow(dead_code, reason = "only its reading half is of interest")]
#[path = "../../workload/src/bin/kmorph-kv/resp.rs"]
mod resp;

use resp::{Limits, Parsed, Parser};

/// Small, so that the fuzzer meets the limits.
const LIMITS: Limits = Limits {
    bulk: 64,
    command: 100,
};

type Commands = Vec<Vec<Vec<u8>>>;

/// The commands in `input`, given in pieces of `size`, and the refusal that ended them.
fn commands(input: &[u8], size: usize) -> (Commands, Option<String>) {
    let (mut parser, mut held, mut commands) = (Parser::default(), Vec::new(), Vec::new());
    for piece in input.chunks(size) {
        held.extend_from_slice(piece);
        loop {
            match parser.next(&held, LIMITS) {
                Parsed::Command(words) => {
                    assert!(!words.is_empty());
                    commands.push(words.into_iter().map(|at| held[at].to_vec()).collect());
                }
                // It was skipped.
                Parsed::TooLarge => commands.push(Vec::new()),
                Parsed::Incomplete => break,
                Parsed::Invalid(why) => return (commands, Some(why)),
            }
        }
        let done = parser.start();
        held.drain(..done);
        parser.dropped(done);
    }
    (commands, None)
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let whole = commands(data, data.len().max(1));
    for size in [1, 3, 17] {
        assert_eq!(commands(data, size), whole, "in pieces of {size}");
    }
});
