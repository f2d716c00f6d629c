//! One message of every kind, with a recognizable value in every field.

use kmp_proto::message::*;
use kmp_proto::wire::ErrorCode;

/// File name, sequence, timestamp, message.
pub(crate) type Sample = (&'static str, u32, u64, Message);

fn hello(role: PeerRole, channel: Channel, session: u64) -> Hello {
    Hello {
        fixed: HelloFixed {
            version_min: 1,
            version_max: 1,
            role,
            channel,
            flags: 0,
            generation: 7,
            boot_id: *b"0123456789abcdef",
            features: features::MORPHS | features::BY_REFERENCE,
            session,
            incarnation: 3,
        },
        instance: "web-server".into(),
        kernel_release: "6.12.95+deb12-cloud-amd64".into(),
        agent_version: "kmorph-agent 0.1.0".into(),
        nonce: Some(*b"a nonce is thirty-two bytes long"),
        proof: (role == PeerRole::Instance).then_some([0xA5; 32]),
    }
}

fn recover() -> RecoverFixed {
    RecoverFixed {
        recovery: 3,
        failed_generation: 7,
        cause: FailureCause::KernelDead,
    }
}

fn transfer(op: TransferOp) -> MorphTransferFixed {
    MorphTransferFixed {
        session: 11,
        offset: 4096,
        total_bytes: 1 << 20,
        dirty_bytes: 8192,
        round: 2,
        flags: transfer_flags::FINAL,
        chunk_crc32: 0,
        op,
        mode: TransferMode::Rounds,
        provider: StateProvider::Cooperative,
    }
}

fn offers() -> NegotiateReply {
    let cooperative = ProviderOffer {
        provider: StateProvider::Cooperative,
        memory_bytes: 64 << 20,
        dirty_bytes_per_s: 1_000_000,
        state_kinds: capability::MEMORY | capability::LISTENERS | capability::CONNECTIONS,
        modes: capability::BY_REFERENCE | capability::ROUNDS,
        state_version: 1,
        why_not: String::new(),
    };
    let other = ProviderOffer {
        provider: StateProvider::Other(64),
        memory_bytes: 0,
        dirty_bytes_per_s: 0,
        state_kinds: 0,
        modes: 0,
        state_version: 0,
        why_not: "not in this kernel".to_owned(),
    };
    NegotiateReply {
        session: 11,
        offers: vec![cooperative, other],
    }
}

pub(crate) fn samples() -> Vec<Sample> {
    let mut all = session_messages();
    all.extend(recovery_messages());
    all.extend(morph_messages());
    all
}

fn session_messages() -> Vec<Sample> {
    vec![
        (
            "hello",
            1,
            1_000,
            Message::Hello(hello(PeerRole::Daemon, Channel::Bulk, 11)),
        ),
        (
            "hello_reply",
            1,
            2_000,
            Message::HelloReply(hello(PeerRole::Instance, Channel::Heartbeat, 0)),
        ),
        (
            "authenticate",
            2,
            2_100,
            Message::Authenticate(Authenticate { proof: [0x5A; 32] }),
        ),
        (
            "authenticate_reply",
            2,
            2_200,
            Message::AuthenticateReply(Authenticated { incarnation: 3 }),
        ),
        (
            "heartbeat_req",
            2,
            3_000,
            Message::HeartbeatReq(HeartbeatReq {
                probe: 41,
                flags: 0,
                self_lag_us: 250,
            }),
        ),
        (
            "heartbeat_rsp",
            2,
            4_000,
            Message::HeartbeatRsp(HeartbeatRsp::from(HeartbeatRspFixed {
                probe: 41,
                health: Health::Healthy,
                workload: WorkloadState::Running,
                cpu_count: 4,
                cpu_busy_permille: 125,
                pressure_cpu: 150,
                pressure_memory: 0,
                pressure_io: PRESSURE_ABSENT,
                memory_total_kib: 262_144,
                memory_available_kib: 131_072,
                io_read_bytes: 4_096,
                io_write_bytes: 8_192,
            })),
        ),
        (
            "health_status",
            3,
            5_000,
            Message::HealthStatus(HealthStatus {
                fixed: HealthStatusFixed {
                    health: Health::Degraded,
                    workload: WorkloadState::Exited,
                    flags: 0,
                    exit_status: -9,
                    restarts: 2,
                },
                text: "the workload was ended by signal 9".into(),
            }),
        ),
        (
            "error",
            9,
            6_000,
            Message::Error(ErrorInfo {
                code: ErrorCode::StaleGeneration,
                offending_type: 0x0001,
                offending_sequence: 9,
                text: "generation 6 was given up, 7 is current".into(),
            }),
        ),
        (
            "retry",
            10,
            7_000,
            Message::Retry(RetryAfter {
                retry_after_ms: 100,
                reason: ErrorCode::Busy,
                offending_type: 0x0303,
                offending_sequence: 10,
            }),
        ),
    ]
}

fn recovery_messages() -> Vec<Sample> {
    let reply = RecoverReply {
        recovery: 3,
        elapsed_ms: 2,
    };
    let instance = || "web-server".to_owned();
    let done = VmcoreComplete {
        capture: 5,
        bytes: 65_536,
        status: CaptureStatus::Complete,
    };
    vec![
        (
            "recover_prepare",
            20,
            1,
            Message::RecoverPrepare(RecoverNotice {
                fixed: recover(),
                instance: instance(),
                text: "its main process was ended by signal 9".into(),
            }),
        ),
        (
            "recover_prepare_reply",
            20,
            2,
            Message::RecoverPrepareReply(reply),
        ),
        (
            "recover_reclaim",
            21,
            3,
            Message::RecoverReclaim(RecoverReclaim {
                fixed: recover(),
                instance: instance(),
                fence: FenceClaim {
                    method: 2,
                    confirmation: 1,
                    flags: 0,
                    generation: 7,
                    fenced_at_unix_ns: 1_700_000_000_000_000_000,
                },
            }),
        ),
        (
            "recover_reclaim_reply",
            21,
            4,
            Message::RecoverReclaimReply(reply),
        ),
        (
            "recover_complete",
            22,
            5,
            Message::RecoverComplete(RecoverComplete {
                fixed: RecoverCompleteFixed {
                    recovery: 3,
                    failed_generation: 7,
                    new_generation: 8,
                    outcome: RecoveryOutcome::Recovered,
                    part: 0,
                    flags: 0,
                },
                instance: instance(),
                topology: vec![TopologyEntry {
                    name: instance(),
                    generation: 8,
                    memory_kib: 262_144,
                    cid: 5,
                    cpus: vec![2, 3, 5],
                }],
            }),
        ),
        (
            "recover_complete_reply",
            22,
            6,
            Message::RecoverCompleteReply(reply),
        ),
        (
            "vmcore_start",
            30,
            7,
            Message::VmcoreStart(VmcoreStart {
                fixed: VmcoreStartFixed {
                    capture: 5,
                    generation: 7,
                    chunk_bytes: 65_536,
                },
                pci_port: Some("0000:00:1e.0".into()),
                windows: vec![MemoryWindow {
                    start: 0,
                    length: 0x2000_0000,
                    offset: 0,
                }],
                ranges: vec![MemoryRange {
                    start: 0x10_0000,
                    length: 0x1_0000,
                }],
            }),
        ),
        ("vmcore_start_reply", 30, 8, Message::VmcoreStartReply(done)),
        (
            "vmcore_data",
            31,
            9,
            Message::VmcoreData(VmcoreData {
                fixed: VmcoreDataFixed {
                    capture: 5,
                    address: 0x10_0000,
                    length: 9,
                    chunk_crc32: 0xCBF4_3926,
                    encoding: ChunkEncoding::Raw,
                },
                data: b"123456789".to_vec(),
            }),
        ),
        ("vmcore_complete", 32, 10, Message::VmcoreComplete(done)),
        (
            "vmcore_complete_reply",
            32,
            11,
            Message::VmcoreCompleteReply(done),
        ),
    ]
}

fn morph_messages() -> Vec<Sample> {
    let mut all = morph_setup();
    all.extend(morph_commit());
    all
}

fn morph_setup() -> Vec<Sample> {
    let chunk = MorphTransfer::chunk(transfer(TransferOp::Chunk), b"123456789".to_vec());
    let applied = MorphTransfer {
        fixed: MorphTransferFixed {
            mode: TransferMode::ByReference,
            ..transfer(TransferOp::Applied)
        },
        data: Vec::new(),
        references: vec![Reference {
            region: 1,
            length: 1 << 20,
            digest: 99,
        }],
    };
    vec![
        (
            "morph_prepare",
            40,
            1,
            Message::MorphPrepare(MorphPrepare {
                session: 11,
                from_generation: 7,
                to_generation: 8,
                downtime_budget_us: 10_000,
                phase_timeout_ms: 60_000,
                side: Side::Source,
            }),
        ),
        (
            "morph_prepare_reply",
            40,
            2,
            Message::MorphPrepareReply(SessionReply { session: 11 }),
        ),
        (
            "morph_negotiate",
            41,
            3,
            Message::MorphNegotiate(MorphNegotiate {
                session: 11,
                providers: StateProvider::set(StateProvider::ALL) | 64,
            }),
        ),
        (
            "morph_negotiate_reply",
            41,
            4,
            Message::MorphNegotiateReply(offers()),
        ),
        ("morph_transfer_state", 42, 5, Message::MorphTransfer(chunk)),
        (
            "morph_transfer_state_reply",
            42,
            6,
            Message::MorphTransferReply(applied),
        ),
        (
            "morph_validate",
            43,
            7,
            Message::MorphValidate(MorphValidate {
                session: 11,
                round: 2,
                flags: 0,
                state_bytes: 1 << 20,
            }),
        ),
        (
            "morph_validate_reply",
            43,
            8,
            Message::MorphValidateReply(ValidateReply {
                fixed: ValidateReplyFixed {
                    session: 11,
                    verdict: CheckResult::Failed,
                },
                checks: vec![Check {
                    name: "index".into(),
                    result: CheckResult::Failed,
                    duration_us: 17,
                    detail: "entry 5 points outside the arena".into(),
                }],
            }),
        ),
    ]
}

fn morph_commit() -> Vec<Sample> {
    vec![
        (
            "morph_commit",
            44,
            9,
            Message::MorphCommit(MorphCommit {
                session: 11,
                nonce: 0xDEAD_BEEF,
                step: CommitStep::Freeze,
                flags: 0,
            }),
        ),
        (
            "morph_commit_reply",
            44,
            10,
            Message::MorphCommitReply(CommitReply {
                session: 11,
                nonce: 0xDEAD_BEEF,
                state_digest: 99,
                elapsed_us: 310,
                step: CommitStep::Freeze,
                status: StepStatus::Done,
            }),
        ),
        (
            "morph_rollback",
            45,
            11,
            Message::MorphRollback(MorphRollback {
                fixed: RollbackFixed {
                    session: 11,
                    side: Side::Target,
                },
                text: "validation failed".into(),
            }),
        ),
        (
            "morph_rollback_reply",
            45,
            12,
            Message::MorphRollbackReply(RollbackReply {
                session: 11,
                status: RollbackStatus::Running,
            }),
        ),
    ]
}
