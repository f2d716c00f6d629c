//! The kernels of one instance, as a morph and a recovery see them.

use std::collections::BTreeMap;
use std::time::Duration;

use kmp_proto::message::{Check, CheckResult, ProviderOffer, Side, StateProvider, capability};
use kmp_proto::morph::{Event, Offer};

pub(crate) const OLD: u64 = 7;
pub(crate) const NEW: u64 = 8;
const DIGEST: u64 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Its workload answers clients.
    Serving,
    /// The frozen source.
    Frozen,
    /// The target, without the workload's state or not yet serving.
    Waiting,
    Dead,
}

/// A request to a kernel in a morph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Prepare(Side),
    Negotiate(Side),
    Round,
    Validate,
    Freeze,
    Activate,
    Serve,
    Retire,
    Resume,
}

impl Request {
    pub(crate) fn side(self) -> Side {
        match self {
            Self::Prepare(side) | Self::Negotiate(side) => side,
            Self::Freeze | Self::Retire | Self::Resume => Side::Source,
            Self::Round | Self::Validate | Self::Activate | Self::Serve => Side::Target,
        }
    }

    /// Returns the timeout of the answer, ms.
    pub(crate) fn patience_ms(self) -> u64 {
        match self {
            Self::Freeze | Self::Activate | Self::Retire => 1000,
            _ => 3000,
        }
    }
}

pub(crate) fn generation(side: Side) -> u64 {
    match side {
        Side::Source => OLD,
        Side::Target => NEW,
    }
}

#[derive(Debug)]
pub(crate) struct Kernels {
    all: BTreeMap<u64, Kernel>,
    /// True if the source was asked to resume, which ends its session.
    session_over: bool,
}

impl Kernels {
    pub(crate) fn new() -> Self {
        Self {
            all: [(OLD, Kernel::Serving), (NEW, Kernel::Waiting)].into(),
            session_over: false,
        }
    }

    pub(crate) fn state(&self, generation: u64) -> Kernel {
        self.all.get(&generation).copied().unwrap_or(Kernel::Dead)
    }

    pub(crate) fn set(&mut self, generation: u64, kernel: Kernel) {
        self.all.insert(generation, kernel);
    }

    pub(crate) fn serving(&self) -> Vec<u64> {
        let serving = |(generation, kernel): (&u64, &Kernel)| {
            (*kernel == Kernel::Serving).then_some(*generation)
        };
        self.all.iter().filter_map(serving).collect()
    }

    pub(crate) fn alive(&self, generation: u64) -> bool {
        self.state(generation) != Kernel::Dead
    }

    /// Starts the next generation.
    pub(crate) fn spawn(&mut self) -> u64 {
        let next = self.all.keys().max().unwrap() + 1;
        self.set(next, Kernel::Serving);
        next
    }

    /// Executes a request or its repetition; a dead kernel does not answer.
    pub(crate) fn ask(&mut self, request: Request, committed: bool) -> Option<Event> {
        let side = request.side();
        let state = self.state(generation(side));
        if state == Kernel::Dead {
            return None;
        }
        if side == Side::Source && self.session_over && request != Request::Resume {
            return Some(Event::Refused(side, "no such session".to_owned()));
        }
        Some(match request {
            Request::Prepare(side) => Event::Prepared(side),
            Request::Negotiate(side) => Event::Offered(side, offer()),
            Request::Round if !self.alive(OLD) => return None,
            Request::Round => Event::RoundApplied {
                sent_bytes: 1 << 20,
                dirty_bytes: 0,
                took: Duration::from_millis(1),
            },
            Request::Validate => Event::Report(vec![passed()]),
            Request::Freeze => {
                self.set(OLD, Kernel::Frozen);
                Event::Frozen(DIGEST)
            }
            Request::Activate => Event::Activated(DIGEST),
            Request::Serve => {
                assert!(committed, "SERVE before the commit record");
                self.set(NEW, Kernel::Serving);
                Event::Serving
            }
            Request::Retire => {
                assert!(committed, "RETIRE before the commit record");
                self.set(OLD, Kernel::Dead);
                Event::Retired
            }
            Request::Resume => {
                assert!(
                    !self.alive(NEW),
                    "the source kernel resumes beside the new one"
                );
                self.session_over = true;
                self.set(OLD, Kernel::Serving);
                Event::SourceRunning
            }
        })
    }
}

fn offer() -> Offer {
    Offer {
        providers: vec![ProviderOffer {
            provider: StateProvider::Cooperative,
            memory_bytes: 0,
            dirty_bytes_per_s: 0,
            state_kinds: capability::MEMORY,
            modes: capability::ROUNDS,
            state_version: 1,
            why_not: String::new(),
        }],
        ..Offer::default()
    }
}

fn passed() -> Check {
    Check {
        name: "index".to_owned(),
        result: CheckResult::Passed,
        duration_us: 1,
        detail: String::new(),
    }
}
