//! A validated morph cannot be copied, so it commits once.
use kmp_proto::morph::{CommitLimit, Committable, Morph};

fn copy(morph: &Morph<Committable>) -> Morph<Committable> {
    morph.clone()
}

fn twice(morph: Morph<Committable>) {
    let _ = morph.commit(CommitLimit::None);
    let _ = morph.commit(CommitLimit::None);
}

fn main() {}
