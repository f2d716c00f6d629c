//! The source may only resume with the certificate of the target's fence: the order to fence is not enough.
use kmp_proto::fence::FenceOrder;
use kmp_proto::morph::{Action, FencingTarget, Morph};

fn resume(order: FenceOrder) -> Action {
    Action::ResumeSource(order)
}

fn fenced(morph: Morph<FencingTarget>) {
    let _ = morph.resumed();
}

fn main() {}
