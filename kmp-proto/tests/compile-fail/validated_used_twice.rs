//! The proof of one validation commits one morph.
use kmp_proto::morph::{Committable, Morph, Validated};

fn commit(one: Morph<Committable>, other: Morph<Committable>, proof: Validated) {
    let _ = one.commit(proof, false);
    let _ = other.commit(proof, false);
}

fn main() {}
