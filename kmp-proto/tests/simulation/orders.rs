//! Execution of the orders of the engines: requests to kernels, records in the journal, work of the backend.

use kmp_proto::detector::{self, Detector};
use kmp_proto::message::Side;
use kmp_proto::morph::{self, Outcome};
use kmp_proto::recovery::{self, Afterwards};

use super::{CAPTURE, Happening, LOCAL_MS, Local, World};
use crate::kernels::{NEW, OLD, Request, generation};

impl World {
    fn ask(&mut self, request: Request) {
        self.count += 1;
        let id = self.count;
        self.daemon.as_mut().unwrap().waiting.insert(id, request);
        self.send(&Happening::Asked(id, request));
        self.at(request.patience_ms(), Happening::Overdue(self.life, id));
    }

    fn have(&mut self, local: Local) {
        self.daemon.as_mut().unwrap().under_way.push(local);
        self.at(LOCAL_MS, Happening::Done(self.life, local));
    }

    pub(super) fn do_morph(&mut self, action: morph::Action) {
        use morph::Action;
        match action {
            Action::Prepare(side) => self.ask(Request::Prepare(side)),
            Action::Negotiate(side) => self.ask(Request::Negotiate(side)),
            Action::Round { .. } => self.ask(Request::Round),
            Action::Validate => self.ask(Request::Validate),
            Action::Transferred => unreachable!("nobody asked to hold"),
            Action::Committable(_) => {
                self.tell_morph(morph::Event::CommitRequested {
                    limit: morph::CommitLimit::None,
                    or_roll_back: false,
                });
            }
            Action::Freeze => self.ask(Request::Freeze),
            Action::Activate => self.ask(Request::Activate),
            Action::WriteCommitRecord(_) => self.have(Local::Record),
            Action::Serve(_) => self.ask(Request::Serve),
            Action::Retire => self.ask(Request::Retire),
            Action::ResumeSource(_) => self.ask(Request::Resume),
            Action::Fence(side, order) => {
                assert_eq!(order.generation(), generation(side));
                assert_eq!(
                    side == Side::Source,
                    self.journal.committed,
                    "{side:?} is fenced"
                );
                self.have(Local::FenceOf(order.generation()));
            }
            Action::Finished(outcome) => self.finished(outcome),
            Action::Chosen(_) | Action::Phase(_) | Action::CommitRefused(_) => {}
        }
    }

    fn finished(&mut self, outcome: Outcome) {
        let daemon = self.daemon.as_mut().unwrap();
        daemon.morph = None;
        daemon.waiting.clear();
        let (current, failed) = match &outcome {
            Outcome::Committed => (NEW, false),
            Outcome::CommittedButFailed(_) => (NEW, true),
            Outcome::RolledBack(_) => (OLD, false),
            Outcome::SourceFailed { .. } => (OLD, true),
            Outcome::OperatorActionNeeded { why, .. } => panic!("{why}"),
        };
        daemon
            .watches
            .retain(|generation, _| *generation == current);
        let judged = |watch: &Detector| watch.phase() == "failed";
        let failed = failed || daemon.watches.get(&current).is_none_or(judged);
        self.journal.outcome = Some(outcome);
        self.journal.current = Some(current);
        if failed {
            self.recover(current);
        }
    }

    fn recover(&mut self, failed: u64) {
        self.journal.recovering = Some((failed, None));
        let daemon = self.daemon.as_mut().unwrap();
        daemon.watches.remove(&failed);
        daemon.recovery = Some(recovery::Engine::new(failed, CAPTURE, Afterwards::Respawn));
    }

    pub(super) fn do_recovery(&mut self, action: recovery::Action) {
        use recovery::Action;
        match action {
            Action::NoticeSurvivors | Action::Complete { .. } => {}
            Action::Fence(order) => self.have(Local::FenceOf(order.generation())),
            Action::Capture(proof) => {
                assert!(!self.kernels.alive(proof.generation()), "captured alive");
                self.have(Local::Captured);
            }
            Action::Reclaim(proof) => {
                assert!(!self.kernels.alive(proof.generation()), "reclaimed alive");
                self.have(Local::Released);
            }
            Action::Respawn(proof) => {
                assert!(!self.kernels.alive(proof.generation()), "two generations");
                self.have(Local::Spawned);
            }
            Action::Finished(outcome) => {
                self.daemon.as_mut().unwrap().recovery = None;
                if outcome != recovery::Outcome::Recovered {
                    let failed = self.journal.current.unwrap();
                    self.recover(failed);
                }
            }
        }
    }

    pub(super) fn do_watch(&mut self, generation: u64, action: detector::Action) {
        use detector::Action;
        let morphing = self.daemon.as_ref().unwrap().morph.is_some();
        let recovering = self.daemon.as_ref().unwrap().recovery.is_some();
        match action {
            Action::SendProbe { probe } => self.send(&Happening::Probed(generation, probe)),
            Action::Healthy if morphing && generation == NEW => {
                self.tell_morph(morph::Event::TargetHealthy);
            }
            Action::Healthy if recovering => {
                self.tell_recovery(recovery::Event::SuccessorHealthy { generation });
            }
            Action::Failed(_) if morphing => {
                let side = if generation == OLD {
                    Side::Source
                } else {
                    Side::Target
                };
                self.tell_morph(morph::Event::Died(side, "by its detector".to_owned()));
            }
            Action::Failed(_) if recovering => {
                let text = "it did not start".to_owned();
                self.tell_recovery(recovery::Event::SuccessorFailed(text));
            }
            Action::Failed(_) => self.recover(generation),
            _ => {}
        }
    }
}
