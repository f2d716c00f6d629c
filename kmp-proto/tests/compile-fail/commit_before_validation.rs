//! A morph that still validates its state cannot commit.
use kmp_proto::morph::{CommitLimit, Morph, Validating};

fn commit(morph: Morph<Validating>) {
    let _ = morph.commit(CommitLimit::None);
}

fn main() {}
