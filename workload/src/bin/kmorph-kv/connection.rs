//! A client connection: its socket, received data and unsent replies.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use kmorph_workload::arena::ArenaError;
use kmorph_workload::handover::table::ConnectionBuffers;
use kmorph_workload::provider::OutgoingConnection;
use kmorph_workload::store::{Store, UnixMillis};
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, send};

use crate::commands::{self, Context};
use crate::info::Facts;
use crate::resp::{self, Parsed, Parser};

/// Maximum length of a client name, in bytes.
pub(crate) const MAX_NAME_BYTES: usize = 256;
/// Size of unsent output at which no further commands of the client run, in bytes.
const OUTPUT_PAUSE_BYTES: usize = 1 << 20;
/// Maximum capacity of an empty buffer that is kept, in bytes; larger ones are freed.
const KEPT_BUFFER_BYTES: usize = 256 << 10;
/// Maximum number of commands per turn, before other clients get theirs.
const COMMANDS_PER_TURN: usize = 1024;

/// Settings of a client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Client {
    pub(crate) id: u64,
    pub(crate) name: Vec<u8>,
    /// True if the connection is to be closed once all output is written.
    pub(crate) closing: bool,
}

impl Client {
    /// Returns `id: u64 | closing: u8 | name`, the form for the handover.
    fn encode(&self) -> Vec<u8> {
        let mut bytes = self.id.to_le_bytes().to_vec();
        bytes.push(u8::from(self.closing));
        bytes.extend_from_slice(&self.name);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (id, rest) = bytes.split_first_chunk::<8>()?;
        let (closing, name) = rest.split_first()?;
        (name.len() <= MAX_NAME_BYTES && *closing <= 1).then(|| Self {
            id: u64::from_le_bytes(*id),
            name: name.to_vec(),
            closing: *closing == 1,
        })
    }
}

/// What to do with a connection next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The connection waits for the client.
    Idle,
    /// The connection has more commands that can be executed at once.
    More,
    /// The connection is over.
    Close,
}

/// An established connection.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    pub(crate) client: Client,
    parser: Parser,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Number of output bytes already written.
    written: usize,
    /// True once the client sends no more.
    ended: bool,
    /// The events that the server waits for on the socket.
    pub(crate) interest: EpollFlags,
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd, id: u64) -> Self {
        Self {
            socket,
            client: Client {
                id,
                ..Client::default()
            },
            parser: Parser::default(),
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            ended: false,
            interest: EpollFlags::EPOLLIN,
        }
    }

    /// Takes over a connection from another process. Returns `None` if its state is malformed.
    pub(crate) fn import(socket: OwnedFd, buffers: ConnectionBuffers) -> Option<Self> {
        Some(Self {
            client: Client::decode(&buffers.state)?,
            input: buffers.input,
            output: buffers.output,
            ..Self::new(socket, 0)
        })
    }

    pub(crate) fn export(&self) -> OutgoingConnection<'_> {
        OutgoingConnection {
            fd: self.socket.as_fd(),
            state: Client {
                // Skipped input was not kept, so the next process could not find the start of the next command.
                closing: self.client.closing || self.parser.is_skipping(),
                ..self.client.clone()
            }
            .encode(),
            input: &self.input[self.parser.start()..],
            output: &self.output[self.written..],
        }
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Returns the number of buffered bytes: input that was not executed, and output that was not written.
    pub(crate) fn buffered(&self) -> usize {
        self.input.len() + self.output.len()
    }

    /// Returns whether the connection waits to write.
    pub(crate) fn wants_write(&self) -> bool {
        self.written < self.output.len()
    }

    /// Returns whether the connection waits to read.
    pub(crate) fn wants_read(&self) -> bool {
        !self.client.closing && !self.ended && !self.is_paused()
    }

    fn is_paused(&self) -> bool {
        self.output.len() - self.written >= OUTPUT_PAUSE_BYTES
    }

    /// Reads once into `scratch` and keeps the data. Returns `false` if the connection is broken.
    pub(crate) fn read(&mut self, scratch: &mut [u8]) -> bool {
        match nix::unistd::read(&self.socket, scratch) {
            Ok(0) => {
                self.ended = true;
                true
            }
            Ok(count) => {
                self.drop_consumed();
                self.input.extend_from_slice(&scratch[..count]);
                true
            }
            Err(Errno::EAGAIN | Errno::EINTR) => true,
            Err(_) => false,
        }
    }

    fn drop_consumed(&mut self) {
        let consumed = self.parser.start();
        if consumed > 0 {
            self.input.drain(..consumed);
            self.parser.dropped(consumed);
        }
        if self.input.is_empty() && self.input.capacity() > KEPT_BUFFER_BYTES {
            self.input = Vec::new();
        }
    }

    /// Executes the complete commands in the buffer and writes as much output as possible.
    ///
    /// # Errors
    /// Errors that end the server, see [`commands::run`]; then nothing more is written.
    pub(crate) fn run(
        &mut self,
        store: &mut Store,
        facts: &mut Facts,
        now: UnixMillis,
    ) -> Result<Fate, ArenaError> {
        let mut left = COMMANDS_PER_TURN;
        let mut waiting = false;
        while !self.client.closing && !self.is_paused() && left > 0 {
            left -= 1;
            match self.parser.next(&self.input, facts.limits) {
                Parsed::Command(ranges) => {
                    let args: Vec<&[u8]> =
                        ranges.into_iter().map(|range| &self.input[range]).collect();
                    facts.commands += 1;
                    let mut context = Context {
                        store,
                        client: &mut self.client,
                        facts,
                        out: &mut self.output,
                        now,
                    };
                    commands::run(&mut context, &args)?;
                }
                Parsed::TooLarge => {
                    facts.commands += 1;
                    let text = "OOM the command is too large for the memory of this instance";
                    resp::error(&mut self.output, text);
                }
                Parsed::Incomplete => {
                    waiting = true;
                    break;
                }
                Parsed::Invalid(text) => {
                    resp::error(&mut self.output, &format!("ERR {text}"));
                    self.client.closing = true;
                }
            }
        }
        if waiting && self.ended {
            self.client.closing = true;
        }
        self.drop_consumed();
        if !self.flush() || (self.client.closing && !self.wants_write()) {
            return Ok(Fate::Close);
        }
        let more = !waiting && !self.client.closing && !self.is_paused();
        Ok(if more { Fate::More } else { Fate::Idle })
    }

    /// Writes as much output as possible. Returns `false` if the connection is broken.
    fn flush(&mut self) -> bool {
        while self.wants_write() {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match send(self.socket.as_raw_fd(), &self.output[self.written..], flags) {
                Ok(count) => self.written += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if self.written >= OUTPUT_PAUSE_BYTES {
                        self.output.drain(..self.written);
                        self.written = 0;
                    }
                    return true;
                }
                Err(_) => return false,
            }
        }
        self.output.clear();
        self.written = 0;
        if self.output.capacity() > KEPT_BUFFER_BYTES {
            self.output = Vec::new();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_survives_its_encoding_and_garbage_is_refused() {
        let client = Client {
            id: 77,
            name: b"worker".to_vec(),
            closing: true,
        };
        assert_eq!(Client::decode(&client.encode()), Some(client));
        assert_eq!(Client::decode(b"short"), None);
        assert_eq!(Client::decode(&[2; 9]), None);
    }
}
