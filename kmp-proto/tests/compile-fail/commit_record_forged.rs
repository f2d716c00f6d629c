//! A commit record cannot be made by hand.
use kmp_proto::morph::CommitRecord;

fn main() {
    let _ = CommitRecord {
        source: 1,
        target: 2,
    };
}
