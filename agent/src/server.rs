//! The instance's end of the daemon's connections.
//!
//! One heartbeat, one control and one bulk connection of each kind are served at a time; a newer one takes the place of
//! the older, because the daemon reconnects before this side has noticed that the old one is dead. What kind a bulk
//! connection is, a morph's or a capture's, its first frame says. Heartbeats are answered on a task of their own and
//! wait for nothing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kmp_proto::codec::Frame;
use kmp_proto::message::{
    Channel, Health, HealthStatus, HealthStatusFixed, HeartbeatReq, HeartbeatRsp, Message,
    RecoverReclaim, RecoverReply, RetryAfter, WorkloadState,
};
use kmp_proto::wire::ErrorCode;
use kmp_transport::connection::{Connection, ConnectionError, FrameReader, FrameWriter};
use slog::{Logger, debug, info, warn};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::figures::Sampler;
use crate::morph::{Morphs, Refusal};
use crate::workload::{Condition, Workload};

/// Requests of one control connection that may be under way.
const REQUESTS_MAX: u32 = 8;
/// Bulk connections that may be there before their first frame; the oldest gives way.
const UNDECIDED_MAX: usize = 4;
/// Answers that may wait to be written.
const ANSWERS_MAX: usize = 16;
/// Where the kernel shows its devices.
const SYSFS: &str = "/sys";
/// When the daemon may come again after too many requests, milliseconds.
const RETRY_AFTER_MS: u32 = 50;

/// Everything a connection needs.
#[derive(Clone, Debug)]
pub struct Served {
    /// The program.
    pub workload: Workload,
    /// The morphs.
    pub morphs: Morphs,
    /// Directory of the topology file.
    pub state_dir: std::path::PathBuf,
    /// The log.
    pub log: Logger,
}

/// Serves identified connections until there are no more.
pub async fn serve(mut connections: mpsc::Receiver<Connection>, served: Served, figures: Sampler) {
    let figures = Arc::new(tokio::sync::Mutex::new(figures));
    let (mut heartbeat, mut control) = (None, None);
    let mut bulk = Bulk::new(served.clone());
    loop {
        let task = tokio::select! {
            connection = connections.recv() => {
                let Some(connection) = connection else { return };
                let channel = connection.hello.fixed.channel;
                debug!(served.log, "connection"; "channel" => channel.as_str());
                let task = match channel {
                    Channel::Heartbeat => {
                        let (workload, figures) = (served.workload.clone(), figures.clone());
                        replace(&mut heartbeat, async move {
                            let mut figures = figures.lock().await;
                            answer_heartbeats(connection, &workload, &mut figures).await
                        })
                    }
                    Channel::Control => replace(&mut control, attend(connection, served.clone())),
                    Channel::Bulk => bulk.wait_for_first(connection),
                };
                (channel, task)
            }
            Some((connection, first)) = bulk.decided.recv() => {
                (Channel::Bulk, bulk.serve(connection, first))
            }
        };
        let (channel, task) = task;
        let log = served.log.clone();
        tokio::spawn(async move {
            if let Ok(Err(error)) = task.await {
                info!(log, "connection ended"; "channel" => channel.as_str(), "reason" => %error);
            }
        });
    }
}

type Task = tokio::task::JoinHandle<Result<(), ConnectionError>>;

/// Bulk connections.
struct Bulk {
    served: Served,
    undecided: VecDeque<AbortHandle>,
    decide: mpsc::Sender<(Connection, Frame)>,
    decided: mpsc::Receiver<(Connection, Frame)>,
    morph: Option<AbortHandle>,
    capture: Option<AbortHandle>,
}

impl Bulk {
    fn new(served: Served) -> Self {
        let (decide, decided) = mpsc::channel(UNDECIDED_MAX);
        Self {
            served,
            undecided: VecDeque::new(),
            decide,
            decided,
            morph: None,
            capture: None,
        }
    }

    fn wait_for_first(&mut self, mut connection: Connection) -> Task {
        self.undecided.retain(|task| !task.is_finished());
        if self.undecided.len() == UNDECIDED_MAX
            && let Some(oldest) = self.undecided.pop_front()
        {
            oldest.abort();
        }
        let decide = self.decide.clone();
        let task = tokio::spawn(async move {
            let first = next(&mut connection.reader, &mut connection.writer).await?;
            let _ = decide.send((connection, first)).await;
            Ok(())
        });
        self.undecided.push_back(task.abort_handle());
        task
    }

    fn serve(&mut self, connection: Connection, first: Frame) -> Task {
        if matches!(first.message, Message::VmcoreStart(_)) {
            let sysfs = SYSFS.into();
            let work = crate::capture::serve(connection, first, sysfs);
            return replace(&mut self.capture, work);
        }
        let (morphs, workload) = (self.served.morphs.clone(), self.served.workload.clone());
        let work = crate::rounds::serve(connection, first, morphs, workload);
        replace(&mut self.morph, work)
    }
}

fn replace(
    place: &mut Option<AbortHandle>,
    work: impl Future<Output = Result<(), ConnectionError>> + Send + 'static,
) -> Task {
    if let Some(older) = place.take() {
        older.abort();
    }
    let task = tokio::spawn(work);
    *place = Some(task.abort_handle());
    task
}

async fn next(
    reader: &mut FrameReader,
    writer: &mut FrameWriter,
) -> Result<Frame, ConnectionError> {
    let frame = reader.next().await;
    if let Err(ConnectionError::Frame(error)) = &frame {
        writer.refuse_stream(*error).await;
    }
    frame
}

async fn answer_heartbeats(
    connection: Connection,
    workload: &Workload,
    figures: &mut Sampler,
) -> Result<(), ConnectionError> {
    let (mut reader, mut writer) = (connection.reader, connection.writer);
    loop {
        let frame = next(&mut reader, &mut writer).await?;
        let Message::HeartbeatReq(request) = &frame.message else {
            let text = "only heartbeats travel on a heartbeat channel".to_owned();
            let code = ErrorCode::UnexpectedInState;
            writer.refuse(code, &frame, text).await;
            continue;
        };
        let answer = heartbeat(*request, &workload.condition(), figures);
        let answer = Message::HeartbeatRsp(answer);
        writer.reply(&answer, frame.header.sequence).await?;
    }
}

fn heartbeat(request: HeartbeatReq, condition: &Condition, figures: &mut Sampler) -> HeartbeatRsp {
    let sample = figures.figures();
    HeartbeatRsp {
        probe: request.probe,
        health: health(condition.state),
        workload: condition.state,
        cpu_count: sample.cpu_count,
        cpu_busy_permille: sample.cpu_busy_permille,
        pressure_cpu: sample.pressure_cpu,
        pressure_memory: sample.pressure_memory,
        pressure_io: sample.pressure_io,
        memory_total_kib: sample.memory_total_kib,
        memory_available_kib: sample.memory_available_kib,
        io_read_bytes: sample.io_read_bytes,
        io_write_bytes: sample.io_write_bytes,
    }
}

/// What a workload's state says of the instance. One that is being started does not work yet: a
/// spawn is complete when its program runs.
fn health(state: WorkloadState) -> Health {
    match state {
        WorkloadState::Starting | WorkloadState::Failed => Health::Unhealthy,
        WorkloadState::Exited => Health::Degraded,
        WorkloadState::None
        | WorkloadState::Running
        | WorkloadState::Awaiting
        | WorkloadState::Frozen
        | WorkloadState::Retired => Health::Healthy,
    }
}

fn status(condition: &Condition) -> Message {
    Message::HealthStatus(HealthStatus {
        fixed: HealthStatusFixed {
            health: health(condition.state),
            workload: condition.state,
            flags: 0,
            exit_status: condition.exit_status,
            restarts: condition.restarts,
        },
        text: condition.text.clone(),
    })
}

/// A control connection: each request on a task of its own, so that a long one holds up none.
async fn attend(connection: Connection, served: Served) -> Result<(), ConnectionError> {
    let (mut reader, mut writer) = (connection.reader, connection.writer);
    let (answers, mut ready) = mpsc::channel::<(Frame, Result<Message, Refusal>)>(ANSWERS_MAX);
    let under_way = Arc::new(AtomicU32::new(0));
    let mut changes = served.workload.changes();
    let mut supervised = true;
    writer.send(&status(&served.workload.condition())).await?;
    loop {
        tokio::select! {
            frame = reader.next() => {
                let frame = match frame {
                    Err(ConnectionError::Frame(error)) => {
                        writer.refuse_stream(error).await;
                        return Err(error.into());
                    }
                    other => other?,
                };
                if frame.message.is_answer() {
                    continue;
                }
                if under_way.load(Ordering::Relaxed) >= REQUESTS_MAX {
                    writer.reply(&busy(&frame), frame.header.sequence).await?;
                    continue;
                }
                under_way.fetch_add(1, Ordering::Relaxed);
                let (served, answers, under_way) =
                    (served.clone(), answers.clone(), under_way.clone());
                tokio::spawn(async move {
                    let answer = served.answer(&frame.message).await;
                    under_way.fetch_sub(1, Ordering::Relaxed);
                    let _ = answers.send((frame, answer)).await;
                });
            }
            Some((frame, answer)) = ready.recv() => match answer {
                Ok(message) => writer.reply(&message, frame.header.sequence).await?,
                Err(Refusal { code, text }) => {
                    warn!(served.log, "request refused"; "type" => frame.header.msg_type.name(),
                        "code" => code.text(), "reason" => &text);
                    writer.refuse(code, &frame, text).await;
                }
            },
            changed = changes.changed(), if supervised => {
                supervised = changed.is_ok();
                let condition = changes.borrow_and_update().clone();
                writer.send(&status(&condition)).await?;
            }
        }
    }
}

fn busy(frame: &Frame) -> Message {
    Message::Retry(RetryAfter {
        retry_after_ms: RETRY_AFTER_MS,
        reason: ErrorCode::Busy,
        offending_type: frame.header.msg_type as u16,
        offending_sequence: frame.header.sequence,
    })
}

impl Served {
    async fn answer(&self, message: &Message) -> Result<Message, Refusal> {
        let refuse = |code, text: &str| {
            let text = text.to_owned();
            Err(Refusal { code, text })
        };
        match message {
            Message::RecoverPrepare(notice) => {
                info!(self.log, "an instance has failed"; "failed" => &notice.instance,
                    "evidence" => &notice.text);
                Ok(Message::RecoverPrepareReply(done(notice.fixed.recovery)))
            }
            Message::RecoverReclaim(notice) => reclaim(notice),
            Message::RecoverComplete(notice) => {
                match crate::topology::write(&self.state_dir, notice) {
                    Ok(_) => Ok(Message::RecoverCompleteReply(done(notice.fixed.recovery))),
                    Err(error) => refuse(
                        ErrorCode::Internal,
                        &format!("writing the topology in {:?}: {error}", self.state_dir),
                    ),
                }
            }
            Message::VmcoreStart(_) | Message::VmcoreData(_) | Message::VmcoreComplete(_) => {
                refuse(
                    ErrorCode::UnexpectedInState,
                    "memory is read on a bulk channel",
                )
            }
            Message::HeartbeatReq(_) => refuse(
                ErrorCode::UnexpectedInState,
                "heartbeats travel on a heartbeat channel",
            ),
            Message::MorphPrepare(_)
            | Message::MorphNegotiate(_)
            | Message::MorphTransfer(_)
            | Message::MorphValidate(_)
            | Message::MorphCommit(_)
            | Message::MorphRollback(_) => self.morphs.answer(message).await,
            _ => refuse(ErrorCode::UnexpectedInState, "not a request to an instance"),
        }
    }
}

/// Lets go of what is shared with a generation, when that is the one certified as fenced.
fn reclaim(notice: &RecoverReclaim) -> Result<Message, Refusal> {
    let (failed, fenced) = (notice.fixed.failed_generation, notice.fence.generation);
    if failed != fenced {
        let text = format!("the certificate is for generation {fenced}, {failed} has failed");
        let code = ErrorCode::NotFenced;
        return Err(Refusal { code, text });
    }
    Ok(Message::RecoverReclaimReply(done(notice.fixed.recovery)))
}

fn done(recovery: u64) -> RecoverReply {
    RecoverReply {
        recovery,
        elapsed_ms: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kmp_proto::message::{FailureCause, FenceClaim, RecoverFixed};

    #[test]
    fn a_certificate_of_another_generation_reclaims_nothing() {
        for (fenced, refused) in [(6, true), (7, false), (8, true)] {
            let notice = RecoverReclaim {
                fixed: RecoverFixed {
                    recovery: 3,
                    failed_generation: 7,
                    cause: FailureCause::KernelDead,
                },
                instance: "db".to_owned(),
                fence: FenceClaim {
                    method: 2,
                    confirmation: 1,
                    flags: 0,
                    generation: fenced,
                    fenced_at_unix_ns: 1,
                },
            };
            let code = reclaim(&notice).err().map(|refusal| refusal.code);
            assert_eq!(code, refused.then_some(ErrorCode::NotFenced));
        }
    }
}
