//! The instance's end of the daemon's connections.
//!
//! The agent serves one heartbeat connection, one control connection and one bulk connection of each kind. A new
//! connection replaces the old one, because the daemon reconnects before the agent notices that the old connection is
//! dead. The first frame of a bulk connection determines its kind: morph or capture. A separate task answers
//! heartbeats and waits for nothing.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kmp_proto::codec::Frame;
use kmp_proto::message::{
    Channel, Health, HealthStatus, HealthStatusFixed, HeartbeatReq, HeartbeatRsp,
    HeartbeatRspFixed, Message, MorphPrepare, PeerRole, RecoverComplete, RecoverReclaim,
    RecoverReply, RetryAfter, TopologyParts, WorkloadState,
};
use kmp_proto::wire::ErrorCode;
use kmp_transport::connection::{Connection, ConnectionError, FrameWriter};
use slog::{Logger, debug, info, warn};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::figures::Sampler;
use crate::morph::Morphs;
use crate::priority::Scheduling;
use crate::pulse::Pulses;
use crate::refusal::Refusal;
use crate::topology::Topology;
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

/// The state that every connection needs.
#[derive(Clone, Debug)]
pub struct Served {
    /// The instance's name.
    pub instance: String,
    /// The program.
    pub workload: Workload,
    /// The morphs.
    pub morphs: Morphs,
    /// The daemon's messages so far.
    pub said: Said,
    /// The topology file.
    pub topology: Topology,
    /// The pulses of its CPUs.
    pub pulses: Pulses,
    /// How threads are scheduled that are not the agent's own.
    pub scheduling: Scheduling,
    /// The log.
    pub log: Logger,
}

/// The daemon's messages on earlier connections and on this one. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Said {
    /// The newest session of a morph; 0 before the first.
    session: Arc<AtomicU64>,
    /// Parts of the topology received so far.
    topology: Arc<Mutex<TopologyParts>>,
}

impl Said {
    /// Sessions only grow: an older one is over, whatever became of it.
    fn begin_session(&self, prepare: &MorphPrepare) -> Result<(), Refusal> {
        let newest = self.session.fetch_max(prepare.session, Ordering::Relaxed);
        if newest <= prepare.session {
            return Ok(());
        }
        let text = format!(
            "session {} is over: session {newest} has started",
            prepare.session
        );
        Err(Refusal::new(ErrorCode::UnexpectedInState, text))
    }

    /// Takes a part of a topology; all of it, when this was the last.
    fn take_part(&self, part: &RecoverComplete) -> Result<Option<RecoverComplete>, Refusal> {
        let mut parts = self.topology.lock().unwrap_or_else(PoisonError::into_inner);
        parts
            .take(part.clone())
            .map_err(|error| Refusal::new(ErrorCode::UnexpectedInState, error.to_string()))
    }
}

/// Serves identified connections until the channel closes.
pub async fn serve(mut connections: mpsc::Receiver<Connection>, served: Served, figures: Sampler) {
    let figures = Arc::new(tokio::sync::Mutex::new(figures));
    let (mut heartbeat, mut control) = (None::<AbortHandle>, None::<AbortHandle>);
    let mut bulk = Bulk::new(served.clone());
    let mut daemon = 0;
    loop {
        let task = tokio::select! {
            connection = connections.recv() => {
                let Some(connection) = connection else { return };
                let channel = connection.hello.fixed.channel;
                debug!(served.log, "connection"; "channel" => channel.as_str());
                let incarnation = connection.hello.fixed.incarnation;
                if incarnation > daemon {
                    // An older daemon can no longer command through its open connections.
                    daemon = incarnation;
                    let older = [heartbeat.take(), control.take()].into_iter().flatten();
                    older.chain(bulk.all()).for_each(|task| task.abort());
                } else if incarnation < daemon {
                    // It was let in before the newer one had proved itself.
                    continue;
                }
                let task = match channel {
                    Channel::Heartbeat => {
                        let (workload, figures) = (served.workload.clone(), figures.clone());
                        let pulses = served.pulses.clone();
                        replace(&mut heartbeat, async move {
                            let mut figures = figures.lock().await;
                            answer_heartbeats(connection, &workload, &mut figures, &pulses).await
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

    /// Every connection that there is.
    fn all(&mut self) -> impl Iterator<Item = AbortHandle> {
        let decided = [self.morph.take(), self.capture.take()];
        // Those that have just decided end with the channel that they wait in.
        while self.decided.try_recv().is_ok() {}
        std::mem::take(&mut self.undecided)
            .into_iter()
            .chain(decided.into_iter().flatten())
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
            let (reader, writer) = (&mut connection.reader, &mut connection.writer);
            let first = loop {
                let frame = reader.next_or_tell(writer).await?;
                heed(&frame, writer, Channel::Bulk)?;
                match objection(&frame, &connection.features, Channel::Bulk).or(undecided(&frame)) {
                    None => break frame,
                    Some(refusal) => refuse(writer, &frame, Channel::Bulk, refusal).await?,
                }
            };
            let _ = decide.send((connection, first)).await;
            Ok(())
        });
        self.undecided.push_back(task.abort_handle());
        task
    }

    fn serve(&mut self, connection: Connection, first: Frame) -> Task {
        if matches!(first.message, Message::VmcoreStart(_)) {
            let sysfs = SYSFS.into();
            let work = crate::capture::serve(connection, first, sysfs, self.served.scheduling);
            return replace(&mut self.capture, work);
        }
        let morphs = self.served.morphs.clone();
        let work = crate::rounds::serve(connection, first, morphs);
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

/// The protocol tables' objection to a frame on this channel, independent of its content.
fn objection(frame: &Frame, agreed: &u64, channel: Channel) -> Option<Refusal> {
    let message = &frame.message;
    if !message.may_travel(PeerRole::Daemon, channel) {
        let kind = message.msg_type();
        let text = format!("unexpected {kind} on the {} channel", channel.as_str());
        return Some(Refusal::new(ErrorCode::UnexpectedInState, text));
    }
    let missing = message.needs() & !agreed;
    if missing != 0 {
        let text = format!("the features {missing:#x} were not negotiated in HELLO");
        return Some(Refusal::new(ErrorCode::Incompatible, text));
    }
    None
}

/// The objection to a frame as the first of a bulk channel: it belongs to neither a morph nor a capture.
fn undecided(frame: &Frame) -> Option<Refusal> {
    let decides = matches!(
        frame.message,
        Message::VmcoreStart(_) | Message::MorphTransfer(_)
    );
    let text = "a bulk channel must begin with VMCORE_START or MORPH_TRANSFER_STATE";
    (!decides).then(|| Refusal::new(ErrorCode::UnexpectedInState, text))
}

/// Refuses a frame; `Err` when the connection ends with that.
async fn refuse(
    writer: &mut FrameWriter,
    frame: &Frame,
    channel: Channel,
    Refusal { code, text }: Refusal,
) -> Result<(), ConnectionError> {
    writer.refuse(code, frame, text.clone()).await;
    if code.ends(channel) && !frame.message.is_answer() {
        return Err(ConnectionError::Refused { code, text });
    }
    Ok(())
}

/// `Err` when a frame ends the connection: an answer to nothing, or the daemon's last word.
pub(crate) fn heed(
    frame: &Frame,
    writer: &FrameWriter,
    channel: Channel,
) -> Result<(), ConnectionError> {
    writer.check_answer(frame, PeerRole::Daemon, channel)?;
    match &frame.message {
        Message::Error(error) if error.code.ends(channel) => Err(ConnectionError::Refused {
            code: error.code,
            text: error.text.clone(),
        }),
        _ => Ok(()),
    }
}

async fn answer_heartbeats(
    connection: Connection,
    workload: &Workload,
    figures: &mut Sampler,
    pulses: &Pulses,
) -> Result<(), ConnectionError> {
    let (mut reader, mut writer) = (connection.reader, connection.writer);
    loop {
        let frame = reader.next_or_tell(&mut writer).await?;
        heed(&frame, &writer, Channel::Heartbeat)?;
        let Message::HeartbeatReq(request) = &frame.message else {
            let text = "a heartbeat channel carries only heartbeats";
            let refusal = Refusal::new(ErrorCode::UnexpectedInState, text);
            refuse(&mut writer, &frame, Channel::Heartbeat, refusal).await?;
            continue;
        };
        let answer = Message::HeartbeatRsp(HeartbeatRsp {
            fixed: heartbeat(*request, &workload.condition(), figures),
            stall: pulses.stall(),
        });
        writer.reply(&answer, frame.header.sequence).await?;
    }
}

fn heartbeat(
    request: HeartbeatReq,
    condition: &Condition,
    figures: &mut Sampler,
) -> HeartbeatRspFixed {
    let sample = figures.figures();
    HeartbeatRspFixed {
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

/// The health of the instance by its workload's state. A starting workload does not work yet: a
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
        // This agent knows each state that it enters.
        WorkloadState::Other(_) => Health::Degraded,
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
    let Connection {
        mut reader,
        mut writer,
        features,
        ..
    } = connection;
    let (answers, mut ready) = mpsc::channel::<(Frame, Result<Message, Refusal>)>(ANSWERS_MAX);
    let under_way = Arc::new(AtomicU32::new(0));
    let mut changes = served.workload.changes();
    let mut supervised = true;
    let mut told = status(&served.workload.condition());
    writer.send(&told).await?;
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
                heed(&frame, &writer, Channel::Control)?;
                if frame.message.is_answer() {
                    continue;
                }
                if let Some(refusal) = objection(&frame, &features, Channel::Control) {
                    refuse(&mut writer, &frame, Channel::Control, refusal).await?;
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
            Some((frame, answer)) = ready.recv() => {
                give(&mut writer, &frame, answer, &served.log).await?;
            }
            changed = changes.changed(), if supervised => {
                supervised = changed.is_ok();
                let now = status(&changes.borrow_and_update());
                if now != told {
                    writer.send(&now).await?;
                    told = now;
                }
            }
        }
    }
}

/// Gives the answer to a request; `Err` when the connection ends with it.
async fn give(
    writer: &mut FrameWriter,
    frame: &Frame,
    answer: Result<Message, Refusal>,
    log: &Logger,
) -> Result<(), ConnectionError> {
    let refusal = match answer {
        Ok(message) => match writer.reply(&message, frame.header.sequence).await {
            // Nothing of it was written: the daemon learns why it gets no reply.
            Err(ConnectionError::Encode(error)) => {
                Refusal::new(ErrorCode::Internal, error.to_string())
            }
            given => return given,
        },
        Err(refusal) => refusal,
    };
    warn!(log, "request refused"; "type" => frame.header.msg_type.name(),
        "code" => refusal.code.text(), "reason" => &refusal.text);
    refuse(writer, frame, Channel::Control, refusal).await
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
            Message::RecoverReclaim(notice) => reclaim(notice, &self.instance),
            Message::RecoverComplete(notice) => {
                let reply = Message::RecoverCompleteReply(done(notice.fixed.recovery));
                let Some(whole) = self.said.take_part(notice)? else {
                    return Ok(reply);
                };
                match self.topology.write(whole).await {
                    Ok(()) => Ok(reply),
                    Err(error) => refuse(ErrorCode::Internal, &error.to_string()),
                }
            }
            Message::MorphPrepare(prepare) => {
                self.said.begin_session(prepare)?;
                self.morphs.answer(message).await
            }
            Message::MorphNegotiate(_)
            | Message::MorphTransfer(_)
            | Message::MorphValidate(_)
            | Message::MorphCommit(_)
            | Message::MorphRollback(_) => self.morphs.answer(message).await,
            _ => refuse(
                ErrorCode::UnexpectedInState,
                "not a request that an instance answers",
            ),
        }
    }
}

/// Lets go of what is shared with a generation, when that is the one certified as fenced. An instance that
/// is told so of itself runs, so the certificate is not of what it says.
fn reclaim(notice: &RecoverReclaim, own: &str) -> Result<Message, Refusal> {
    let (failed, fenced) = (notice.fixed.failed_generation, notice.fence.generation);
    let refuse = |text: String| Err(Refusal::new(ErrorCode::NotFenced, text));
    if failed != fenced {
        return refuse(format!(
            "the certificate is for generation {fenced}, but generation {failed} has failed"
        ));
    }
    if notice.instance == own {
        return refuse(format!("{own} is this instance, which is running"));
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
mod tests;
