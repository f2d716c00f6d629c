//! Commands of operators: the requests that the API would send to the actors.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use actix::Addr;
use kmorph_actors::instance::{
    BeginMorph, CaptureVmcore, CommandKind, GetPolicy, Instance, MorphControl, Recover, Terminate,
};
use kmorph_actors::model::requests::{MorphRequest, PortRequest, SpawnRequest};
use kmorph_actors::model::{OperationKind, PolicyPatch, VmcorePolicy, Workload};
use kmorph_actors::platform::operations::Handle;
use kmorph_actors::supervisor::{ChangePolicies, Find, FindForNewWork, Spawn};
use kmp_proto::morph::CommitLimit;

use crate::coverage::{Command, Watcher};
use crate::daemon::Daemon;
use crate::dice::Dice;
use crate::machine::Machine;

/// Gives commands to one daemon.
#[derive(Clone)]
pub(crate) struct Operator {
    pub(crate) daemon: Daemon,
    pub(crate) machine: Machine,
    pub(crate) watcher: Rc<RefCell<Watcher>>,
    /// Path of the kernel image, which also stands in for the program.
    pub(crate) kernel: String,
    /// Directory for captures.
    pub(crate) dir: PathBuf,
    /// Delay between the journal entry of an operation and its request.
    pub(crate) settles: Duration,
    /// The instance whose vmcore policy does not change.
    pub(crate) steady: &'static str,
}

impl Operator {
    /// Gives a command, and waits until the instance has received it.
    pub(crate) async fn give(&self, command: Command, name: &str, dice: &mut Dice) {
        match command {
            Command::Spawn => self.spawn(name, dice),
            Command::Morph => self.morph(name, dice).await,
            Command::ChangePolicy => self.change_policy(name, dice),
            Command::Terminate | Command::TerminateByForce => {
                let force = command == Command::TerminateByForce;
                self.ask(command, OperationKind::Terminate, name, |operation| {
                    Terminate { force, operation }
                })
                .await;
            }
            Command::Recover => {
                self.ask(command, OperationKind::Recover, name, Recover)
                    .await
            }
            Command::Validate => {
                let kind = CommandKind::Validate;
                self.control(command, OperationKind::MorphValidate, kind, name)
                    .await;
            }
            Command::Commit => {
                let limit = CommitLimit::None;
                let kind = CommandKind::Commit { limit };
                self.control(command, OperationKind::MorphCommit, kind, name)
                    .await;
            }
            Command::RollBack => {
                let kind = CommandKind::Rollback;
                self.control(command, OperationKind::MorphRollback, kind, name)
                    .await;
            }
            Command::Capture => {
                let number = dice.next();
                let output = self.dir.join(format!("{number:016x}.vmcore"));
                self.ask(command, OperationKind::VmcoreCapture, name, |operation| {
                    CaptureVmcore { output, operation }
                })
                .await;
            }
        }
    }

    fn given(&self, command: Command, name: &str) {
        self.watcher.borrow_mut().given(command, name);
    }

    async fn control(
        &self,
        command: Command,
        operation: OperationKind,
        kind: CommandKind,
        name: &str,
    ) {
        self.ask(command, operation, name, |operation| MorphControl {
            kind,
            operation,
        })
        .await;
    }

    async fn ask<M>(
        &self,
        command: Command,
        operation: OperationKind,
        name: &str,
        message: impl FnOnce(Handle) -> M,
    ) where
        M: actix::Message + Send + 'static,
        M::Result: Send,
        Instance: actix::Handler<M>,
    {
        let Some(instance) = self.find(name).await else {
            return;
        };
        let operations = &self.daemon.services.platform.operations;
        let Ok(operation) = operations.begin(operation, name, None) else {
            return;
        };
        if !self.settles.is_zero() {
            tokio::time::sleep(self.settles).await;
        }
        if matches!(
            command,
            Command::Terminate | Command::TerminateByForce | Command::Recover
        ) {
            // From here on, the serving generation may end.
            self.machine.ending(name, true);
        }
        self.given(command, name);
        instance.do_send(message(operation));
    }

    async fn find(&self, name: &str) -> Option<Addr<Instance>> {
        let found = self.daemon.supervisor.send(Find(name.to_owned())).await;
        found.ok()?.ok()
    }

    fn spawn(&self, name: &str, dice: &mut Dice) {
        let port = self.machine.port_of(name);
        let publish = port.map(|port| PortRequest {
            address: port.ip(),
            host_port: port.port(),
            port: 6379,
        });
        let workload = dice.percent(60).then(|| Workload {
            program: self.kernel.clone(),
            args: Vec::new(),
            env: Default::default(),
            env_file: None,
        });
        let request = SpawnRequest {
            kernel: self.kernel.clone().into(),
            name: name.to_owned(),
            cpus: 1,
            memory_bytes: None,
            kernel_cmdline: String::new(),
            initramfs: None,
            workload,
            publish: publish.into_iter().collect(),
            monitor: true,
            heartbeat_timeout_s: None,
        };
        self.given(Command::Spawn, name);
        self.daemon.supervisor.do_send(Spawn {
            request,
            uid: None,
            throw_away: false,
        });
    }

    async fn morph(&self, name: &str, dice: &mut Dice) {
        let auto = dice.percent(60);
        let validate = auto || dice.percent(50);
        self.begin_morph(name, auto, validate).await;
    }

    /// Starts a morph that proceeds automatically to its commit, or to its validation.
    pub(crate) async fn begin_morph(&self, name: &str, auto: bool, validate: bool) {
        let request = MorphRequest {
            kernel: self.kernel.clone().into(),
            kernel_cmdline: None,
            initramfs: None,
            auto_validate: validate,
            auto_commit: auto,
            force: true,
            downtime_budget_us: None,
        };
        let find = FindForNewWork(name.to_owned());
        if let Ok(Ok(instance)) = self.daemon.supervisor.send(find).await {
            self.given(Command::Morph, name);
            instance.do_send(BeginMorph { request, uid: None });
        }
    }

    /// Disables auto-heal for an instance, and waits until the change is in force.
    pub(crate) async fn auto_heal_off(&self, name: &str) {
        let patch = PolicyPatch {
            auto_heal: Some(false),
            ..PolicyPatch::default()
        };
        let changes = [(name.to_owned(), patch)].into();
        let _ = self.daemon.supervisor.send(ChangePolicies(changes)).await;
    }

    /// Makes the actor of an instance panic, if the run allows that.
    pub(crate) async fn panic(&self, name: &str) {
        if let Some(instance) = self.find(name).await {
            instance.do_send(GetPolicy);
        }
    }

    fn change_policy(&self, name: &str, dice: &mut Dice) {
        let captures = self.machine.inner().make.captures && name != self.steady;
        let vmcore = match dice.below(3) {
            0 => VmcorePolicy::Off,
            1 => VmcorePolicy::On,
            _ => VmcorePolicy::Required,
        };
        let patch = PolicyPatch {
            auto_heal: Some(dice.percent(70)),
            vmcore: captures.then_some(vmcore),
            ..PolicyPatch::default()
        };
        self.given(Command::ChangePolicy, name);
        let changes = [(name.to_owned(), patch)].into();
        self.daemon.supervisor.do_send(ChangePolicies(changes));
    }
}
