//! Self-tests: immediate checks, and the last result.

mod checks;

use std::path::PathBuf;

use crate::model::{Command, Failure, FailureKind, OperationKind};
use actix::prelude::*;
use futures_util::future::join_all;

use super::Supervisor;
use crate::generation::choose_kernel;
use crate::instance::GetStatus;
use crate::platform::events::Draft;
use crate::platform::journal::{Change, Record};
use checks::{DOCTOR_NAME, Doctor, Fleet};

/// Begins a self-test of captures. Returns the operation's id.
#[derive(Debug, Message)]
#[rtype(result = "Result<String, Failure>")]
pub struct BeginDoctor {
    /// The kernel image to test with (default: that of the first instance, else the host's own).
    pub kernel: Option<PathBuf>,
    /// The caller.
    pub uid: Option<u32>,
}

impl Handler<BeginDoctor> for Supervisor {
    type Result = ResponseActFuture<Self, Result<String, Failure>>;

    fn handle(&mut self, begin: BeginDoctor, _: &mut Self::Context) -> Self::Result {
        let refused = self.refuse_doctor();
        let others = self.running();
        let work = async move {
            let cmdline = refused?;
            let kernel = match begin.kernel {
                Some(kernel) => kernel,
                None => {
                    let asked = join_all(others.iter().map(|other| other.send(GetStatus))).await;
                    let mut used = asked.into_iter().flatten();
                    used.next()
                        .map_or_else(host_kernel, |status| Ok(status.kernel.path))?
                }
            };
            // An unreadable kernel is the caller's mistake and says nothing about captures.
            choose_kernel(&kernel, cmdline.to_owned(), None).await?;
            Ok((cmdline, kernel))
        };
        Box::pin(work.into_actor(self).map(move |chosen, act, ctx| {
            let (cmdline, kernel) = chosen?;
            let operations = act.services.platform.operations.clone();
            let operation = operations.begin(OperationKind::Doctor, DOCTOR_NAME, begin.uid)?;
            let id = operation.id();
            let doctor = Doctor {
                services: act.services.clone(),
                fleet: Fleet {
                    spawn: ctx.address().recipient(),
                    find: ctx.address().recipient(),
                    policies: ctx.address().recipient(),
                    recoveries: ctx.address().recipient(),
                },
                kernel,
                cmdline,
                operation,
            };
            act.doctor_runs = true;
            ctx.spawn(doctor.run().into_actor(act).map(|report, act, _| {
                act.doctor_runs = false;
                let text = match &report.reason {
                    None => "self-test passed: a failed instance is captured".to_owned(),
                    Some(reason) => format!("self-test failed: {reason}"),
                };
                let draft = Draft::daemon(text).with(serde_json::json!(report));
                act.services.platform.events.publish(draft);
                act.last_doctor = Some(report.clone());
                let written = Record(vec![Change::Doctor(Box::new(report))]);
                act.services.platform.journal.do_send(written);
            }));
            Ok(id)
        }))
    }
}

impl Supervisor {
    /// Returns the command-line option that the test's kernel needs, or the reason why the test cannot run now.
    fn refuse_doctor(&self) -> Result<&'static str, Failure> {
        self.refuse_while_stopping()?;
        let backend = &self.services.backend();
        let Some(cmdline) = backend.panic_cmdline() else {
            let kind = backend.kind();
            let why = kind.untested();
            let text = format!("the {} backend {}", kind.as_str(), why.reason);
            let kind = match why.planned {
                true => FailureKind::NotImplemented,
                false => FailureKind::WrongState,
            };
            return Err(Failure::new(kind, text));
        };
        if self.doctor_runs || self.instances.contains_key(DOCTOR_NAME) {
            let text = format!("a self-test is under way, or its instance {DOCTOR_NAME} is left");
            return Err(Failure::new(FailureKind::WrongState, text).hint(
                Command::WaitForSelfTest {
                    instance: DOCTOR_NAME.to_owned(),
                },
            ));
        }
        Ok(cmdline)
    }
}

/// Returns the image of the host's kernel, at the usual path of distributions.
fn host_kernel() -> Result<PathBuf, Failure> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let path = PathBuf::from(format!("/boot/vmlinuz-{}", release.trim()));
    if path.is_file() {
        return Ok(path);
    }
    let text =
        format!("there is no kernel to test with: no instance has one, and {path:?} is not a file");
    Err(Failure::new(FailureKind::InvalidRequest, text).hint("name one with --kernel"))
}
