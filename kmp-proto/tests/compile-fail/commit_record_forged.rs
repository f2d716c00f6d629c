//! Code outside the crate cannot create a commit record.
use kmp_proto::morph::CommitRecord;

fn main() {
    let _ = CommitRecord {
        source: 1,
        target: 2,
    };
}
