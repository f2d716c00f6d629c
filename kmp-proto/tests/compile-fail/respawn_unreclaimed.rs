//! A successor requires the certificate of a recovery that has returned all resources.
use kmp_proto::fence::FenceCertificate;
use kmp_proto::recovery::{Preparing, Reclaiming, Recovery, Respawning};

fn unfenced(recovery: &Recovery<Preparing>) -> &FenceCertificate {
    recovery.certificate()
}

fn unreclaimed(recovery: Recovery<Reclaiming>) -> Recovery<Respawning> {
    recovery
}

fn main() {}
