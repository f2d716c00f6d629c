//! Self-tests: what is refused at once, and what is remembered.

use std::path::PathBuf;

use actix::prelude::*;
use futures_util::future::join_all;
use kmorph_backends::contract::BackendKind;
use kmorph_control_api::{ApiError, DoctorRequest, ErrorCode, OperationKind};

use super::Supervisor;
use crate::doctor::{DOCTOR_NAME, Doctor};
use crate::events::Draft;
use crate::instance::GetStatus;
use crate::journal::{Change, Record};

/// Begin a self-test of capturing; the operation's id.
#[derive(Debug, Message)]
#[rtype(result = "Result<String, ApiError>")]
pub struct BeginDoctor {
    /// With which kernel.
    pub request: DoctorRequest,
    /// The caller.
    pub uid: Option<u32>,
}

impl Handler<BeginDoctor> for Supervisor {
    type Result = ResponseActFuture<Self, Result<String, ApiError>>;

    fn handle(&mut self, begin: BeginDoctor, _: &mut Self::Context) -> Self::Result {
        let refused = self.refuse_doctor();
        let others = self.running();
        let work = async move {
            let cmdline = refused?;
            let kernel = match begin.request.kernel {
                Some(kernel) => PathBuf::from(kernel),
                None => {
                    let asked = join_all(others.iter().map(|other| other.send(GetStatus))).await;
                    let mut used = asked.into_iter().flatten();
                    used.next()
                        .map_or_else(host_kernel, |status| Ok(status.kernel_path.into()))?
                }
            };
            Ok((cmdline, kernel))
        };
        Box::pin(work.into_actor(self).map(move |chosen, act, ctx| {
            let (cmdline, kernel) = chosen?;
            let operations = act.services.operations.clone();
            let operation = operations.begin(OperationKind::Doctor, DOCTOR_NAME, begin.uid)?;
            let id = operation.id();
            let doctor = Doctor {
                services: act.services.clone(),
                supervisor: ctx.address(),
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
                act.services.events.publish(draft);
                act.last_doctor = Some(report.clone());
                let written = Record(vec![Change::Doctor(Box::new(report))]);
                act.services.journal.do_send(written);
            }));
            Ok(id)
        }))
    }
}

impl Supervisor {
    /// What a kernel's command line needs for the test, unless it cannot be made now.
    fn refuse_doctor(&self) -> Result<&'static str, ApiError> {
        self.refuse_while_stopping()?;
        let backend = &self.services.backend;
        let Some(cmdline) = backend.panic_cmdline() else {
            let kind = backend.kind();
            let kind_text = kind.as_str();
            return Err(match kind {
                BackendKind::Multikernel => ApiError::new(
                    ErrorCode::NotImplemented,
                    format!(
                        "the {kind_text} backend has no self-test yet: it has no kernel panic by request"
                    ),
                ),
                BackendKind::Embedded | BackendKind::Qemu => ApiError::new(
                    ErrorCode::WrongState,
                    format!(
                        "the {kind_text} backend captures no memory, so there is nothing to test"
                    ),
                ),
            });
        };
        if self.doctor_runs || self.instances.contains_key(DOCTOR_NAME) {
            let text = format!("a self-test is under way, or its instance {DOCTOR_NAME} is left");
            return Err(ApiError::new(ErrorCode::WrongState, text).hint(format!(
                "wait for it, or `kmorphctl terminate {DOCTOR_NAME}`"
            )));
        }
        Ok(cmdline)
    }
}

/// The image of the kernel that the host runs, where distributions put it.
fn host_kernel() -> Result<PathBuf, ApiError> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let path = PathBuf::from(format!("/boot/vmlinuz-{}", release.trim()));
    if path.is_file() {
        return Ok(path);
    }
    let text =
        format!("there is no kernel to test with: no instance has one, and {path:?} is no file");
    Err(ApiError::new(ErrorCode::InvalidRequest, text).hint("name one with --kernel"))
}
