//! The morph's transition table.

use crate::transition::{Transition, row};

const PREPARING: &str = "preparing";
const NEGOTIATING: &str = "negotiating";
const TRANSFERRING: &str = "transferring";
const VALIDATING: &str = "validating";
const COMMITTABLE: &str = "committable";
const FREEZING: &str = "committing.freezing";
const LAST_ROUND: &str = "committing.last_round";
const ACTIVATING: &str = "committing.activating";
const RECORDING: &str = "committing.recording";
const SERVING: &str = "committed.serving";
const RETIRING: &str = "committed.retiring";
const FENCING_OLD: &str = "committed.fencing_source";
const FENCING_NEW: &str = "rolling_back.fencing_target";
const RESUMING: &str = "rolling_back.resuming_source";
const DONE: &str = "done";

const OVERDUE: &str = "deadline over";
const AGAIN: &str = "asked again after 200 ms, until the detector judges";
const ASK_DUE: &str = "200 ms after a refusal or silence, or deadline over";
const UNDER_WAY: &str = "nothing more to do: that is under way";
const UNDO: &[&str] = &["Phase", "Fence(target)"];
const FENCE_OLD: &[&str] = &["Fence(source)"];

/// The events that undo a morph before its commit record, from one state.
macro_rules! undone_from {
    ($state:ident) => {
        [
            row($state, "RollbackRequested", "", FENCING_NEW, UNDO),
            row($state, "Died(source)", "", FENCING_NEW, UNDO),
            row($state, "Died(target)", "", FENCING_NEW, UNDO),
            row($state, "Refused(source)", "", FENCING_NEW, UNDO),
            row($state, "Refused(target)", "", FENCING_NEW, UNDO),
            row($state, "Unanswered(source)", "", FENCING_NEW, UNDO),
            row($state, "Unanswered(target)", "", FENCING_NEW, UNDO),
            row($state, "Tick", OVERDUE, FENCING_NEW, UNDO),
        ]
    };
}

const FORWARD: &[Transition] = &[
    row("–", "begin", "", PREPARING, &["Prepare(source)"]),
    row(
        "–",
        "resume",
        "no commit record",
        FENCING_NEW,
        &["Fence(target)"],
    ),
    row("–", "resume", "commit record found", SERVING, &["Serve"]),
    row(
        PREPARING,
        "TargetHealthy",
        "",
        PREPARING,
        &["Prepare(target)"],
    ),
    row(
        PREPARING,
        "Prepared",
        "the other side is not",
        PREPARING,
        &[],
    ),
    row(
        PREPARING,
        "Prepared",
        "both sides are",
        NEGOTIATING,
        &["Phase", "Negotiate(source)", "Negotiate(target)"],
    ),
    row(NEGOTIATING, "Offered", "by one side", NEGOTIATING, &[]),
    row(
        NEGOTIATING,
        "Offered",
        "by both, nothing missing",
        TRANSFERRING,
        &["Phase", "Round"],
    ),
    row(
        NEGOTIATING,
        "Offered",
        "by both, something missing",
        FENCING_NEW,
        UNDO,
    ),
    row(
        TRANSFERRING,
        "RoundApplied",
        "copied, the last round would be long, and each was shorter; at most 10 rounds",
        TRANSFERRING,
        &["Round"],
    ),
    row(
        TRANSFERRING,
        "RoundApplied",
        "otherwise",
        VALIDATING,
        &["Phase", "Validate"],
    ),
    row(TRANSFERRING, "Held", "", TRANSFERRING, &[]),
    row(
        VALIDATING,
        "Report",
        "at least one check, none failed",
        COMMITTABLE,
        &["Phase", "Committable"],
    ),
    row(VALIDATING, "Report", "otherwise", FENCING_NEW, UNDO),
    row(
        COMMITTABLE,
        "CommitRequested",
        "estimate within the limit, or none is set",
        FREEZING,
        &["Phase", "Freeze"],
    ),
    row(
        COMMITTABLE,
        "CommitRequested",
        "otherwise",
        COMMITTABLE,
        &["CommitRefused"],
    ),
    row(
        COMMITTABLE,
        "CommitRequested",
        "otherwise, and nobody is there to decide",
        FENCING_NEW,
        UNDO,
    ),
    row(FREEZING, "Frozen", "", LAST_ROUND, &["Round(last)"]),
    row(LAST_ROUND, "RoundApplied", "", ACTIVATING, &["Activate"]),
    row(
        ACTIVATING,
        "Activated",
        "the digests agree",
        RECORDING,
        &["WriteCommitRecord"],
    ),
    row(
        ACTIVATING,
        "Activated",
        "the digests differ",
        FENCING_NEW,
        UNDO,
    ),
    row(RECORDING, "RecordDurable", "", SERVING, &["Serve"]),
    row(
        RECORDING,
        "RecordDurable",
        "the target died meanwhile",
        FENCING_OLD,
        FENCE_OLD,
    ),
    row(RECORDING, "RecordFailed", "", FENCING_NEW, UNDO),
    row(
        RECORDING,
        "Died(source)",
        "remembered until the record's outcome is known",
        RECORDING,
        &[],
    ),
    row(
        RECORDING,
        "Died(target)",
        "remembered until the record's outcome is known",
        RECORDING,
        &[],
    ),
];

const AFTER_THE_RECORD: &[Transition] = &[
    row(SERVING, "Serving", "", RETIRING, &["Retire"]),
    row(
        SERVING,
        "Refused(target)",
        "asked fewer than 5 times; asked again after 200 ms",
        SERVING,
        &[],
    ),
    row(
        SERVING,
        "Refused(target)",
        "asked 5 times",
        FENCING_OLD,
        FENCE_OLD,
    ),
    row(SERVING, "Unanswered(target)", AGAIN, SERVING, &[]),
    row(SERVING, "Tick", ASK_DUE, SERVING, &["Serve"]),
    row(SERVING, "Died(target)", "", FENCING_OLD, FENCE_OLD),
    row(RETIRING, "Retired", "", FENCING_OLD, FENCE_OLD),
    row(RETIRING, "Refused(source)", "", FENCING_OLD, FENCE_OLD),
    row(RETIRING, "Unanswered(source)", "", FENCING_OLD, FENCE_OLD),
    row(RETIRING, "Died(source)", "", FENCING_OLD, FENCE_OLD),
    row(RETIRING, "Died(target)", "", RETIRING, &[]),
    row(RETIRING, "Tick", OVERDUE, FENCING_OLD, FENCE_OLD),
    row(
        FENCING_OLD,
        "Fenced(source)",
        "certificate of the source generation",
        DONE,
        &["Phase", "Finished(Committed)"],
    ),
    row(
        FENCING_OLD,
        "Fenced(source)",
        "the same, and the target failed",
        DONE,
        &["Phase", "Finished(CommittedButFailed)"],
    ),
    row(FENCING_OLD, "Died(target)", "", FENCING_OLD, &[]),
    row(
        FENCING_OLD,
        "FenceUnconfirmed(source)",
        "tried fewer than 10 times",
        FENCING_OLD,
        &[],
    ),
    row(
        FENCING_OLD,
        "Tick",
        "1 s after an unconfirmed fence",
        FENCING_OLD,
        FENCE_OLD,
    ),
    row(
        FENCING_OLD,
        "FenceUnconfirmed(source)",
        "tried 10 times",
        DONE,
        &["Phase", "Finished(OperatorActionNeeded)"],
    ),
];

const ROLLING_BACK: &[Transition] = &[
    row(
        FENCING_NEW,
        "RollbackRequested",
        UNDER_WAY,
        FENCING_NEW,
        &[],
    ),
    row(RESUMING, "RollbackRequested", UNDER_WAY, RESUMING, &[]),
    row(
        FENCING_NEW,
        "Fenced(target)",
        "certificate of the target generation",
        RESUMING,
        &["ResumeSource"],
    ),
    row(
        FENCING_NEW,
        "Fenced(target)",
        "the same, and the source has failed",
        DONE,
        &["Phase", "Finished(SourceFailed)"],
    ),
    row(FENCING_NEW, "Died(source)", "", FENCING_NEW, &[]),
    row(
        FENCING_NEW,
        "FenceUnconfirmed(target)",
        "tried fewer than 10 times",
        FENCING_NEW,
        &[],
    ),
    row(
        FENCING_NEW,
        "Tick",
        "1 s after an unconfirmed fence",
        FENCING_NEW,
        &["Fence(target)"],
    ),
    row(
        FENCING_NEW,
        "FenceUnconfirmed(target)",
        "tried 10 times",
        DONE,
        &["Phase", "Finished(OperatorActionNeeded)"],
    ),
    row(
        RESUMING,
        "SourceRunning",
        "",
        DONE,
        &["Phase", "Finished(RolledBack)"],
    ),
    row(
        RESUMING,
        "Refused(source)",
        "asked fewer than 5 times; asked again after 200 ms",
        RESUMING,
        &[],
    ),
    row(
        RESUMING,
        "Refused(source)",
        "asked 5 times",
        DONE,
        &["Phase", "Finished(SourceFailed)"],
    ),
    row(RESUMING, "Unanswered(source)", AGAIN, RESUMING, &[]),
    row(RESUMING, "Tick", ASK_DUE, RESUMING, &["ResumeSource"]),
    row(
        RESUMING,
        "Died(source)",
        "",
        DONE,
        &["Phase", "Finished(SourceFailed)"],
    ),
];

const UNDONE: [[Transition; 8]; 8] = [
    undone_from!(PREPARING),
    undone_from!(NEGOTIATING),
    undone_from!(TRANSFERRING),
    undone_from!(VALIDATING),
    undone_from!(COMMITTABLE),
    undone_from!(FREEZING),
    undone_from!(LAST_ROUND),
    undone_from!(ACTIVATING),
];

/// Every step an [`Engine`](super::Engine) takes, part by part: forward to the commit record, undone
/// before it, after it, and rolling back. What is not listed changes nothing.
pub const TRANSITIONS: [&[Transition]; 4] = [
    FORWARD,
    UNDONE.as_flattened(),
    AFTER_THE_RECORD,
    ROLLING_BACK,
];
