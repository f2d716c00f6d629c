//! Code outside the crate cannot create a fence certificate.
use kmp_proto::fence::{Confirmation, FenceCertificate, FenceMethod};

fn main() {
    let _ = FenceCertificate {
        generation: 1,
        method: FenceMethod::AlreadyEnded,
        confirmation: Confirmation::ProcessesGone,
        fenced_at_unix_ns: 0,
    };
}
