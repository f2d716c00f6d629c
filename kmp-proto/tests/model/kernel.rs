//! A kernel with its agent, as small as a morph and a recovery see it. The rules for sessions and leases are those of
//! "MORPH_COMMIT" and "MORPH_ROLLBACK" in docs/kmp.md.
//!
//! Simplified: state moves by reference, in one round; an agent answers at once.

use kmp_proto::message::Side;

use crate::bound::{Mutation, Mutations};

/// Number of a morph's session.
pub(crate) type Session = u8;
/// Number of a daemon's start.
pub(crate) type Incarnation = u8;

/// A request of a morph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Ask {
    PrepareSource,
    PrepareTarget,
    NegotiateSource,
    NegotiateTarget,
    /// The source makes its state ready.
    Export,
    /// The target maps it.
    Import,
    Validate,
    Freeze,
    /// The last round, which by reference goes to the source alone.
    Hold,
    Activate,
    Serve,
    Retire,
    /// MORPH_ROLLBACK to the source.
    Resume,
}

impl Ask {
    pub(crate) fn side(self) -> Side {
        match self {
            Self::PrepareSource
            | Self::NegotiateSource
            | Self::Export
            | Self::Freeze
            | Self::Hold
            | Self::Retire
            | Self::Resume => Side::Source,
            Self::PrepareTarget
            | Self::NegotiateTarget
            | Self::Import
            | Self::Validate
            | Self::Activate
            | Self::Serve => Side::Target,
        }
    }
}

/// What the workload does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Work {
    /// It waits for its state.
    Waits,
    /// It answers clients.
    Serves,
    /// It is frozen.
    Still,
    Ended,
}

/// A source's course in its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Course {
    Serving,
    /// Under a lease.
    Frozen,
    /// Until a daemon reports the outcome.
    Holding,
    Retired,
}

/// The part that an agent plays in a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    None,
    Source(Session, Course),
    Target(Session),
    Served(Session),
}

/// Whether the kernel of a generation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Life {
    /// The generation is intended and was not started.
    Intended,
    Runs,
    Ended,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kernel {
    pub(crate) life: Life,
    pub(crate) work: Work,
    pub(crate) part: Part,
    /// The newest session that it knows.
    pub(crate) newest: Session,
    /// The newest incarnation of the daemon that it has obeyed.
    pub(crate) seen: Incarnation,
    /// Its resources are back in the pool.
    pub(crate) reclaimed: bool,
    /// The backend cannot confirm its end.
    pub(crate) stuck: bool,
    /// Its agent refuses every request.
    pub(crate) refuses: bool,
}

impl Kernel {
    pub(crate) fn intended() -> Self {
        Self {
            life: Life::Intended,
            work: Work::Waits,
            part: Part::None,
            newest: 0,
            seen: 0,
            reclaimed: false,
            stuck: false,
            refuses: false,
        }
    }

    pub(crate) fn runs(&self) -> bool {
        self.life == Life::Runs
    }

    pub(crate) fn serves(&self) -> bool {
        self.runs() && self.work == Work::Serves
    }

    /// Boots it: the target of a morph waits, any other generation serves.
    pub(crate) fn boot(&mut self, work: Work) {
        (self.life, self.work) = (Life::Runs, work);
    }

    pub(crate) fn end(&mut self) {
        (self.life, self.work, self.part) = (Life::Ended, Work::Ended, Part::None);
    }

    /// Carries out a request of a running kernel. True when it is done, false when the agent refuses.
    pub(crate) fn answer(&mut self, ask: Ask, session: Session, mutations: Mutations) -> bool {
        if self.refuses {
            return false;
        }
        match ask {
            Ask::PrepareSource => self.prepare(session, Part::Source(session, Course::Serving)),
            Ask::PrepareTarget => self.prepare(session, Part::Target(session)),
            Ask::Resume => self.resume(session, mutations),
            Ask::Freeze | Ask::Hold | Ask::Retire => self.source_step(ask, session, mutations),
            Ask::Serve => match self.part {
                Part::Target(now) | Part::Served(now) if now == session => {
                    (self.part, self.work) = (Part::Served(session), Work::Serves);
                    true
                }
                _ => false,
            },
            Ask::NegotiateSource | Ask::Export => {
                matches!(self.part, Part::Source(now, _) if now == session)
            }
            Ask::NegotiateTarget => {
                matches!(self.part, Part::Target(now) | Part::Served(now) if now == session)
            }
            Ask::Import | Ask::Validate | Ask::Activate => self.part == Part::Target(session),
        }
    }

    fn prepare(&mut self, session: Session, part: Part) -> bool {
        match self.part {
            Part::Source(now, _) if now == session => return matches!(part, Part::Source(..)),
            Part::Target(now) | Part::Served(now) if now == session => {
                return matches!(part, Part::Target(_));
            }
            Part::Source(_, Course::Frozen | Course::Holding | Course::Retired) => return false,
            _ if session <= self.newest => return false,
            _ => {}
        }
        (self.newest, self.part) = (session, part);
        true
    }

    fn source_step(&mut self, ask: Ask, session: Session, mutations: Mutations) -> bool {
        let course = match self.part {
            Part::Source(now, course) if now == session => course,
            Part::None if mutations.has(Mutation::ForgottenSessions) => match ask {
                Ask::Freeze => Course::Serving,
                _ => return false,
            },
            _ => return false,
        };
        let next = match (ask, course) {
            (Ask::Freeze, Course::Serving) => Course::Frozen,
            (Ask::Freeze, Course::Frozen | Course::Holding) => course,
            (Ask::Hold, Course::Frozen | Course::Holding) => Course::Holding,
            (Ask::Retire, Course::Holding | Course::Retired) => Course::Retired,
            _ => return false,
        };
        self.part = Part::Source(session, next);
        self.work = match next {
            Course::Serving => Work::Serves,
            Course::Frozen | Course::Holding => Work::Still,
            Course::Retired => Work::Ended,
        };
        true
    }

    fn resume(&mut self, session: Session, mutations: Mutations) -> bool {
        match self.part {
            Part::Source(_, Course::Retired) => return false,
            Part::Source(now, _)
                if session < now && !mutations.has(Mutation::ForgottenSessions) =>
            {
                return false;
            }
            Part::Target(_) => return false,
            Part::Served(now) if now == session => return false,
            _ => {}
        }
        self.newest = self.newest.max(session);
        if !matches!(self.part, Part::Served(_)) {
            self.part = Part::None;
        }
        if self.work == Work::Still {
            self.work = Work::Serves;
        }
        self.work == Work::Serves
    }

    /// Whether it stands still under a lease.
    pub(crate) fn leased(&self, mutations: Mutations) -> Option<Session> {
        match self.part {
            Part::Source(session, Course::Frozen) => Some(session),
            Part::Source(session, Course::Holding)
                if mutations.has(Mutation::LeaseWhileHolding) =>
            {
                Some(session)
            }
            _ => None,
        }
    }

    /// The lease is over: it serves again, and the session is over for it.
    pub(crate) fn thaw(&mut self) {
        (self.part, self.work) = (Part::None, Work::Serves);
    }
}
