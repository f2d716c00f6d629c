//! Only a validation report makes a morph committable.
use kmp_proto::morph::{Committable, Morph};

fn forge(phase: Committable) -> Morph<Committable> {
    Morph { phase }
}

fn main() {}
