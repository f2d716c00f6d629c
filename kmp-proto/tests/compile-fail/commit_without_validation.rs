//! A morph cannot be committed without the proof of its validation.
use kmp_proto::morph::{Committable, Morph};

fn commit(morph: Morph<Committable>) {
    let _ = morph.commit(true);
}

fn main() {}
