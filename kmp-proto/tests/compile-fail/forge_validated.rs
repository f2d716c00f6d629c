//! The proof of validation cannot be made by hand.
use kmp_proto::morph::Validated;

fn main() {
    let _ = Validated { _proof: () };
}
