//! A link that misbehaves on purpose, the same way for the same seed.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// How often which fault strikes. Chances are per operation, in parts of 1000.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan {
    /// A write or read is cut to a part of its length (a legal thing for a stream to do).
    pub short_permille: u16,
    /// A bit of what is read is flipped.
    pub flip_permille: u16,
    /// Bytes just read are delivered again.
    pub repeat_permille: u16,
    /// The stream ends.
    pub close_permille: u16,
    /// An operation is held up.
    pub delay_permille: u16,
    /// For how long.
    pub delay: Duration,
}

/// A link with faults.
pub struct FaultyLink<L> {
    inner: L,
    plan: FaultPlan,
    random: u64,
    delay: Option<Pin<Box<Sleep>>>,
    repeat: Vec<u8>,
    closed: bool,
}

/// Most bytes delivered twice at a time.
const REPEAT_MAX_BYTES: usize = 64;

impl<L> FaultyLink<L> {
    /// Decorates `inner`.
    pub fn new(inner: L, plan: FaultPlan, seed: u64) -> Self {
        let (delay, repeat) = (None, Vec::new());
        Self {
            inner,
            plan,
            random: seed | 1,
            delay,
            repeat,
            closed: false,
        }
    }

    /// xorshift64*: faults need to be repeatable, not unpredictable.
    fn dice(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    fn strikes(&mut self, permille: u16) -> bool {
        permille > 0 && self.dice() % 1000 < u64::from(permille)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.dice()).unwrap_or(0) % limit.max(1)
    }

    /// Holds up the operation now and then; decides about closing.
    fn poll_gate(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.delay.is_none() && self.strikes(self.plan.delay_permille) {
            self.delay = Some(Box::pin(tokio::time::sleep_until(
                Instant::now() + self.plan.delay,
            )));
        }
        if let Some(delay) = &mut self.delay {
            ready!(delay.as_mut().poll(cx));
            self.delay = None;
        }
        if self.strikes(self.plan.close_permille) {
            self.closed = true;
        }
        Poll::Ready(())
    }
}

impl<L: AsyncRead + Unpin> AsyncRead for FaultyLink<L> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.closed {
            return Poll::Ready(Ok(()));
        }
        if !this.repeat.is_empty() {
            let count = this.repeat.len().min(buf.remaining());
            buf.put_slice(&this.repeat[..count]);
            this.repeat.drain(..count);
            return Poll::Ready(Ok(()));
        }
        let limit = if this.strikes(this.plan.short_permille) {
            1 + this.below(buf.remaining())
        } else {
            buf.remaining()
        };
        let start = buf.filled().len();
        let mut part = buf.take(limit);
        ready!(Pin::new(&mut this.inner).poll_read(cx, &mut part))?;
        let count = part.filled().len();
        // SAFETY-free advance: the bytes were initialised by the inner read into the same buffer.
        let bytes = part.filled().to_vec();
        buf.set_filled(start);
        let mut bytes = bytes;
        if count > 0 && this.strikes(this.plan.flip_permille) {
            let at = this.below(count);
            bytes[at] ^= 1 << (this.dice() % 8);
        }
        buf.put_slice(&bytes);
        if count > 0 && this.strikes(this.plan.repeat_permille) {
            this.repeat = bytes[..count.min(REPEAT_MAX_BYTES)].to_vec();
        }
        if this.poll_gate(cx).is_pending() {
            // What was read is kept for after the delay.
            this.repeat.splice(0..0, bytes);
            buf.set_filled(start);
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

impl<L: AsyncWrite + Unpin> AsyncWrite for FaultyLink<L> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(this.poll_gate(cx));
        let count = if this.strikes(this.plan.short_permille) && !bytes.is_empty() {
            1 + this.below(bytes.len())
        } else {
            bytes.len()
        };
        Pin::new(&mut this.inner).poll_write(cx, &bytes[..count])
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}
