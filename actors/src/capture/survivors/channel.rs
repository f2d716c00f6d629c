//! The daemon's end of the channel on which a survivor sends the memory that it has read: VMCORE_*.
//!
//! Invariants: the daemon holds at most [`AHEAD`] shares of 1 MiB of a survivor. The channel ends when the survivor
//! sends unrequested data, sends data twice, or is silent for longer than [`ANSWER_TIMEOUT`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use kmorph_backends::contract::{LentPlace, LentWindow, Loan};
use kmorph_vmcore::PhysRange;
use kmorph_vmcore::paced::Pace;
use kmorph_vmcore::writer::shares::{Helper, Share};
use kmp_proto::message::{
    CHUNK_MAX_BYTES, CaptureStatus, MemoryRange, MemoryWindow, Message as Kmp, VmcoreComplete,
    VmcoreData, VmcoreStart, VmcoreStartFixed, WINDOWS_MAX,
};
use kmp_transport::connection::{Connection, ConnectionError};
use kmp_transport::peer::next_on_bulk;

use super::{HelpError, Job};

/// Number of shares that the daemon requests from a survivor before the first of them has arrived.
const AHEAD: usize = 2;
/// Maximum silence of a survivor after a request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time until a survivor confirms that it no longer uses the lent memory.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(2);

/// A survivor that was lent memory.
pub(super) struct Lent<'a> {
    pub(super) connection: Connection,
    pub(super) job: &'a Job,
    pub(super) loan: Loan,
}

impl Lent<'_> {
    /// Reads shares until none are left. At the end, it has given back all shares that it did not read.
    pub(super) async fn read_shares(
        &mut self,
        name: &str,
        helper: Arc<Helper>,
    ) -> Result<(), HelpError> {
        helper.reaches(self.reach());
        let mut asked = VecDeque::new();
        loop {
            while asked.len() < AHEAD {
                let share = next(&helper, &self.job.pace, asked.is_empty()).await;
                let Some(share) = share else { break };
                let sequence = self.ask_for(&share).await?;
                asked.push_back((share, sequence));
            }
            let Some((mut share, sequence)) = asked.pop_front() else {
                return Ok(());
            };
            let bytes = share.bytes();
            if !self.receive(&mut share, sequence).await? {
                helper.give_back(&share);
            } else if helper.deliver(share) {
                self.job.read.add(name, bytes);
            }
        }
    }

    /// Returns the ranges of the memory that the survivor can read through its loan.
    fn reach(&self) -> Vec<PhysRange> {
        let windows = self.loan.windows.iter().take(WINDOWS_MAX);
        let range = windows.map(|window| PhysRange {
            start: window.guest_address,
            end: window.guest_address.saturating_add(window.length),
        });
        range.collect()
    }

    async fn ask_for(&mut self, share: &Share) -> Result<u32, HelpError> {
        let LentPlace::PciPort(port) = &self.loan.place;
        let window = |window: &LentWindow| MemoryWindow {
            start: window.guest_address,
            length: window.length,
            offset: window.offset,
        };
        let range = |range: &PhysRange| MemoryRange {
            start: range.start,
            length: range.len(),
        };
        let windows = self.loan.windows.iter().take(WINDOWS_MAX);
        self.send(Kmp::VmcoreStart(VmcoreStart {
            fixed: VmcoreStartFixed {
                capture: self.job.capture,
                generation: self.job.generation,
                chunk_bytes: CHUNK_MAX_BYTES,
            },
            pci_port: Some(port.clone()),
            windows: windows.map(window).collect(),
            // A chunk of 256 pages has at most half as many runs.
            ranges: share.ranges().iter().map(range).collect(),
        }))
        .await
    }

    /// Sends a message. Returns its sequence.
    async fn send(&mut self, message: Kmp) -> Result<u32, HelpError> {
        let sent = self.connection.writer.send(&message);
        in_time(ANSWER_TIMEOUT, sent).await
    }

    /// Receives the data of the oldest VMCORE_START, which had the sequence `asked`. Returns whether the share is
    /// complete.
    async fn receive(&mut self, share: &mut Share, asked: u32) -> Result<bool, HelpError> {
        let mut receiving = Receiving::new(self.job.capture);
        loop {
            let next = next_on_bulk(&mut self.connection, memory);
            let frame = in_time(ANSWER_TIMEOUT, next).await?;
            if let Kmp::VmcoreStartReply(reply) = &frame.message {
                let (announced, found) = (share.bytes(), reply.bytes);
                if frame.header.sequence != asked {
                    return Err(HelpError::NotAsked("a reply to another request"));
                } else if announced != found {
                    return Err(HelpError::OtherTotal { announced, found });
                }
            }
            let Some(complete) = receiving.take(&frame.message, share)? else {
                continue;
            };
            let (announced, found) = (complete.bytes, receiving.bytes);
            if announced != found {
                return Err(HelpError::OtherTotal { announced, found });
            }
            let reply = Kmp::VmcoreCompleteReply(VmcoreComplete {
                bytes: receiving.bytes,
                ..complete
            });
            let sequence = frame.header.sequence;
            let replied = self.connection.writer.reply(&reply, sequence);
            in_time(ANSWER_TIMEOUT, replied).await?;
            return Ok(receiving.bytes == share.bytes());
        }
    }

    /// Tells the survivor that the daemon wants no more data, and waits until the survivor no longer uses the lent
    /// memory.
    pub(super) async fn let_go(&mut self) -> Result<(), HelpError> {
        let capture = self.job.capture;
        let end = Kmp::VmcoreComplete(VmcoreComplete {
            capture,
            bytes: 0,
            status: CaptureStatus::Complete,
        });
        let asked = self.send(end).await?;
        let reply = async {
            loop {
                let frame = next_on_bulk(&mut self.connection, memory).await?;
                let answer = frame.header.sequence == asked;
                match frame.message {
                    Kmp::VmcoreCompleteReply(reply) if answer && reply.capture == capture => {
                        return Ok(());
                    }
                    _ => {}
                }
            }
        };
        in_time(LET_GO_TIMEOUT, reply).await
    }
}

/// Returns true for messages that a survivor sends without a request.
fn memory(message: &Kmp) -> bool {
    matches!(message, Kmp::VmcoreData(_) | Kmp::VmcoreComplete(_))
}

/// Waits for the survivor, up to a timeout.
async fn in_time<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, ConnectionError>>,
) -> Result<T, HelpError> {
    let done = tokio::time::timeout(limit, work).await;
    Ok(done.map_err(|_| HelpError::Silent(limit))??)
}

/// Returns the next share, at the pace of the capture. Waits for a share only if `wait` is true.
async fn next(helper: &Arc<Helper>, pace: &Option<Arc<Pace>>, wait: bool) -> Option<Share> {
    let (helper, pace) = (Arc::clone(helper), pace.clone());
    #[expect(
        clippy::disallowed_methods,
        reason = "waits for what other threads do; runs of a test have no survivors that read"
    )]
    let taken = tokio::task::spawn_blocking(move || {
        let share = match wait {
            true => helper.take(),
            false => helper.take_now(),
        }?;
        if let Some(pace) = pace {
            pace.wait(usize::try_from(share.bytes()).unwrap_or(usize::MAX));
        }
        Some(share)
    });
    taken.await.ok().flatten()
}

/// The progress of one share.
struct Receiving {
    capture: u64,
    begun: bool,
    /// Lowest address that the next chunk may have.
    next: u64,
    bytes: u64,
}

impl Receiving {
    fn new(capture: u64) -> Self {
        Self {
            capture,
            begun: false,
            next: 0,
            bytes: 0,
        }
    }

    /// Handles a message. Returns it if it is the last one of the share.
    fn take(
        &mut self,
        message: &Kmp,
        share: &mut Share,
    ) -> Result<Option<VmcoreComplete>, HelpError> {
        match message {
            Kmp::VmcoreStartReply(reply) if !self.begun && reply.capture == self.capture => {
                self.begun = true;
                Ok(None)
            }
            Kmp::VmcoreData(data) if self.begun && data.fixed.capture == self.capture => {
                self.put(data, share)?;
                Ok(None)
            }
            Kmp::VmcoreComplete(complete) if self.begun && complete.capture == self.capture => {
                Ok(Some(*complete))
            }
            Kmp::Error(error) => Err(HelpError::Refused(error.clone())),
            other => Err(HelpError::NotAsked(other.msg_type().name())),
        }
    }

    /// Copies a chunk to its place in the share. Chunks arrive in address order, so no place is written twice.
    fn put(&mut self, data: &VmcoreData, share: &mut Share) -> Result<(), HelpError> {
        let (start, length) = (data.fixed.address, data.fixed.length);
        if length > CHUNK_MAX_BYTES.into() {
            return Err(HelpError::NotAsked("so large a chunk"));
        }
        let range = PhysRange {
            start,
            end: start.saturating_add(length),
        };
        let place = share.memory_at(range).filter(|place| !place.is_empty());
        let place = place.filter(|_| start >= self.next);
        let place = place.ok_or(HelpError::NotAsked("a chunk"))?;
        if !data.decode(place) {
            return Err(HelpError::Damaged(start));
        }
        self.next = range.end;
        self.bytes += length;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
