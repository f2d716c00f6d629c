//! The agent's asynchronous end against the real server.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command};
use std::time::Duration;

use kmorph_workload::handover::message::{
    FailureCode, Mode, PROTOCOL_VERSION, Phase, Reply, Request, Role,
};
use kmorph_workload::handover::{
    ActivatedListener, AgentEnd, AgentEndError, HandoverError, PacketSocket, attach,
};

const DEADLINE: Duration = Duration::from_secs(30);

async fn start(listener: &TcpListener, role: Role) -> (Child, AgentEnd) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kmorph-kv"));
    let socket: OwnedFd = listener.as_fd().try_clone_to_owned().unwrap();
    let name = "p1".to_owned();
    let fd = attach(&mut command, &[ActivatedListener { name, socket }]).unwrap();
    let child = command.spawn().unwrap();
    drop(command);
    let mut agent = AgentEnd::new(fd).unwrap();
    let register = agent.register(role, "web", 1, "6.1.0", DEADLINE).await;
    assert!(matches!(
        register.unwrap(),
        Reply::Register {
            protocol: PROTOCOL_VERSION,
            modes: 3,
            ..
        }
    ));
    (child, agent)
}

async fn ask(agent: &mut AgentEnd, request: Request) -> Reply {
    let reply = agent.request(&request, &[], &[], DEADLINE).await;
    reply.unwrap().message
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

#[test]
fn an_agent_moves_a_workload_and_hears_its_end() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (mut old_child, mut old) = start(&listener, Role::Serve).await;
        let (mut new_child, mut new) = start(&listener, Role::Standby).await;
        let (from, to) = PacketSocket::pair().unwrap();
        let mode = Mode::ByReference;
        let total_len = 0;
        let import = Request::PrepareImport { mode, total_len };
        let id = new.send(&import, &[], &[to.as_fd()]).await.unwrap();
        let export = Request::PrepareExport { mode };
        let prepared = old.request(&export, &[], &[from.as_fd()], DEADLINE).await;
        assert!(matches!(prepared.unwrap().message, Reply::Prepared { .. }));
        let ready = new.receive().await.unwrap();
        assert_eq!(ready.id, id);
        let refused = new.request(&Request::Serve, &[], &[], DEADLINE).await;
        assert!(matches!(
            refused.unwrap_err(),
            AgentEndError::Refused {
                code: FailureCode::WrongPhase,
                ..
            }
        ));
        ask(&mut old, Request::Freeze).await;
        let (nonce, budget_us) = (5, 200);
        let activated = ask(&mut new, Request::Activate { nonce, budget_us }).await;
        assert!(matches!(activated, Reply::Activated { nonce: 5, .. }));
        ask(&mut new, Request::Serve).await;
        assert_eq!(ask(&mut old, Request::Retire).await, Reply::Retired);
        assert!(old_child.wait().unwrap().success());
        let end = old.receive().await.unwrap_err();
        assert!(matches!(
            end,
            AgentEndError::Handover(HandoverError::Closed)
        ));
        let status = ask(&mut new, Request::Query).await;
        assert!(matches!(status, Reply::Status(s) if s.phase == Phase::Serving));
        drop(new);
        assert_eq!(new_child.wait().unwrap().code(), Some(75));
    });
}

#[test]
fn a_workload_that_says_nothing_or_something_else_is_named_so() {
    run(async {
        let (ours, theirs) = PacketSocket::pair().unwrap();
        let mut agent = AgentEnd::new(ours).unwrap();
        let within = Duration::from_millis(20);
        let silent = agent.register(Role::Serve, "web", 1, "", within).await;
        assert!(matches!(silent, Err(AgentEndError::Timeout { .. })));
        let query = agent.request(&Request::Query, &[], &[], within).await;
        assert!(matches!(query, Err(AgentEndError::Timeout { .. })));
        let other = PacketSocket::new(theirs).unwrap();
        other.send(0, &Reply::Retired, &[], &[]).unwrap();
        let wrong = agent.register(Role::Serve, "web", 1, "", DEADLINE).await;
        assert!(matches!(wrong, Err(AgentEndError::NotRegistered(_))));
    });
}
