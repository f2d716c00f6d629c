//! Rules that must hold once everything is idle, whatever the run did. `machine` and `backend` check the rules that
//! must hold at every moment.

use std::path::Path;

use kmorph_actors::model::shown::InstanceSummary;
use kmorph_actors::model::{OperationState, RecoveryOutcome, RecoveryRecord, VmcorePolicy};
use kmorph_actors::supervisor::{GetDaemon, GetRecoveries, List};
use kmorph_vmcore::Dump;
use kmp_proto::instance::Condition;

use crate::daemon::Daemon;
use crate::ports;
use crate::run::{NAMES, STEADY, World, rests};

impl World {
    /// Each instance serves, or rests for a reason, and nothing is left over.
    pub(crate) async fn check(&mut self, daemon: &Daemon, dir: &Path, panics: u64) {
        let all = daemon.supervisor.send(List).await.unwrap();
        for instance in &all {
            self.check_instance(instance);
        }
        let operations = daemon.services.platform.operations.list();
        for operation in operations
            .iter()
            .filter(|o| o.state == OperationState::Running)
        {
            let text = format!("{:?} of {} never ends", operation.kind, operation.instance);
            self.broken.push(text);
        }
        let status = daemon.supervisor.send(GetDaemon).await.unwrap();
        if status.actor_restarts > panics {
            let text = format!(
                "{} actors panicked, asked were {panics}",
                status.actor_restarts
            );
            self.broken.push(text);
        }
        let names: Vec<_> = all.iter().map(|i| i.name.as_str()).collect();
        self.nothing_is_left(daemon, &names);
        self.ports_are_kept(daemon, &all).await;
        self.memories_are_captured(daemon, dir).await;
    }

    fn check_instance(&mut self, instance: &InstanceSummary) {
        let (name, state) = (&instance.name, instance.condition);
        let mut broken = |text: String| self.broken.push(text);
        if !rests(state) {
            broken(format!("{name} is {state:?} in the end"));
        }
        let serves = matches!(state, Condition::Running | Condition::Degraded);
        let key = (name.clone(), instance.generation);
        let lives = self.machine.with(&key, |k| k.alive && !k.hangs);
        if serves && lives != Some(true) {
            broken(format!("{name} is said to run, and does not"));
        }
        if serves && !self.machine.state_is_kept(name) {
            broken(format!("{name} has lost what it acknowledged"));
        }
        let stopped = self.machine.with(&key, |k| k.alive && k.stopped);
        if serves && stopped == Some(true) {
            broken(format!("{name} is left standing still"));
        }
    }

    /// Each live generation belongs to an instance, and only generations that live or rest hold resources of the pool.
    fn nothing_is_left(&mut self, daemon: &Daemon, names: &[&str]) {
        for (name, generation) in self.machine.living() {
            if !names.contains(&name.as_str()) {
                let text = format!("{name} {generation} is left, and nobody's");
                self.broken.push(text);
            }
        }
        for (name, generation) in daemon
            .services
            .generations
            .resources
            .pool
            .borrow()
            .holders()
        {
            if !names.contains(&name.as_str()) {
                let text = format!("{name} {generation} holds what it was given, and is nobody's");
                self.broken.push(text);
            }
        }
    }

    /// A daemon holds the ports of its instances, and no others. A port accepts connections if a generation serves, and
    /// refuses them if no live generation is left, unless the daemon could not make sure of that.
    async fn ports_are_kept(&mut self, daemon: &Daemon, all: &[InstanceSummary]) {
        let hold = daemon.services.platform.settings.borrow().port_hold;
        let rest = all.iter().any(|i| i.condition != Condition::Running);
        if rest {
            tokio::time::sleep(2 * hold).await;
        }
        for name in NAMES {
            let Some(port) = self.machine.port_of(name) else {
                continue;
            };
            let Some(instance) = all.iter().find(|instance| instance.name == name) else {
                if !ports::is_free(port) {
                    self.broken
                        .push(format!("{name} is gone, and its port is held"));
                }
                continue;
            };
            let generations = self.machine.living();
            let lives = generations.iter().any(|(owner, _)| owner == name);
            if let Some(missing) = daemon
                .services
                .generations
                .resources
                .ports
                .publisher
                .borrow()
                .missing(name)
                && (!lives || instance.condition == Condition::Running)
            {
                self.broken
                    .push(format!("{name} has lost its port: {missing}"));
                continue;
            }
            let taken = ports::takes_connections(port);
            if instance.condition == Condition::Running && !taken {
                self.broken
                    .push(format!("{name} runs, and its port refuses"));
            }
            let unsure = instance.condition == Condition::OperatorActionNeeded;
            if !lives && taken && !unsure {
                let text = format!("nothing of {name} runs, and connections to its port wait");
                self.broken.push(text);
            }
        }
    }

    /// Each file named as a vmcore is valid; and where the policy required a vmcore, no recovery proceeded without one.
    async fn memories_are_captured(&mut self, daemon: &Daemon, dir: &Path) {
        let kept = NAMES.map(|name| dir.join("vmcore").join(name));
        for dir in kept.into_iter().chain([dir.join("by-hand")]) {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                let vmcore = path.extension().is_some_and(|end| end == "vmcore");
                if vmcore && !matches!(Dump::open(&path), Ok(Ok(_))) {
                    self.broken.push(format!("{} is no vmcore", path.display()));
                }
            }
        }
        if self.setup.vmcore != VmcorePolicy::Required {
            return;
        }
        let recoveries = daemon.supervisor.send(GetRecoveries).await.unwrap();
        // A recovery whose daemon died first is followed by another recovery of the same generation.
        let went_on = |recovery: &RecoveryRecord| match recovery.outcome {
            RecoveryOutcome::Recovered | RecoveryOutcome::Quarantined => true,
            RecoveryOutcome::Failed => recovery.new_generation.is_some(),
            RecoveryOutcome::Running | RecoveryOutcome::OperatorActionNeeded => false,
        };
        let of_steady = || recoveries.iter().filter(|r| r.instance == STEADY);
        for recovery in of_steady().filter(|r| went_on(r) && r.cause != "workload_failed") {
            let failed = recovery.failed_generation;
            let key = (recovery.instance.clone(), failed);
            // If this or an earlier recovery found no generation, an even earlier recovery had released it, and ended
            // before it could report the captured memory.
            let found = !of_steady()
                .filter(|r| r.failed_generation == failed)
                .any(|r| r.fence.as_deref() == Some("nothing_found"));
            let ran = found && self.machine.with(&key, |_| ()).is_some();
            // An earlier recovery whose daemon or actor ended too soon may have captured the memory.
            let captured = of_steady()
                .filter(|r| r.failed_generation == failed)
                .any(|r| r.vmcore.as_ref().is_some_and(|v| v.path.is_some()));
            if ran && !captured {
                let text = format!("{STEADY} was recovered without the vmcore: {recovery:?}");
                self.broken.push(text);
            }
        }
    }
}
