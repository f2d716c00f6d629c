//! Where an instance stands, for the engine and for people.

/// A state of the transition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A generation was started, or is adopted; its first healthy answer is waited for.
    Starting,
    /// It was healthy, and nothing is under way.
    Serving,
    /// Nothing is under way, and nothing will be until an operator asks.
    Resting,
    /// The wish that it be recovered is being written.
    Asked,
    /// It failed while the wish that it be terminated is being written: nothing else begins.
    Failed,
    /// Its recovery waits for the back-off.
    BackingOff,
    /// Its recovery waits to be admitted.
    Queued,
    /// Its recovery is under way.
    Recovering,
    /// Its morph is under way.
    Morphing,
    /// Its memory is being captured because somebody asked for that.
    Capturing,
    /// It is being ended.
    Ending,
    /// It is forgotten.
    Gone,
}

impl Stage {
    /// The name in the transition table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Resting => "resting",
            Self::Asked => "asked",
            Self::Failed => "failed",
            Self::BackingOff => "backing_off",
            Self::Queued => "queued",
            Self::Recovering => "recovering",
            Self::Morphing => "morphing",
            Self::Capturing => "capturing",
            Self::Ending => "ending",
            Self::Gone => "gone",
        }
    }
}

/// The condition of an instance that users see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// No healthy answer yet.
    Starting,
    /// It answers and complains of nothing.
    Running,
    /// It answers, and its agent or its load say that it is not well.
    Degraded,
    /// It is silent and not judged yet, or frozen for a capture.
    Unresponsive,
    /// It failed.
    Failed,
    /// It is being recovered.
    Recovering,
    /// A morph is under way.
    Morphing,
    /// It is being ended.
    Terminating,
    /// It failed too often and is fenced.
    Quarantined,
    /// A person has to act.
    OperatorActionNeeded,
}

impl Condition {
    /// The name in events and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Degraded => "degraded",
            Self::Unresponsive => "unresponsive",
            Self::Failed => "failed",
            Self::Recovering => "recovering",
            Self::Morphing => "morphing",
            Self::Terminating => "terminating",
            Self::Quarantined => "quarantined",
            Self::OperatorActionNeeded => "operator action needed",
        }
    }
}
