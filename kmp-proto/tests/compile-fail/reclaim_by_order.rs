//! Neither the order to fence nor the fence notice for survivors proves that the fence was executed.
use kmp_proto::fence::FenceOrder;
use kmp_proto::message::FenceClaim;
use kmp_proto::recovery::{Preparing, Recovery};

fn order(recovery: Recovery<Preparing>, order: FenceOrder) {
    let _ = recovery.fenced(order);
}

fn claim(recovery: Recovery<Preparing>, claim: FenceClaim) {
    let _ = recovery.fenced(claim);
}

fn main() {}
