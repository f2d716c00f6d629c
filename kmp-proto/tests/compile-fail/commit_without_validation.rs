//! Nothing but the proof of a validation commits a morph.
use kmp_proto::morph::{Committable, Morph};

fn commit(morph: Morph<Committable>) {
    let forced = true;
    let _ = morph.commit((), forced);
}

fn main() {}
