//! The agent of a simulated kernel: the answers that docs/kmp.md requires of an instance.

use kmp_proto::message::{
    Channel, Check, CheckResult, CommitReply, CommitStep, ErrorInfo, Health, HealthStatus,
    HealthStatusFixed, HeartbeatRsp, HeartbeatRspFixed, Hello, HelloFixed, Message, MorphCommit,
    MorphRollback, MorphTransfer, MorphTransferFixed, NegotiateReply, PRESSURE_ABSENT, PeerRole,
    ProviderOffer, RecoverReply, Reference, RollbackReply, RollbackStatus, SessionReply, Side,
    StateProvider, StepStatus, TransferMode, TransferOp, ValidateReply, ValidateReplyFixed,
    WorkloadState, capability, features, transfer_flags,
};
use kmp_proto::wire::{ErrorCode, VERSION};
use kmp_transport::connection::{Connection, FrameWriter, welcome};
use kmp_transport::link::BoxedLink;
use tokio::sync::watch;

use crate::machine::{Complaint, Kernel, Machine, Part};

type Key = (String, u64);

/// Size of a kernel's whole state, bytes.
const STATE_BYTES: u64 = 8;
/// Polling interval while a kernel is stopped.
const STANDSTILL: std::time::Duration = std::time::Duration::from_millis(50);

fn hello(key: &Key) -> Hello {
    let mut boot_id = [0; 16];
    boot_id[..8].copy_from_slice(&key.1.to_le_bytes());
    boot_id[15] = 1;
    Hello {
        fixed: HelloFixed {
            version_min: VERSION,
            version_max: VERSION,
            role: PeerRole::Instance,
            channel: Channel::Control,
            flags: 0,
            generation: key.1,
            boot_id,
            // One of nine agents runs a version without support for morphs.
            features: if key.1 % 9 == 8 {
                0
            } else {
                features::MORPHS | features::BY_REFERENCE
            },
            session: 0,
            incarnation: 0,
        },
        instance: key.0.clone(),
        kernel_release: "6.1.0-simulated".to_owned(),
        agent_version: "simulated".to_owned(),
        nonce: None,
        proof: None,
    }
}

/// Answers on one link until the link is cut.
pub(crate) async fn serve(
    machine: Machine,
    key: Key,
    link: BoxedLink,
    mut cut: watch::Receiver<u64>,
) {
    cut.mark_unchanged();
    let talk = async {
        let Ok(connection) = welcome(link, hello(&key)).await else {
            return;
        };
        answer_all(&machine, &key, connection).await;
    };
    tokio::select! {
        biased;
        () = talk => {}
        _ = cut.changed() => {}
    }
}

async fn answer_all(machine: &Machine, key: &Key, connection: Connection) {
    let Connection {
        mut reader,
        mut writer,
        hello,
        ..
    } = connection;
    // The agent sends its unsolicited messages over the control channel.
    let mut says = match hello.fixed.channel {
        Channel::Control => machine.says(key),
        _ => None,
    };
    loop {
        let frame = tokio::select! {
            biased;
            complaint = news(&mut says) => {
                if writer.send(&status(complaint)).await.is_err() {
                    return;
                }
                continue;
            }
            frame = reader.next() => frame,
        };
        let Ok(frame) = frame else { return };
        let sequence = frame.header.sequence;
        while machine.with(key, |k| k.stopped).unwrap_or(false) {
            tokio::time::sleep(STANDSTILL).await;
        }
        if let Message::MorphTransfer(transfer) = &frame.message
            && transfer.fixed.mode == TransferMode::Rounds
            && transfer.fixed.op != TransferOp::EndOfRound
        {
            let (wait, refuses) = machine.thinks();
            tokio::time::sleep(wait).await;
            if refuses || carry(machine, key, transfer, &mut writer).await.is_none() {
                return;
            }
            continue;
        }
        let answer = match is_of_a_morph(&frame.message).then(|| machine.thinks()) {
            None => answer(machine, key, frame.message),
            Some((wait, refuses)) => {
                tokio::time::sleep(wait).await;
                match refuses {
                    true => Err("as the seed has it".to_owned()),
                    false => answer(machine, key, frame.message),
                }
            }
        };
        let sent = match answer {
            Ok(answer) => writer.reply(&answer, sequence).await,
            Err(text) => {
                let error = ErrorInfo {
                    code: ErrorCode::UnexpectedInState,
                    offending_type: frame.header.msg_type as u16,
                    offending_sequence: sequence,
                    text,
                };
                writer.reply(&Message::Error(error), sequence).await
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Waits for the next complaint, or for the end of a complaint. Never returns if the link carries no complaints.
async fn news(says: &mut Option<watch::Receiver<Complaint>>) -> Complaint {
    if let Some(says) = says
        && says.changed().await.is_ok()
    {
        return *says.borrow_and_update();
    }
    std::future::pending().await
}

fn is_of_a_morph(message: &Message) -> bool {
    matches!(
        message,
        Message::MorphPrepare(_)
            | Message::MorphNegotiate(_)
            | Message::MorphTransfer(_)
            | Message::MorphValidate(_)
            | Message::MorphCommit(_)
            | Message::MorphRollback(_)
    )
}

/// Returns the message that an agent sends unsolicited when its program's state changes.
fn status(complaint: Complaint) -> Message {
    let (health, workload, text) = match complaint {
        Complaint::None | Complaint::Load => (Health::Healthy, WorkloadState::Running, ""),
        Complaint::Degraded => (Health::Degraded, WorkloadState::Running, "it is not well"),
        Complaint::Ended => (Health::Degraded, WorkloadState::Exited, "it has ended"),
    };
    Message::HealthStatus(HealthStatus {
        fixed: HealthStatusFixed {
            health,
            workload,
            flags: 0,
            exit_status: 0,
            restarts: 0,
        },
        text: text.to_owned(),
    })
}

/// Transfers state by rounds: the source sends the state requested, the target takes the state received. Returns `None`
/// once the channel has ended.
async fn carry(
    machine: &Machine,
    key: &Key,
    transfer: &MorphTransfer,
    writer: &mut FrameWriter,
) -> Option<()> {
    let fixed = MorphTransferFixed {
        total_bytes: STATE_BYTES,
        dirty_bytes: 0,
        ..transfer.fixed
    };
    if fixed.op == TransferOp::Chunk {
        let state = u64::from_le_bytes(transfer.data.as_slice().try_into().ok()?);
        return machine.with(key, |k| k.incoming = state);
    }
    let last = fixed.flags & transfer_flags::FINAL != 0;
    let state = machine.with(key, |k| {
        let frozen = matches!(k.part, Part::Frozen { .. });
        if last && frozen {
            k.part = Part::Frozen { holding: true };
        }
        (last == frozen).then_some(k.state)
    })??;
    let chunk = MorphTransfer::chunk(fixed, state.to_le_bytes().to_vec());
    writer.send(&Message::MorphTransfer(chunk)).await.ok()?;
    let changed = machine.with(key, |k| k.state != state)?;
    let end = MorphTransfer {
        fixed: MorphTransferFixed {
            op: TransferOp::EndOfRound,
            dirty_bytes: if changed { STATE_BYTES } else { 0 },
            ..fixed
        },
        data: Vec::new(),
        references: Vec::new(),
    };
    writer.send(&Message::MorphTransfer(end)).await.ok()?;
    Some(())
}

fn answer(machine: &Machine, key: &Key, message: Message) -> Result<Message, String> {
    let kernel = |look: &mut dyn FnMut(&mut Kernel) -> Result<Message, String>| {
        machine
            .with(key, |kernel| look(kernel))
            .unwrap_or_else(|| Err("gone".to_owned()))
    };
    let recovered = |recovery| RecoverReply {
        recovery,
        elapsed_ms: 1,
    };
    match message {
        Message::HeartbeatReq(request) => kernel(&mut |kernel| {
            Ok(Message::HeartbeatRsp(HeartbeatRsp::from(
                HeartbeatRspFixed {
                    probe: request.probe,
                    health: match kernel.complains {
                        Complaint::None | Complaint::Load => Health::Healthy,
                        Complaint::Degraded | Complaint::Ended => Health::Degraded,
                    },
                    workload: match kernel.part {
                        Part::Serving if kernel.complains == Complaint::Ended => {
                            WorkloadState::Exited
                        }
                        Part::Serving => WorkloadState::Running,
                        Part::Frozen { .. } => WorkloadState::Frozen,
                        Part::Waiting { .. } => WorkloadState::Awaiting,
                        Part::Retired => WorkloadState::Retired,
                    },
                    cpu_count: 1,
                    cpu_busy_permille: 0,
                    pressure_cpu: match kernel.complains {
                        Complaint::Load => 99_00,
                        _ => 0,
                    },
                    pressure_memory: PRESSURE_ABSENT,
                    pressure_io: PRESSURE_ABSENT,
                    memory_total_kib: 0,
                    memory_available_kib: 0,
                    io_read_bytes: 0,
                    io_write_bytes: 0,
                },
            )))
        }),
        Message::RecoverPrepare(notice) => Ok(Message::RecoverPrepareReply(recovered(
            notice.fixed.recovery,
        ))),
        Message::RecoverReclaim(notice) => Ok(Message::RecoverReclaimReply(recovered(
            notice.fixed.recovery,
        ))),
        Message::RecoverComplete(notice) => Ok(Message::RecoverCompleteReply(recovered(
            notice.fixed.recovery,
        ))),
        Message::MorphPrepare(prepare) => kernel(&mut |kernel| {
            let fits = match prepare.side {
                Side::Source => kernel.part == Part::Serving,
                Side::Target => matches!(kernel.part, Part::Waiting { .. }),
            };
            if !fits || prepare.session < kernel.session {
                return Err(format!("it is {:?}", kernel.part));
            }
            kernel.session = prepare.session;
            let session = prepare.session;
            Ok(Message::MorphPrepareReply(SessionReply { session }))
        }),
        Message::MorphNegotiate(ask) => {
            let other = StateProvider::Other(64);
            Ok(Message::MorphNegotiateReply(NegotiateReply {
                session: ask.session,
                // The first offer is a provider that the daemon does not know.
                offers: vec![offer(other), offer(StateProvider::Cooperative)],
            }))
        }
        Message::MorphTransfer(transfer) => {
            let wrong = std::cell::Cell::new(None);
            let answer = kernel(&mut |kernel| {
                let (answer, wrong_now) = take_state(kernel, transfer.clone())?;
                wrong.set(wrong_now);
                Ok(Message::MorphTransferReply(answer))
            });
            if let Some(wrong) = wrong.take() {
                machine.breaks(format!("{} {}: {wrong}", key.0, key.1));
            }
            answer
        }
        Message::MorphValidate(validate) => Ok(Message::MorphValidateReply(ValidateReply {
            fixed: ValidateReplyFixed {
                session: validate.session,
                verdict: CheckResult::Passed,
            },
            checks: vec![Check {
                name: "simulated".to_owned(),
                result: CheckResult::Passed,
                duration_us: 1,
                detail: String::new(),
            }],
        })),
        Message::MorphCommit(commit) => commit_step(machine, key, commit),
        Message::MorphRollback(rollback) => roll_back(machine, key, &rollback),
        other => Err(format!("nothing answers {}", other.msg_type())),
    }
}

fn offer(provider: StateProvider) -> ProviderOffer {
    ProviderOffer {
        provider,
        memory_bytes: 4096,
        dirty_bytes_per_s: 0,
        state_kinds: capability::MEMORY | capability::LISTENERS | capability::CONNECTIONS,
        modes: capability::BY_REFERENCE | capability::ROUNDS,
        state_version: 1,
        why_not: String::new(),
    }
}

/// Answers a pull by reference: the source names its memory, and the target receives the names that the source sent.
/// Also returns the mistake that the daemon made, if any.
fn take_state(
    kernel: &mut Kernel,
    mut transfer: MorphTransfer,
) -> Result<(MorphTransfer, Option<&'static str>), String> {
    let named = Reference {
        region: transfer.fixed.session,
        length: 4096,
        digest: 0,
    };
    let by_reference = transfer.fixed.mode == TransferMode::ByReference;
    let last = transfer.fixed.flags & transfer_flags::FINAL != 0;
    let told = std::mem::take(&mut transfer.references);
    let mut wrong = None;
    match kernel.part {
        _ if !by_reference => {}
        Part::Frozen { .. } if last => kernel.part = Part::Frozen { holding: true },
        _ if last => return Err("it is not frozen".to_owned()),
        Part::Waiting { .. } if told != [named] => {
            wrong = Some("the target is not told what the source has named");
        }
        Part::Serving => transfer.references = vec![named],
        _ => {}
    }
    if transfer.fixed.provider != StateProvider::Cooperative {
        wrong = Some("a provider was chosen that the daemon does not know");
    }
    transfer.fixed.op = TransferOp::Applied;
    Ok((transfer, wrong))
}

fn commit_step(machine: &Machine, key: &Key, commit: MorphCommit) -> Result<Message, String> {
    let (part, session, source, mut state) = machine
        .with(key, |k| (k.part, k.session, k.source, k.state))
        .ok_or("gone")?;
    if session != commit.session {
        return Err(format!("session {} is not under way", commit.session));
    }
    match (commit.step, part) {
        (CommitStep::Freeze, Part::Serving) => {
            machine.with(key, |k| k.part = Part::Frozen { holding: false });
        }
        (CommitStep::Freeze, Part::Frozen { .. })
        | (CommitStep::Serve, Part::Serving)
        | (CommitStep::Retire, Part::Retired) => {}
        (CommitStep::Activate, Part::Waiting { .. }) => {
            if machine.source_may_go_on(key, session) {
                let text = "is activated, and its source was not told which round is the last";
                machine.breaks(format!("{} {} {text}", key.0, key.1));
            }
            // In a transfer by rounds, the target has no source within reach.
            state = match source {
                Some(source) => machine
                    .with(&(key.0.clone(), source), |k| k.state)
                    .ok_or("its source is gone")?,
                None => machine.with(key, |k| k.incoming).ok_or("gone")?,
            };
            machine.with(key, |k| {
                (k.state, k.part) = (state, Part::Waiting { activated: true });
            });
        }
        (CommitStep::Serve, Part::Waiting { activated: true }) => machine.serve(key),
        (CommitStep::Retire, Part::Frozen { .. }) => {
            machine.with(key, |k| k.part = Part::Retired);
        }
        (step, part) => return Err(format!("{step:?} of what is {part:?}")),
    }
    Ok(Message::MorphCommitReply(CommitReply {
        session: commit.session,
        nonce: commit.nonce,
        state_digest: match commit.step {
            CommitStep::Freeze | CommitStep::Activate => state,
            CommitStep::Serve | CommitStep::Retire => 0,
        },
        elapsed_us: 1,
        step: commit.step,
        status: StepStatus::Done,
    }))
}

fn roll_back(machine: &Machine, key: &Key, rollback: &MorphRollback) -> Result<Message, String> {
    let session = rollback.fixed.session;
    let part = machine.with(key, |k| k.part).ok_or("gone")?;
    let status = match (rollback.fixed.side, part) {
        (Side::Source, Part::Serving) => RollbackStatus::Running,
        (Side::Source, Part::Frozen { .. }) => {
            machine.serve(key);
            RollbackStatus::Running
        }
        (Side::Target, Part::Waiting { .. }) => RollbackStatus::Stopped,
        (side, part) => return Err(format!("{side:?} is {part:?}")),
    };
    Ok(Message::MorphRollbackReply(RollbackReply {
        session,
        status,
    }))
}
