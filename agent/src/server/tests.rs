mod channels;
mod providers;
mod transfer;

use std::time::Duration;

use kmp_proto::message::{
    CommitStep, ErrorInfo, FailureCause, FenceClaim, Hello, HelloFixed, MorphCommit,
    MorphNegotiate, NegotiateReply, RecoverCompleteFixed, RecoverFixed, RecoveryOutcome, Side,
    StateProvider, TopologyEntry, complete_flags, features,
};
use kmp_proto::wire::VERSION;
use kmp_transport::connection::{greet, welcome};
use kmp_transport::link;

use super::*;
use crate::figures::Scope;
use crate::priority::Scheduling;
use crate::pulse::Pulses;

const PATIENCE: Duration = Duration::from_secs(60);

fn notice(instance: &str, fenced: u64) -> RecoverReclaim {
    RecoverReclaim {
        fixed: RecoverFixed {
            recovery: 3,
            failed_generation: 7,
            cause: FailureCause::KernelDead,
        },
        instance: instance.to_owned(),
        fence: FenceClaim {
            method: 2,
            confirmation: 1,
            flags: 0,
            generation: fenced,
            fenced_at_unix_ns: 1,
        },
    }
}

#[test]
fn a_certificate_of_another_generation_reclaims_nothing() {
    for (fenced, refused) in [(6, true), (7, false), (8, true)] {
        let code = reclaim(&notice("db", fenced), "web").err().map(|r| r.code);
        assert_eq!(code, refused.then_some(ErrorCode::NotFenced));
    }
}

#[test]
fn a_certificate_that_names_its_receiver_reclaims_nothing() {
    let refused = reclaim(&notice("web", 7), "web").err().map(|r| r.code);
    assert_eq!(refused, Some(ErrorCode::NotFenced));
}

fn hello(role: PeerRole, channel: Channel) -> Hello {
    Hello {
        fixed: HelloFixed {
            version_min: VERSION,
            version_max: VERSION,
            role,
            channel,
            flags: 0,
            generation: 1,
            boot_id: [7; 16],
            features: features::MORPHS,
            session: u64::from(channel == Channel::Bulk),
            incarnation: 0,
        },
        instance: "web".to_owned(),
        kernel_release: "6.12.0".to_owned(),
        agent_version: "test".to_owned(),
        nonce: None,
        proof: None,
    }
}

/// An agent without a program, and the daemon's end of a channel to it.
struct Agent {
    server: mpsc::Sender<Connection>,
    state_dir: tempfile::TempDir,
    /// Of both sides.
    features: u64,
}

impl Agent {
    fn start() -> Self {
        Self::with(Workload::none(), features::MORPHS)
    }

    fn reading_lent_memory() -> Self {
        let both = features::MORPHS | features::READS_LENT_MEMORY;
        Self::with(Workload::none(), both)
    }

    fn with(workload: Workload, features: u64) -> Self {
        let log = Logger::root(slog::Discard, slog::o!());
        let morphs = Morphs::new(workload.clone(), 1, None, log);
        Self::moved_by(morphs, workload, features)
    }

    fn moved_by(morphs: Morphs, workload: Workload, features: u64) -> Self {
        let state_dir = tempfile::tempdir().unwrap();
        let (server, accepted) = mpsc::channel(1);
        let served = Served {
            instance: "web".to_owned(),
            morphs,
            said: Said::default(),
            workload,
            topology: crate::topology::Topology::in_dir(state_dir.path().to_owned()),
            log: Logger::root(slog::Discard, slog::o!()),
            pulses: Pulses::none(),
            scheduling: Scheduling::default(),
        };
        tokio::spawn(serve(accepted, served, Sampler::new(Scope::System, 1)));
        Self {
            server,
            state_dir,
            features,
        }
    }

    fn identity(&self) -> Hello {
        let mut identity = hello(PeerRole::Instance, Channel::Control);
        identity.fixed.features = self.features;
        identity
    }

    fn asked(&self, channel: Channel) -> Hello {
        let mut asked = hello(PeerRole::Daemon, channel);
        asked.fixed.features = self.features;
        asked
    }

    async fn connect(&self, channel: Channel) -> Connection {
        self.connect_as(0, channel).await
    }

    /// As the daemon of this incarnation.
    async fn connect_as(&self, incarnation: u64, channel: Channel) -> Connection {
        let (near, far) = link::memory();
        let identity = self.identity();
        let mut asked = self.asked(channel);
        asked.fixed.incarnation = incarnation;
        let (daemon, agent) = tokio::join!(greet(near, asked), welcome(far, &identity));
        self.server.send(agent.unwrap()).await.unwrap();
        daemon.unwrap()
    }

    async fn control(&self) -> Connection {
        let mut daemon = self.connect(Channel::Control).await;
        let first = next_frame(&mut daemon).await.unwrap();
        assert!(matches!(first, Message::HealthStatus(_)));
        daemon
    }
}

async fn next_frame(daemon: &mut Connection) -> Result<Message, ConnectionError> {
    let next = tokio::time::timeout(PATIENCE, daemon.reader.next());
    next.await.unwrap().map(|frame| frame.message)
}

async fn ask(daemon: &mut Connection, message: Message) -> Message {
    daemon.writer.send(&message).await.unwrap();
    next_frame(daemon).await.unwrap()
}

fn code(answer: &Message) -> ErrorCode {
    match answer {
        Message::Error(error) => error.code,
        other => panic!("{other:?}"),
    }
}

fn prepare(session: u64, from_generation: u64) -> Message {
    Message::MorphPrepare(MorphPrepare {
        session,
        from_generation,
        to_generation: 9,
        downtime_budget_us: 1,
        phase_timeout_ms: 1,
        side: Side::Source,
    })
}

/// Asks for all providers of the protocol and one that it does not name.
async fn negotiate(daemon: &mut Connection, session: u64) -> NegotiateReply {
    let providers = StateProvider::set(StateProvider::ALL) | 64;
    let ask_for = MorphNegotiate { session, providers };
    match ask(daemon, Message::MorphNegotiate(ask_for)).await {
        Message::MorphNegotiateReply(reply) => reply,
        other => panic!("{other:?}"),
    }
}

fn probe() -> Message {
    Message::HeartbeatReq(HeartbeatReq {
        probe: 1,
        flags: 0,
        self_lag_us: 0,
    })
}

#[tokio::test]
async fn sessions_grow() {
    let agent = Agent::start();
    let mut daemon = agent.control().await;
    for (session, sound) in [(5, true), (5, true), (4, false), (6, true)] {
        let answer = ask(&mut daemon, prepare(session, 1)).await;
        assert_eq!(matches!(answer, Message::MorphPrepareReply(_)), sound);
        if !sound {
            assert_eq!(code(&answer), ErrorCode::UnexpectedInState);
        }
    }
}

#[tokio::test]
async fn code_7_ends_the_control_channel_and_code_5_does_not() {
    let agent = Agent::start();
    let mut daemon = agent.control().await;
    let unknown = Message::MorphCommit(MorphCommit {
        session: 5,
        nonce: 1,
        step: CommitStep::Freeze,
        flags: 0,
    });
    let answer = ask(&mut daemon, unknown).await;
    assert_eq!(code(&answer), ErrorCode::UnexpectedInState);
    let answer = ask(&mut daemon, prepare(5, 2)).await;
    assert_eq!(code(&answer), ErrorCode::StaleGeneration);
    let end = next_frame(&mut daemon).await;
    assert!(matches!(end, Err(ConnectionError::Closed)), "{end:?}");
}

#[tokio::test]
async fn what_does_not_travel_on_a_channel_is_refused_with_code_5_on_each() {
    let agent = Agent::start();
    for (channel, message) in [
        (Channel::Control, probe()),
        (Channel::Heartbeat, prepare(5, 1)),
        (Channel::Bulk, probe()),
    ] {
        let mut daemon = match channel {
            Channel::Control => agent.control().await,
            other => agent.connect(other).await,
        };
        for _ in 0..3 {
            let answer = ask(&mut daemon, message.clone()).await;
            assert_eq!(code(&answer), ErrorCode::UnexpectedInState, "{channel:?}");
        }
    }
}

#[tokio::test]
async fn a_feature_that_not_both_have_is_not_used() {
    let agent = Agent::start();
    let mut daemon = agent.connect(Channel::Bulk).await;
    assert_eq!(daemon.features, features::MORPHS);
    let start = kmp_proto::message::VmcoreStart {
        fixed: kmp_proto::message::VmcoreStartFixed {
            capture: 1,
            generation: 1,
            chunk_bytes: 4096,
        },
        pci_port: None,
        windows: Vec::new(),
        ranges: Vec::new(),
    };
    let answer = ask(&mut daemon, Message::VmcoreStart(start)).await;
    assert_eq!(code(&answer), ErrorCode::Incompatible);
}

#[tokio::test]
async fn the_daemons_last_word_ends_a_channel() {
    let agent = Agent::start();
    for channel in [Channel::Control, Channel::Heartbeat] {
        let mut daemon = match channel {
            Channel::Control => agent.control().await,
            other => agent.connect(other).await,
        };
        let last = |code| {
            Message::Error(ErrorInfo {
                code,
                offending_type: 0,
                offending_sequence: 0,
                text: String::new(),
            })
        };
        // It is about a frame that could not be read, so its sequence is of none.
        let malformed = last(ErrorCode::Malformed);
        daemon.writer.reply(&malformed, 0).await.unwrap();
        let end = next_frame(&mut daemon).await;
        assert!(
            matches!(end, Err(ConnectionError::Closed)),
            "{channel:?} {end:?}"
        );
    }
}

#[tokio::test]
async fn a_topology_in_parts_is_written_when_the_last_is_there() {
    let agent = Agent::start();
    let mut daemon = agent.control().await;
    let part = |part, flags, name: &str| {
        Message::RecoverComplete(RecoverComplete {
            fixed: RecoverCompleteFixed {
                recovery: 3,
                failed_generation: 7,
                new_generation: 8,
                outcome: RecoveryOutcome::Recovered,
                part,
                flags,
            },
            instance: "db".to_owned(),
            topology: vec![TopologyEntry {
                name: name.to_owned(),
                generation: 1,
                memory_kib: 1,
                cid: 3,
                cpus: Vec::new(),
            }],
        })
    };
    let path = agent.state_dir.path().join(crate::topology::FILE_NAME);
    let skipped = ask(&mut daemon, part(1, 0, "b")).await;
    assert_eq!(code(&skipped), ErrorCode::UnexpectedInState);
    let first = ask(&mut daemon, part(0, complete_flags::MORE, "a")).await;
    assert!(matches!(first, Message::RecoverCompleteReply(_)));
    assert!(!path.exists());
    let last = ask(&mut daemon, part(1, 0, "b")).await;
    assert!(matches!(last, Message::RecoverCompleteReply(_)));
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains("\"a\"") && text.contains("\"b\""), "{text}");
}

#[tokio::test]
async fn whatever_an_older_daemon_has_open_ends_with_the_first_word_of_a_newer_one() {
    let agent = Agent::start();
    let mut older = Vec::new();
    for channel in [Channel::Heartbeat, Channel::Control, Channel::Bulk] {
        older.push(agent.connect_as(3, channel).await);
    }
    let first = next_frame(&mut older[1]).await.unwrap();
    assert!(matches!(first, Message::HealthStatus(_)));
    let _newer = agent.connect_as(4, Channel::Heartbeat).await;
    for connection in &mut older {
        let end = next_frame(connection).await;
        assert!(matches!(end, Err(ConnectionError::Closed)), "{end:?}");
    }
}
