//! The role of this instance in a morph, and what each request may do in it. This module does no I/O:
//! [`super::Morphs`] sends the requests to the workload.
//!
//! ```text
//!  source:  Serving ─freeze─▶ Frozen ─last round─▶ Holding ─retire─▶ Retired
//!              ▲                │ lease over           │
//!              └────────────────┴──── rollback ────────┘
//!  target:  Waiting ─serve─▶ Served          Waiting ─rollback─▶ Stopped
//! ```
//!
//! Invariants:
//! - A frozen source thaws by itself when its lease expires, unless it is Holding. It is Holding once it has answered
//!   the last round: from then on the commit record may exist, and only a daemon that has read its journal knows.
//! - A target that serves owns the state. No request of the session in which it began to serve stops or freezes it.
//! - Session numbers grow. A later session proves that an earlier one is over: one daemon runs one morph of an
//!   instance at a time, and a committed morph leaves no source.

use std::time::{Duration, Instant};

use kmp_proto::message::Side;

/// Time for which a source stands still without a sign of the daemon that froze it. Each step and each chunk of the
/// last round renews it. As long as the daemon gives one step: a daemon that lives is never late for it.
pub(crate) const FREEZE_LEASE: Duration = Duration::from_secs(2);

/// A source's course.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Course {
    Serving,
    Frozen { digest: u64, until: Instant },
    Holding { digest: u64 },
    Retired,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    None,
    Source {
        session: u64,
        course: Course,
    },
    /// Its digest of the state, once it could answer.
    Target {
        session: u64,
        activated: Option<u64>,
    },
    Served {
        session: u64,
    },
}

/// The task of a rollback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Undo {
    /// Resume the workload if it is frozen, and report its state.
    Resume,
    /// End the workload, which has not served any client.
    Stop,
}

/// The task of a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freeze {
    /// Ask the workload.
    Now,
    /// The workload is already frozen; the digest of its state.
    Already(u64),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Role {
    part: Part,
    /// The latest session that was prepared here.
    newest: u64,
}

/// Why a request does not fit the part played.
pub(super) type Misfit = String;

impl Role {
    pub(super) const fn new() -> Self {
        Self {
            part: Part::None,
            newest: 0,
        }
    }

    /// Takes part in `session`. Repeating it changes nothing.
    pub(super) fn prepare(&mut self, session: u64, side: Side) -> Result<(), Misfit> {
        if session < self.newest {
            return Err(format!(
                "session {session} is over: session {} followed it",
                self.newest
            ));
        }
        match self.part {
            Part::Source { session: now, .. } if now == session => {
                return same_side(side, Side::Source, session);
            }
            Part::Target { session: now, .. } | Part::Served { session: now } if now == session => {
                return same_side(side, Side::Target, session);
            }
            Part::Source {
                session: now,
                course: Course::Frozen { .. } | Course::Holding { .. },
            } => {
                return Err(format!(
                    "frozen by session {now}: roll back that session first"
                ));
            }
            Part::Source {
                session: now,
                course: Course::Retired,
            } => return Err(format!("retired by session {now}")),
            _ if session == self.newest => {
                return Err(format!("session {session} is over here"));
            }
            _ => {}
        }
        self.newest = session;
        self.part = match side {
            Side::Source => Part::Source {
                session,
                course: Course::Serving,
            },
            Side::Target => Part::Target {
                session,
                activated: None,
            },
        };
        Ok(())
    }

    /// The side that this instance is in `session`.
    pub(super) fn side(&self, session: u64) -> Result<Side, Misfit> {
        match self.part {
            Part::Source { session: now, .. } if now == session => Ok(Side::Source),
            Part::Target { session: now, .. } | Part::Served { session: now } if now == session => {
                Ok(Side::Target)
            }
            Part::None => Err(format!("session {session} is not active")),
            Part::Source { session: now, .. }
            | Part::Target { session: now, .. }
            | Part::Served { session: now } => Err(format!(
                "session {session} is not active: the latest is {now}"
            )),
        }
    }

    /// The task of FREEZE.
    pub(super) fn freeze(&self, session: u64) -> Result<Freeze, Misfit> {
        match self.source(session)? {
            Course::Serving => Ok(Freeze::Now),
            Course::Frozen { digest, .. } | Course::Holding { digest } => {
                Ok(Freeze::Already(digest))
            }
            Course::Retired => Err(format!("retired by session {session}")),
        }
    }

    /// The workload stands still since `now`.
    pub(super) fn frozen(&mut self, session: u64, digest: u64, now: Instant) {
        let until = now + FREEZE_LEASE;
        self.change(session, Course::Frozen { digest, until });
    }

    /// The daemon has shown that it lives.
    pub(super) fn renew(&mut self, session: u64, now: Instant) {
        if let Ok(Course::Frozen { digest, .. }) = self.source(session) {
            self.frozen(session, digest, now);
        }
    }

    /// When the lease of `session` ends; none when there is none to wait for.
    pub(super) fn lease(&self, session: u64) -> Option<Instant> {
        match self.source(session) {
            Ok(Course::Frozen { until, .. }) => Some(until),
            _ => None,
        }
    }

    /// Ends `session` if its lease is over; whether it was.
    pub(super) fn expire(&mut self, session: u64, now: Instant) -> bool {
        let over = self.lease(session).is_some_and(|until| until <= now);
        if over {
            self.part = Part::None;
        }
        over
    }

    /// The last round is answered: from now on the source stands still until a daemon says what became of the morph.
    pub(super) fn hold(&mut self, session: u64) -> Result<(), Misfit> {
        match self.source(session)? {
            Course::Frozen { digest, .. } | Course::Holding { digest } => {
                self.change(session, Course::Holding { digest });
                Ok(())
            }
            Course::Serving => Err(format!("the workload is not frozen in session {session}")),
            Course::Retired => Err(format!("retired by session {session}")),
        }
    }

    /// Whether RETIRE is still to be carried out.
    pub(super) fn retire(&self, session: u64) -> Result<bool, Misfit> {
        match self.source(session)? {
            Course::Retired => Ok(false),
            Course::Holding { .. } => Ok(true),
            Course::Serving | Course::Frozen { .. } => Err(format!(
                "the last round of session {session} was not requested"
            )),
        }
    }

    /// The workload has given everything away.
    pub(super) fn retired(&mut self, session: u64) {
        self.change(session, Course::Retired);
    }

    /// The digest that ACTIVATE was answered with; `None` when it is still to be carried out.
    pub(super) fn activate(&self, session: u64) -> Result<Option<u64>, Misfit> {
        match self.part {
            Part::Target {
                session: now,
                activated,
            } if now == session => Ok(activated),
            Part::Served { session: now } if now == session => Err(format!(
                "the workload has been serving since session {session}"
            )),
            _ => self
                .side(session)
                .and(Err(format!("this is not the target of session {session}"))),
        }
    }

    /// The workload has taken over the state, which has this digest.
    pub(super) fn activated(&mut self, session: u64, digest: u64) {
        if self.activate(session).is_ok() {
            let activated = Some(digest);
            self.part = Part::Target { session, activated };
        }
    }

    /// Whether SERVE is still to be carried out.
    pub(super) fn serve(&self, session: u64) -> Result<bool, Misfit> {
        match self.part {
            Part::Target { session: now, .. } if now == session => Ok(true),
            Part::Served { session: now } if now == session => Ok(false),
            _ => self
                .side(session)
                .and(Err(format!("this is not the target of session {session}"))),
        }
    }

    /// The workload serves: it owns the state.
    pub(super) fn serves(&mut self, session: u64) {
        if self.serve(session) == Ok(true) {
            self.part = Part::Served { session };
        }
    }

    /// The task of a rollback of `session` on this side.
    pub(super) fn roll_back(&self, session: u64, side: Side) -> Result<Undo, Misfit> {
        match (side, self.part) {
            (Side::Target, Part::Target { session: now, .. }) if now == session => Ok(Undo::Stop),
            (Side::Target, Part::Served { session: now }) if now == session => Err(format!(
                "session {session} is committed: the workload serves"
            )),
            (Side::Target, _) => Err(format!(
                "this is not the target of session {session}: nothing is stopped"
            )),
            (
                Side::Source,
                Part::Source {
                    session: now,
                    course: Course::Retired,
                },
            ) => Err(format!("retired by session {now}")),
            (Side::Source, Part::Source { session: now, .. }) if session < now => Err(format!(
                "session {session} is over: session {now} is active"
            )),
            (Side::Source, Part::Target { session: now, .. }) => {
                Err(format!("this is the target of session {now}"))
            }
            (Side::Source, Part::Served { session: now }) if now == session => {
                Err(format!("this is the target of session {session}"))
            }
            (Side::Source, _) => Ok(Undo::Resume),
        }
    }

    /// The rollback of `session` was carried out.
    pub(super) fn rolled_back(&mut self, session: u64) {
        self.newest = self.newest.max(session);
        if !matches!(self.part, Part::Served { .. }) {
            self.part = Part::None;
        }
    }

    fn source(&self, session: u64) -> Result<Course, Misfit> {
        match self.part {
            Part::Source {
                session: now,
                course,
            } if now == session => Ok(course),
            _ => self
                .side(session)
                .and(Err(format!("this is not the source of session {session}"))),
        }
    }

    fn change(&mut self, session: u64, course: Course) {
        if self.source(session).is_ok() {
            self.part = Part::Source { session, course };
        }
    }
}

fn same_side(asked: Side, is: Side, session: u64) -> Result<(), Misfit> {
    if asked == is {
        return Ok(());
    }
    Err(format!(
        "this is the {} side of session {session}",
        is.as_str()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frozen(session: u64, now: Instant) -> Role {
        let mut role = Role::new();
        role.prepare(session, Side::Source).unwrap();
        assert_eq!(role.freeze(session), Ok(Freeze::Now));
        role.frozen(session, 5, now);
        role
    }

    fn served(session: u64) -> Role {
        let mut role = Role::new();
        role.prepare(session, Side::Target).unwrap();
        role.serves(session);
        role
    }

    #[test]
    fn a_source_thaws_when_its_lease_is_over_and_refuses_what_came_too_late() {
        let now = Instant::now();
        let mut role = frozen(3, now);
        assert!(!role.expire(3, now + FREEZE_LEASE / 2));
        role.renew(3, now + FREEZE_LEASE / 2);
        assert!(!role.expire(3, now + FREEZE_LEASE));
        assert!(role.expire(3, now + FREEZE_LEASE * 2));
        assert!(role.hold(3).is_err(), "no record can be written any more");
        assert!(role.retire(3).is_err());
        assert_eq!(role.roll_back(3, Side::Source), Ok(Undo::Resume));
    }

    #[test]
    fn the_lease_on_the_page_is_the_one_in_force() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kmp.md");
        let page = std::fs::read_to_string(path).unwrap();
        let lease = FREEZE_LEASE.as_secs();
        let sentence = format!("After `freeze` the source stays frozen for {lease} s.");
        assert!(page.contains(&sentence), "{sentence}");
    }

    #[test]
    fn a_source_that_holds_waits_for_the_word_of_a_daemon() {
        let now = Instant::now();
        let mut role = frozen(3, now);
        assert!(role.retire(3).is_err(), "nothing was committed");
        role.hold(3).unwrap();
        role.hold(3).unwrap();
        assert_eq!(role.lease(3), None);
        assert!(!role.expire(3, now + FREEZE_LEASE * 1000));
        assert_eq!(role.retire(3), Ok(true));
        role.retired(3);
        assert_eq!(role.retire(3), Ok(false), "repeated by the next daemon");
        assert!(role.roll_back(3, Side::Source).is_err());
    }

    #[test]
    fn a_freeze_that_is_repeated_is_answered_as_the_first() {
        let role = frozen(3, Instant::now());
        assert_eq!(role.freeze(3), Ok(Freeze::Already(5)));
        assert!(role.freeze(4).is_err());
    }

    #[test]
    fn nothing_of_its_session_ends_a_target_that_serves() {
        let mut role = served(19);
        assert_eq!(role.serve(19), Ok(false), "repeated by the next daemon");
        assert!(role.roll_back(19, Side::Target).is_err());
        assert!(role.roll_back(18, Side::Target).is_err());
        assert!(role.roll_back(20, Side::Target).is_err());
        assert!(role.roll_back(19, Side::Source).is_err());
        assert!(role.freeze(19).is_err());
        // The next morph died with its daemon before this side heard of it.
        assert_eq!(role.roll_back(20, Side::Source), Ok(Undo::Resume));
        role.rolled_back(20);
        assert_eq!(role.serve(19), Ok(false));
        assert!(role.prepare(20, Side::Source).is_err(), "it is over");
        role.prepare(21, Side::Source).unwrap();
    }

    #[test]
    fn a_rollback_of_an_unknown_session_stops_nothing() {
        let mut role = Role::new();
        assert!(role.roll_back(7, Side::Target).is_err());
        assert_eq!(role.roll_back(7, Side::Source), Ok(Undo::Resume));
        role.prepare(8, Side::Target).unwrap();
        assert!(role.roll_back(7, Side::Target).is_err());
        assert!(role.roll_back(8, Side::Source).is_err());
        assert_eq!(role.roll_back(8, Side::Target), Ok(Undo::Stop));
    }

    #[test]
    fn sessions_grow_and_one_side_stays_one_side() {
        let mut role = frozen(3, Instant::now());
        role.prepare(3, Side::Source).unwrap();
        assert_eq!(role.freeze(3), Ok(Freeze::Already(5)), "it is still frozen");
        assert!(role.prepare(3, Side::Target).is_err());
        assert!(role.prepare(2, Side::Source).is_err());
        assert!(role.prepare(4, Side::Source).is_err(), "frozen by 3");
        assert!(role.roll_back(2, Side::Source).is_err());
        role.rolled_back(3);
        role.prepare(4, Side::Source).unwrap();
    }
}
