//! A morph whose state is still being checked cannot commit, even beside the proof of another one.
use kmp_proto::morph::{Morph, Validated, Validating};

fn commit(morph: Morph<Validating>, other: Validated) {
    let _ = morph.commit(other, false);
}

fn main() {}
