//! A link that injects faults, deterministically for the same seed and traffic.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// Most bytes taken from the decorated link at a time: what one fault can strike.
const PIECE_MAX_BYTES: usize = 512;
/// Most bytes delivered twice at a time.
const REPEAT_MAX_BYTES: usize = 64;

/// How often which fault strikes. Chances are in parts of 1000: for each piece that is read, and for each
/// write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan {
    /// A write or read is cut to a part of its length (a legal thing for a stream to do).
    pub short_permille: u16,
    /// A bit of what is read is flipped.
    pub flip_permille: u16,
    /// Received data is lost.
    pub loss_permille: u16,
    /// Bytes just read are delivered again.
    pub repeat_permille: u16,
    /// The stream ends, in both directions and for good.
    pub close_permille: u16,
    /// The next read or write is delayed.
    pub delay_permille: u16,
    /// For how long.
    pub delay: Duration,
}

/// A link with faults.
pub struct FaultyLink<L> {
    inner: L,
    plan: FaultPlan,
    random: u64,
    /// Read, and not delivered yet: a piece and its repetition at most.
    held: Vec<u8>,
    read_delay: Option<Pin<Box<Sleep>>>,
    write_delay: Option<Pin<Box<Sleep>>>,
    /// To how much the write that waits is cut.
    write_limit: Option<usize>,
    closed: bool,
}

impl<L> FaultyLink<L> {
    /// Decorates `inner`.
    pub fn new(inner: L, plan: FaultPlan, seed: u64) -> Self {
        Self {
            inner,
            plan,
            random: seed | 1,
            held: Vec::new(),
            read_delay: None,
            write_delay: None,
            write_limit: None,
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

    /// `length`, or less.
    fn cut(&mut self, length: usize) -> usize {
        if length > 1 && self.strikes(self.plan.short_permille) {
            1 + self.below(length)
        } else {
            length
        }
    }

    fn delay(&mut self) -> Option<Pin<Box<Sleep>>> {
        let struck = self.strikes(self.plan.delay_permille);
        struck.then(|| Box::pin(sleep(self.plan.delay)))
    }

    /// Applies faults to a piece that was read.
    fn strike(&mut self, piece: &mut [u8]) {
        self.closed = self.strikes(self.plan.close_permille);
        if self.closed || self.strikes(self.plan.loss_permille) {
            return;
        }
        if self.strikes(self.plan.flip_permille) {
            let at = self.below(piece.len());
            piece[at] ^= 1 << (self.dice() % 8);
        }
        self.held.extend_from_slice(piece);
        if self.strikes(self.plan.repeat_permille) {
            let again = piece.len().min(REPEAT_MAX_BYTES);
            self.held.extend_from_slice(&piece[..again]);
        }
        self.read_delay = self.delay();
    }
}

/// Waits for the end of a delay, if there is one.
fn poll_delay(delay: &mut Option<Pin<Box<Sleep>>>, cx: &mut Context<'_>) -> Poll<()> {
    if let Some(wait) = delay {
        ready!(wait.as_mut().poll(cx));
        *delay = None;
    }
    Poll::Ready(())
}

impl<L: AsyncRead + Unpin> AsyncRead for FaultyLink<L> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            ready!(poll_delay(&mut this.read_delay, cx));
            if this.closed {
                return Poll::Ready(Ok(()));
            }
            if !this.held.is_empty() {
                let count = this.cut(this.held.len().min(buf.remaining()));
                buf.put_slice(&this.held[..count]);
                this.held.drain(..count);
                return Poll::Ready(Ok(()));
            }
            let mut piece = [0; PIECE_MAX_BYTES];
            let mut read = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut read))?;
            let piece = read.filled_mut();
            if piece.is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.strike(piece);
        }
    }
}

impl<L: AsyncWrite + Unpin> AsyncWrite for FaultyLink<L> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(poll_delay(&mut this.write_delay, cx));
        if this.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let limit = match this.write_limit {
            Some(limit) => limit,
            None => this.cut(bytes.len()),
        };
        this.write_limit = Some(limit);
        let part = &bytes[..limit.min(bytes.len())];
        let count = ready!(Pin::new(&mut this.inner).poll_write(cx, part))?;
        this.write_limit = None;
        this.closed = this.strikes(this.plan.close_permille);
        this.write_delay = this.delay();
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}
