//! Queries an instance's kernel directly whether it is alive, when its agent is silent.
//!
//! ```text
//!  connect to port 9001 ─ refused ───────────────────────────▶ a kernel that refuses lives
//!                       ─ accepted ─ HELLO ─ HEARTBEAT_REQ ──▶ the kernel answered (kerf-vsock.ko)
//!                       ─ closed unread by the vsock device ─▶ no sign of life: no driver has started the device
//!                       ─ neither in time ───────────────────▶ no sign of life
//! ```
//!
//! User space is not involved in either answer: a kernel refuses connections to ports on which nothing listens, and
//! `kerf-vsock.ko` answers heartbeats below its sockets.

use std::fmt;

use kmp_proto::message::{Channel, HeartbeatReq, Hello, Message};

use crate::connection::{Connection, ConnectionError, HELLO_TIMEOUT, greet};
use crate::link::{Address, BoxedLink, ConnectError, connect};

/// Port on which a kernel itself answers heartbeats, where it has somebody to do so (`docs/kmp.md`).
pub const KERNEL_PORT: u32 = 9001;

/// Evidence that the kernel of an instance runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// The kernel refused a connection to this port.
    Refused(u32),
    /// The kernel answered a heartbeat on [`KERNEL_PORT`].
    Answered,
}

impl fmt::Display for Sign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(port) => {
                write!(f, "its kernel refused a connection to vsock port {port}")
            }
            Self::Answered => write!(
                f,
                "its kernel answered a heartbeat on vsock port {KERNEL_PORT}"
            ),
        }
    }
}

/// The sign that the kernel of the instance at `address`, meant by `hello`, gives within
/// [`CONNECT_TIMEOUT`](crate::link::CONNECT_TIMEOUT) and [`HELLO_TIMEOUT`]. None proves nothing.
pub async fn sign(address: &Address, hello: &Hello) -> Option<Sign> {
    match connect(address, KERNEL_PORT).await {
        Err(ConnectError::KernelRefused { port, .. }) => Some(Sign::Refused(port)),
        Err(_) => None,
        Ok(link) => {
            let beat = tokio::time::timeout(HELLO_TIMEOUT, heartbeat(link, hello.clone()));
            matches!(beat.await, Ok(Ok(true))).then_some(Sign::Answered)
        }
    }
}

/// Whether a heartbeat is answered as one.
async fn heartbeat(link: BoxedLink, mut hello: Hello) -> Result<bool, ConnectionError> {
    hello.fixed.channel = Channel::Heartbeat;
    let mut connection = greet(link, hello).await?;
    let request = HeartbeatReq {
        probe: 1,
        flags: 0,
        self_lag_us: 0,
    };
    connection
        .writer
        .send(&Message::HeartbeatReq(request))
        .await?;
    let Connection { reader, writer, .. } = &mut connection;
    let frame = reader.next_or_tell(writer).await?;
    Ok(
        matches!(frame.message, Message::HeartbeatRsp(answer) if answer.fixed.probe == request.probe),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::welcome;
    use crate::link::read_line;
    use kmp_proto::message::{
        Health, HeartbeatRsp, HeartbeatRspFixed, HelloFixed, PeerRole, WorkloadState,
    };
    use kmp_proto::wire::VERSION;
    use tokio::io::AsyncWriteExt;
    use tokio::net::{UnixListener, UnixStream};

    fn hello(role: PeerRole, instance: &str) -> Hello {
        Hello {
            fixed: HelloFixed {
                version_min: VERSION,
                version_max: VERSION,
                role,
                channel: Channel::Control,
                flags: 0,
                generation: 4,
                boot_id: [1; 16],
                features: 0,
                session: 0,
                incarnation: 0,
            },
            instance: instance.to_owned(),
            kernel_release: String::new(),
            agent_version: String::new(),
            nonce: None,
            proof: None,
        }
    }

    /// The sign found if the device behind the socket answers each request for a port with `answer`.
    async fn found<F: Future<Output = ()>>(answer: impl FnOnce(UnixStream) -> F) -> Option<Sign> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (address, daemon) = (Address::Unix(path), hello(PeerRole::Daemon, "web"));
        let device = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert_eq!(read_line(&mut stream).await.unwrap(), "CONNECT 9001");
            answer(stream).await;
        };
        tokio::join!(sign(&address, &daemon), device).0
    }

    /// A kernel that answers heartbeats, for `instance`.
    async fn responder(mut stream: UnixStream, instance: &str) {
        stream.write_all(b"OK 9001\n").await.unwrap();
        let identity = hello(PeerRole::Instance, instance);
        let Ok(mut connection) = welcome(Box::new(stream), &identity).await else {
            return;
        };
        let said = &connection.hello;
        assert_eq!((said.fixed.channel, said.nonce), (Channel::Heartbeat, None));
        let frame = connection.reader.next().await.unwrap();
        let Message::HeartbeatReq(HeartbeatReq { probe, .. }) = frame.message else {
            panic!("asked {:?}", frame.message);
        };
        let answer = Message::HeartbeatRsp(HeartbeatRsp::from(HeartbeatRspFixed {
            probe,
            health: Health::Degraded,
            workload: WorkloadState::None,
            cpu_count: 1,
            cpu_busy_permille: 0,
            pressure_cpu: 0,
            pressure_memory: 0,
            pressure_io: 0,
            memory_total_kib: 1,
            memory_available_kib: 1,
            io_read_bytes: 0,
            io_write_bytes: 0,
        }));
        let sequence = frame.header.sequence;
        connection.writer.reply(&answer, sequence).await.unwrap();
    }

    #[tokio::test]
    async fn a_kernel_lives_that_refuses_or_answers_and_no_other() {
        let refused = found(|stream| async { drop(stream) }).await;
        assert_eq!(refused, Some(Sign::Refused(KERNEL_PORT)));
        let answered = found(|stream| responder(stream, "web")).await;
        assert_eq!(answered, Some(Sign::Answered));
        assert_eq!(found(|stream| responder(stream, "other")).await, None);
        let without_link = |mut stream: UnixStream| async move {
            stream.write_all(b"no link to the guest\n").await.unwrap();
        };
        assert_eq!(found(without_link).await, None);
    }
}
