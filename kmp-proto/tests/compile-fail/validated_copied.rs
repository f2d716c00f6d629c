//! The proof of a validation can be neither copied nor made from nothing.
use kmp_proto::morph::Validated;

fn copy(proof: &Validated) -> (Validated, Validated) {
    (proof.clone(), Validated::default())
}

fn main() {}
