//! Recovery: from a verdict to a healthy successor.
//!
//! ```text
//!  verdict ─▶ Preparing ──fenced(certificate)──▶ Capturing ──dumped──▶ Reclaiming ──released──▶ Respawning ─▶ Done
//!                 │ fence not confirmed              │ no vmcore, and policy requires one
//!                 ▼                                  ▼
//!        OperatorActionNeeded: it keeps its resources
//! ```
//!
//! Invariants: the fence is the first effect. Nothing is reclaimed or respawned without a [`FenceCertificate`] of the
//! failed generation. Types enforce this: only a certificate leads to `Reclaiming`. Memory is captured after the
//! fence and before it is reclaimed; if a vmcore that the policy requires is missing, memory is not reclaimed. A
//! survivor that does not answer is reported, but the recovery does not wait for it. Every wait is bounded: a backend
//! bounds its fence and its release, the successor's failure detector bounds its start, and each reports its result.

mod restart;
mod transitions;

use std::collections::VecDeque;
use std::time::Duration;

pub use restart::{
    BACK_OFF_FIRST, BACK_OFF_MAX, CRASH_LOOP_FAILURES, CRASH_LOOP_WINDOW, Decision, RestartPolicy,
    STABLE_AFTER,
};
pub use transitions::TRANSITIONS;

use crate::fence::{FenceCertificate, FenceOrder};
use crate::time::Instant;

/// Whether the memory of a failed generation is captured before it is reclaimed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CapturePolicy {
    /// Do not capture.
    #[default]
    Off,
    /// Capture; if that fails, the recovery continues without a vmcore.
    On,
    /// Capture; if that fails, an operator decides.
    Required,
}

/// The next step once the failed generation has released everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// A successor is started.
    Respawn,
    /// The instance rests: it failed too often.
    Quarantine,
}

/// Maximum number of attempts at a fence before an operator must act.
pub const FENCE_ATTEMPTS: u32 = 5;
/// Wait before a fence that was not confirmed is retried.
pub const FENCE_RETRY: Duration = Duration::from_millis(500);

/// Phase: fencing.
#[derive(Debug, PartialEq, Eq)]
pub struct Preparing {
    attempts: u32,
}

/// Phase: capturing the memory of the failed generation.
#[derive(Debug, PartialEq, Eq)]
pub struct Capturing {
    certificate: FenceCertificate,
}

/// Phase: releasing the resources of the failed generation.
#[derive(Debug, PartialEq, Eq)]
pub struct Reclaiming {
    certificate: FenceCertificate,
}

/// Phase: starting the successor.
#[derive(Debug, PartialEq, Eq)]
pub struct Respawning {
    certificate: FenceCertificate,
    /// True once the successor was started.
    started: bool,
    /// Why the successor is no longer wanted. Its start continues to the end all the same, so that it is known and can
    /// be fenced.
    unwanted: Option<String>,
}

/// One recovery in the phase `P`.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovery<P> {
    failed_generation: u64,
    phase: P,
}

/// A certificate of another generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the certificate is for generation {certified}, generation {failed} has failed")]
pub struct WrongGeneration {
    /// The generation that failed.
    pub failed: u64,
    /// The certified generation.
    pub certified: u64,
}

impl Recovery<Preparing> {
    /// Begins the recovery of `failed_generation`: the order to fence it is the first effect.
    pub fn begin(failed_generation: u64) -> (Self, FenceOrder) {
        let phase = Preparing { attempts: 1 };
        (
            Self {
                failed_generation,
                phase,
            },
            FenceOrder::new(failed_generation),
        )
    }

    /// Records that the fence is confirmed.
    ///
    /// # Errors
    /// If the certificate is for another generation; the recovery comes back unchanged.
    pub fn fenced(
        self,
        certificate: FenceCertificate,
    ) -> Result<Recovery<Capturing>, (Self, WrongGeneration)> {
        let (failed, certified) = (self.failed_generation, certificate.generation());
        if failed != certified {
            return Err((self, WrongGeneration { failed, certified }));
        }
        Ok(Recovery {
            failed_generation: failed,
            phase: Capturing { certificate },
        })
    }

    /// Records that the fence was not confirmed. Returns `None` after [`FENCE_ATTEMPTS`] attempts.
    pub fn fence_again(mut self) -> Option<Self> {
        self.phase.attempts += 1;
        (self.phase.attempts <= FENCE_ATTEMPTS).then_some(self)
    }
}

impl Recovery<Capturing> {
    /// Returns the proof that nothing changes this memory any more.
    pub fn certificate(&self) -> &FenceCertificate {
        &self.phase.certificate
    }

    /// Records that the memory was captured, or the policy allows continuing without it.
    pub fn dumped(self) -> Recovery<Reclaiming> {
        let Capturing { certificate } = self.phase;
        Recovery {
            failed_generation: self.failed_generation,
            phase: Reclaiming { certificate },
        }
    }
}

impl Recovery<Reclaiming> {
    /// Returns the proof that the reclaimed resources are not in use.
    pub fn certificate(&self) -> &FenceCertificate {
        &self.phase.certificate
    }

    /// Records that everything was released.
    pub fn released(self) -> Recovery<Respawning> {
        let Reclaiming { certificate } = self.phase;
        Recovery {
            failed_generation: self.failed_generation,
            phase: Respawning {
                certificate,
                started: false,
                unwanted: None,
            },
        }
    }
}

impl Recovery<Respawning> {
    /// Returns the proof that no predecessor runs.
    pub fn certificate(&self) -> &FenceCertificate {
        &self.phase.certificate
    }
}

/// The events of the engine.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The fence is confirmed.
    Fenced(FenceCertificate),
    /// The fence could not be confirmed; the order was returned.
    FenceUnconfirmed(String),
    /// The vmcore is complete and verified.
    Captured,
    /// There is no vmcore; the reason.
    CaptureFailed(String),
    /// The resources of the failed generation were released.
    Released,
    /// The successor is healthy.
    SuccessorHealthy {
        /// Its generation.
        generation: u64,
    },
    /// The successor was started.
    SuccessorStarted,
    /// The successor could not be started.
    NotStarted(String),
    /// The successor failed before it was healthy, or is no longer wanted.
    SuccessorFailed(String),
    /// The successor could not be started, but parts of it may be running: another one would be a second owner.
    SuccessorRemains(String),
    /// Time has passed.
    Tick,
}

impl Event {
    /// Returns the name in the transition table.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Fenced(_) => "Fenced",
            Self::FenceUnconfirmed(_) => "FenceUnconfirmed",
            Self::Captured => "Captured",
            Self::CaptureFailed(_) => "CaptureFailed",
            Self::Released => "Released",
            Self::SuccessorHealthy { .. } => "SuccessorHealthy",
            Self::SuccessorStarted => "SuccessorStarted",
            Self::NotStarted(_) => "NotStarted",
            Self::SuccessorFailed(_) => "SuccessorFailed",
            Self::SuccessorRemains(_) => "SuccessorRemains",
            Self::Tick => "Tick",
        }
    }
}

/// An action that the caller must carry out.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Inform the survivors: RECOVER_PREPARE.
    NoticeSurvivors,
    /// Carry out the fence.
    Fence(FenceOrder),
    /// Capture the memory of the generation.
    Capture(FenceCertificate),
    /// Inform the survivors (RECOVER_RECLAIM), and release the resources of the generation.
    Reclaim(FenceCertificate),
    /// Start a successor.
    Respawn(FenceCertificate),
    /// Inform the survivors: RECOVER_COMPLETE with the topology.
    Complete {
        /// The successor; 0 if there is none and the resources are back in the pool.
        new_generation: u64,
    },
    /// The recovery is over.
    Finished(Outcome),
}

impl Action {
    /// Returns the name in the transition table.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::NoticeSurvivors => "NoticeSurvivors",
            Self::Fence(_) => "Fence",
            Self::Capture(_) => "Capture",
            Self::Reclaim(_) => "Reclaim",
            Self::Respawn(_) => "Respawn",
            Self::Complete { .. } => "Complete",
            Self::Finished(outcome) => match outcome {
                Outcome::Recovered => "Finished(Recovered)",
                Outcome::SuccessorFailed(_) => "Finished(SuccessorFailed)",
                Outcome::Quarantined => "Finished(Quarantined)",
                Outcome::OperatorActionNeeded(_) => "Finished(OperatorActionNeeded)",
            },
        }
    }
}

/// How a recovery ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A healthy successor serves.
    Recovered,
    /// The successor failed and needs the next recovery.
    SuccessorFailed(String),
    /// The instance is fenced and stays stopped.
    Quarantined,
    /// The fence could not be confirmed, there is no vmcore although the policy requires one, or parts of a successor
    /// that did not start may be running.
    OperatorActionNeeded(String),
}

#[derive(Debug)]
enum State {
    Preparing(Recovery<Preparing>),
    Capturing(Recovery<Capturing>),
    Reclaiming(Recovery<Reclaiming>),
    Respawning(Recovery<Respawning>),
    Done,
}

/// The engine of one recovery.
#[derive(Debug)]
pub struct Engine {
    capture: CapturePolicy,
    afterwards: Afterwards,
    /// Time at which an unconfirmed fence is retried.
    retry_at: Option<Instant>,
    /// Why the successor is no longer wanted.
    unwanted: Option<String>,
    state: State,
    actions: VecDeque<Action>,
}

impl Engine {
    /// Begins the recovery of `failed_generation`.
    pub fn new(failed_generation: u64, capture: CapturePolicy, afterwards: Afterwards) -> Self {
        let (recovery, order) = Recovery::begin(failed_generation);
        let actions = [Action::Fence(order), Action::NoticeSurvivors].into();
        Self {
            capture,
            afterwards,
            retry_at: None,
            unwanted: None,
            state: State::Preparing(recovery),
            actions,
        }
    }

    /// Continues after a restart of the daemon with a generation that is already fenced. A recovery without a
    /// recorded fence starts again: fencing twice is safe. A caller that already has the vmcore passes
    /// [`CapturePolicy::Off`].
    pub fn resume_fenced(
        certificate: FenceCertificate,
        capture: CapturePolicy,
        afterwards: Afterwards,
    ) -> Self {
        let recovery = Recovery {
            failed_generation: certificate.generation(),
            phase: Capturing { certificate },
        };
        let mut engine = Self {
            capture,
            afterwards,
            retry_at: None,
            unwanted: None,
            state: State::Done,
            actions: VecDeque::new(),
        };
        engine.state = engine.fenced(recovery);
        engine
    }

    /// Returns the phase's name in journal and API.
    pub fn phase(&self) -> &'static str {
        match self.state {
            State::Preparing(_) => "preparing_recovery",
            State::Capturing(_) => "capturing_vmcore",
            State::Reclaiming(_) => "reclaiming_resources",
            State::Respawning(_) => "respawning",
            State::Done => "done",
        }
    }

    /// Returns the next action, in order.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Returns the time at which [`Event::Tick`] is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Handles an event. An event that does not belong to the phase changes nothing.
    pub fn handle(&mut self, event: Event, now: Instant) {
        let state = std::mem::replace(&mut self.state, State::Done);
        self.state = match (state, event) {
            (State::Preparing(recovery), Event::Fenced(certificate)) => {
                match recovery.fenced(certificate) {
                    Ok(next) => self.fenced(next),
                    Err((same, _)) => State::Preparing(same),
                }
            }
            (State::Preparing(recovery), Event::FenceUnconfirmed(reason))
                if self.retry_at.is_none() =>
            {
                match recovery.fence_again() {
                    Some(again) => {
                        self.retry_at = Some(now + FENCE_RETRY);
                        State::Preparing(again)
                    }
                    None => self.finish(Outcome::OperatorActionNeeded(reason)),
                }
            }
            (State::Preparing(recovery), Event::Tick)
                if self.retry_at.is_some_and(|due| due <= now) =>
            {
                self.retry_at = None;
                let order = FenceOrder::new(recovery.failed_generation);
                self.actions.push_back(Action::Fence(order));
                State::Preparing(recovery)
            }
            (State::Capturing(recovery), Event::Captured) => self.reclaim(recovery),
            (State::Capturing(recovery), Event::CaptureFailed(reason)) => match self.capture {
                CapturePolicy::Required => self.finish(Outcome::OperatorActionNeeded(reason)),
                CapturePolicy::On | CapturePolicy::Off => self.reclaim(recovery),
            },
            (
                state @ (State::Preparing(_) | State::Capturing(_) | State::Reclaiming(_)),
                Event::SuccessorFailed(reason),
            ) => {
                self.unwanted = Some(reason);
                state
            }
            (State::Reclaiming(_), Event::Released) if self.unwanted.is_some() => {
                let reason = self.unwanted.take().unwrap_or_default();
                self.successor_failed(reason)
            }
            (State::Reclaiming(_), Event::Released)
                if self.afterwards == Afterwards::Quarantine =>
            {
                self.complete(0);
                self.finish(Outcome::Quarantined)
            }
            (State::Reclaiming(recovery), Event::Released) => {
                let next = recovery.released();
                self.actions
                    .push_back(Action::Respawn(next.certificate().clone()));
                State::Respawning(next)
            }
            (State::Respawning(recovery), Event::SuccessorHealthy { generation })
                if recovery.phase.started && generation > recovery.failed_generation =>
            {
                self.complete(generation);
                self.finish(Outcome::Recovered)
            }
            (State::Respawning(mut recovery), Event::SuccessorStarted)
                if !recovery.phase.started =>
            {
                recovery.phase.started = true;
                match recovery.phase.unwanted.take() {
                    None => State::Respawning(recovery),
                    Some(why) => self.successor_failed(why),
                }
            }
            (State::Respawning(recovery), Event::SuccessorFailed(reason))
                if recovery.phase.started =>
            {
                self.successor_failed(reason)
            }
            (State::Respawning(mut recovery), Event::SuccessorFailed(reason)) => {
                recovery.phase.unwanted = Some(reason);
                State::Respawning(recovery)
            }
            (State::Respawning(recovery), Event::NotStarted(reason)) if !recovery.phase.started => {
                self.successor_failed(reason)
            }
            (State::Respawning(recovery), Event::SuccessorRemains(reason))
                if !recovery.phase.started =>
            {
                self.complete(0);
                self.finish(Outcome::OperatorActionNeeded(reason))
            }
            (state, _) => state,
        };
    }

    fn fenced(&mut self, recovery: Recovery<Capturing>) -> State {
        self.retry_at = None;
        if self.capture == CapturePolicy::Off {
            return self.reclaim(recovery);
        }
        let proof = recovery.certificate().clone();
        self.actions.push_back(Action::Capture(proof));
        State::Capturing(recovery)
    }

    fn reclaim(&mut self, recovery: Recovery<Capturing>) -> State {
        let next = recovery.dumped();
        let proof = next.certificate().clone();
        self.actions.push_back(Action::Reclaim(proof));
        State::Reclaiming(next)
    }

    fn successor_failed(&mut self, reason: String) -> State {
        self.complete(0);
        self.finish(Outcome::SuccessorFailed(reason))
    }

    /// Reports the end of the recovery to the survivors, who know that it began.
    fn complete(&mut self, new_generation: u64) {
        self.actions.push_back(Action::Complete { new_generation });
    }

    fn finish(&mut self, outcome: Outcome) -> State {
        self.retry_at = None;
        self.actions.push_back(Action::Finished(outcome));
        State::Done
    }
}

#[cfg(test)]
mod tests;
