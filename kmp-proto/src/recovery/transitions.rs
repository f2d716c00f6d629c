//! The recovery's transition table.

use crate::transition::{Transition, row};

const PREPARING: &str = "preparing_recovery";
const RECLAIMING: &str = "reclaiming_resources";
const RESPAWNING: &str = "respawning";
const DONE: &str = "done";

/// Every step an [`Engine`](super::Engine) takes. What is not listed changes nothing.
pub const TRANSITIONS: &[Transition] = &[
    row("–", "begin", "", PREPARING, &["Fence", "NoticeSurvivors"]),
    row(
        "–",
        "resume",
        "the certificate is in the journal",
        RECLAIMING,
        &["Reclaim"],
    ),
    row(
        PREPARING,
        "Fenced",
        "certificate of the failed generation",
        RECLAIMING,
        &["Reclaim"],
    ),
    row(
        PREPARING,
        "FenceUnconfirmed",
        "tried fewer than 5 times",
        PREPARING,
        &["Fence"],
    ),
    row(
        PREPARING,
        "FenceUnconfirmed",
        "tried 5 times",
        DONE,
        &["Finished(OperatorActionNeeded)"],
    ),
    row(RECLAIMING, "Released", "", RESPAWNING, &["Respawn"]),
    row(
        RESPAWNING,
        "SuccessorHealthy",
        "a later generation",
        DONE,
        &["Complete", "Finished(Recovered)"],
    ),
    row(
        RESPAWNING,
        "SuccessorFailed",
        "",
        DONE,
        &["Complete", "Finished(SuccessorFailed)"],
    ),
];
