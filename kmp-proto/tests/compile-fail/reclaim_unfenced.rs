//! A recovery cannot reclaim before it is fenced.
use kmp_proto::recovery::{Preparing, Recovery};

fn reclaim(recovery: Recovery<Preparing>) {
    let _ = recovery.released();
}

fn main() {}
