//! How far the model is explored, and what is broken in it on purpose.

/// A deliberate fault in the environment of the engines. The model must find each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// A backend confirms a fence that it has not carried out.
    FenceNotDone,
    /// An agent obeys a daemon of an older incarnation.
    OlderIncarnation,
    /// The journal reports the commit record as durable and forgets it.
    RecordForgotten,
    /// The journal reports a commit record as not written that is durable.
    RecordDenied,
    /// The daemon has the source resume after the commit record.
    ResumeAfterRecord,
    /// The daemon has the target serve before the commit record is durable.
    ServeBeforeRecord,
    /// A source thaws by itself although it has answered the last round.
    LeaseWhileHolding,
    /// An agent takes requests of a session that is over.
    ForgottenSessions,
    /// A restarted daemon takes a number for a generation that was used before.
    GenerationReused,
    /// The pool takes resources back before the fence is confirmed.
    ReclaimedEarly,
    /// The watch of a morph's target does not repeat its verdict to its new owner.
    VerdictNotRepeated,
    /// A restarted daemon takes a morph that ended with a failure for finished, although no recovery has begun.
    FailedMorphForgotten,
}

/// A set of [`Mutation`]s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mutations(u16);

impl Mutations {
    pub(crate) fn of(mutations: &[Mutation]) -> Self {
        Self(mutations.iter().fold(0, |set, one| set | Self::bit(*one)))
    }

    fn bit(mutation: Mutation) -> u16 {
        1 << (mutation as u16)
    }

    pub(crate) fn has(self, mutation: Mutation) -> bool {
        self.0 & Self::bit(mutation) != 0
    }
}

/// What is explored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    /// Faults on one path, of all kinds together: a message lost or doubled, a timeout that fires although an answer
    /// would come, a kernel that dies or is judged dead while it runs, a daemon that dies or is replaced, a record that
    /// is not written, a fence that is not confirmed once or ever, an agent that
    /// refuses everything from then on, a memory that is not captured, a target that does not start, a rollback that an
    /// operator asks for.
    pub(crate) faults: u8,
    /// Morphs of the instance, one after the other.
    pub(crate) morphs: u8,
    /// Whether a daemon may also be replaced while it is paused, and come back.
    pub(crate) paused: bool,
    pub(crate) mutations: Mutations,
    /// The only rule that is checked.
    pub(crate) only: Option<&'static str>,
}

impl Bound {
    pub(crate) fn new(faults: u8, morphs: u8, paused: bool) -> Self {
        Self {
            faults,
            morphs,
            paused,
            mutations: Mutations::default(),
            only: None,
        }
    }

    pub(crate) fn with(self, mutations: &[Mutation]) -> Self {
        Self {
            mutations: Mutations::of(mutations),
            ..self
        }
    }
}
