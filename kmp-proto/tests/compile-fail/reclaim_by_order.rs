//! The order to fence is no proof that it was carried out, nor is what survivors are told of it.
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
