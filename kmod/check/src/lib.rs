//! The C of `kmod/` that does not need a kernel, behind safe calls, for tests.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr::NonNull;
use std::time::Duration;

use kmorph_kerf_ring::LinkEvent;
use kmorph_kerf_ring::layout::PACKET_MAX;

const REPLY_MAX: usize = 320;

#[repr(C)]
struct RawEnd {
    _private: [u8; 0],
}

#[repr(C)]
struct RawKmp {
    _private: [u8; 0],
}

unsafe extern "C" {
    fn shim_format(mem: *mut c_void, size: u64, peers: u32, slots: u32, bytes: u32) -> c_int;
    fn shim_open(mem: *mut c_void, size: u64, me: u32, peer: u32, error: *mut c_int)
    -> *mut RawEnd;
    fn shim_free(end: *mut RawEnd);
    fn shim_detach(end: *mut RawEnd, state: u32, reason: *const c_char, len: u32);
    fn shim_poll(end: *mut RawEnd, now_ms: u64) -> c_int;
    fn shim_up(end: *const RawEnd) -> bool;
    fn shim_waiting(end: *const RawEnd) -> bool;
    fn shim_restate(end: *mut RawEnd);
    fn shim_corrupt(end: *mut RawEnd, now_ms: u64) -> bool;
    fn shim_put(end: *mut RawEnd, data: *const u8, len: u32, control: bool) -> c_int;
    fn shim_take(end: *mut RawEnd, to: *mut u8, len: *mut u32) -> c_int;
    fn shim_sender_must_ring(end: *mut RawEnd) -> bool;
    fn shim_receiver_must_ring(end: *mut RawEnd) -> bool;
    fn shim_sleep(end: *mut RawEnd);
    fn shim_awake(end: *mut RawEnd);
    fn shim_want_room(end: *mut RawEnd);
    fn shim_has_room(end: *mut RawEnd);
    fn shim_kmp_new(instance: *const c_char, generation: u64) -> *mut RawKmp;
    fn shim_kmp_free(kmp: *mut RawKmp);
    fn shim_kmp_feed(
        kmp: *mut RawKmp,
        data: *mut *const u8,
        len: *mut u32,
        reply: *mut u8,
        reply_len: *mut u32,
    ) -> c_int;
}

/// What a call on a ring came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Ok,
    /// Nothing there.
    Empty,
    /// No room.
    Full,
    /// The peer broke a rule.
    Corrupt,
    /// No packet has that length.
    TooLong,
}

impl From<c_int> for Outcome {
    fn from(number: c_int) -> Self {
        match number {
            0 => Self::Ok,
            1 => Self::Empty,
            2 => Self::Full,
            3 => Self::Corrupt,
            _ => Self::TooLong,
        }
    }
}

/// Makes a region; the C side's error number when it refuses.
///
/// # Safety
/// `size` bytes at `mem` are mapped and writable.
///
/// # Errors
/// A negative `errno`.
pub unsafe fn format(
    mem: *mut u8,
    size: u64,
    peers: u32,
    slots: u32,
    bytes: u32,
) -> Result<(), i32> {
    // SAFETY: as the caller promises.
    match unsafe { shim_format(mem.cast(), size, peers, slots, bytes) } {
        0 => Ok(()),
        error => Err(error),
    }
}

/// The C side's end of a link.
pub struct End(NonNull<RawEnd>);

// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for End {}

impl End {
    /// Attaches the peer `me` and makes its end towards `peer`.
    ///
    /// # Safety
    /// `size` bytes at `mem` are mapped and writable for as long as the end lives.
    ///
    /// # Errors
    /// A negative `errno` when the memory is no region that it can use.
    pub unsafe fn open(mem: *mut u8, size: u64, me: u32, peer: u32) -> Result<Self, i32> {
        let mut error = 0;
        // SAFETY: as the caller promises.
        let end = unsafe { shim_open(mem.cast(), size, me, peer, &raw mut error) };
        NonNull::new(end).map(Self).ok_or(error)
    }

    /// Says that it has left (3) or panicked (4).
    pub fn detach(&mut self, state: u32, reason: &str) {
        let len = u32::try_from(reason.len()).unwrap_or(u32::MAX);
        // SAFETY: the end is live; the reason's bytes are read only.
        unsafe { shim_detach(self.0.as_ptr(), state, reason.as_ptr().cast(), len) }
    }

    /// Looks at the peer at the time `now`, of any clock that goes on.
    pub fn poll(&mut self, now: Duration) -> LinkEvent {
        // SAFETY: the end is live; likewise in every call below.
        match unsafe { shim_poll(self.0.as_ptr(), milliseconds(now)) } {
            1 => LinkEvent::Up,
            2 => LinkEvent::CameUp,
            3 => LinkEvent::Lost,
            _ => LinkEvent::Down,
        }
    }

    /// Whether the link is up.
    pub fn is_up(&self) -> bool {
        // SAFETY: as above.
        unsafe { shim_up(self.0.as_ptr()) }
    }

    /// Whether the link was lost and is not begun anew yet.
    pub fn is_waiting(&self) -> bool {
        // SAFETY: as above.
        unsafe { shim_waiting(self.0.as_ptr()) }
    }

    /// States again that the peer is there, where another has written over it.
    pub fn restate(&mut self) {
        // SAFETY: as above.
        unsafe { shim_restate(self.0.as_ptr()) }
    }

    /// Judges a corrupt ring; true when the peer is to blame.
    pub fn corrupt(&mut self, now: Duration) -> bool {
        // SAFETY: as above.
        unsafe { shim_corrupt(self.0.as_ptr(), milliseconds(now)) }
    }

    /// Sends a packet.
    pub fn put(&mut self, data: &[u8], control: bool) -> Outcome {
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        // SAFETY: as above; the data are read only.
        unsafe { shim_put(self.0.as_ptr(), data.as_ptr(), len, control) }.into()
    }

    /// Takes a packet into `to`.
    pub fn take(&mut self, to: &mut Vec<u8>) -> Outcome {
        let mut len = 0;
        to.resize(PACKET_MAX as usize, 0);
        // SAFETY: as above; `to` has room for the longest packet.
        let outcome = unsafe { shim_take(self.0.as_ptr(), to.as_mut_ptr(), &raw mut len) };
        to.truncate(len as usize);
        outcome.into()
    }

    /// Whether the peer's receiver is to be rung.
    pub fn sender_must_ring(&mut self) -> bool {
        // SAFETY: as above.
        unsafe { shim_sender_must_ring(self.0.as_ptr()) }
    }

    /// Whether the peer's sender is to be rung.
    pub fn receiver_must_ring(&mut self) -> bool {
        // SAFETY: as above.
        unsafe { shim_receiver_must_ring(self.0.as_ptr()) }
    }

    /// The receiver sleeps.
    pub fn sleep(&mut self) {
        // SAFETY: as above.
        unsafe { shim_sleep(self.0.as_ptr()) }
    }

    /// The receiver is awake.
    pub fn awake(&mut self) {
        // SAFETY: as above.
        unsafe { shim_awake(self.0.as_ptr()) }
    }

    /// The sender waits for room.
    pub fn want_room(&mut self) {
        // SAFETY: as above.
        unsafe { shim_want_room(self.0.as_ptr()) }
    }

    /// The sender does not wait any more.
    pub fn has_room(&mut self) {
        // SAFETY: as above.
        unsafe { shim_has_room(self.0.as_ptr()) }
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Drop for End {
    fn drop(&mut self) {
        // SAFETY: it was made by shim_open, and is freed once.
        unsafe { shim_free(self.0.as_ptr()) }
    }
}

/// The kernel's heartbeat responder: one connection.
pub struct Responder(NonNull<RawKmp>);

impl Responder {
    /// A connection to the kernel of `instance` and `generation`.
    ///
    /// # Panics
    /// When the name has a NUL in it.
    #[expect(clippy::expect_used, reason = "only tests use it")]
    pub fn new(instance: &str, generation: u64) -> Self {
        let name = CString::new(instance).expect("a name without NUL");
        // SAFETY: the name lives during the call.
        let kmp = unsafe { shim_kmp_new(name.as_ptr(), generation) };
        Self(NonNull::new(kmp).expect("memory"))
    }

    /// Feeds it bytes of the stream. Returns what it answers, and whether it goes on.
    pub fn feed(&mut self, mut input: &[u8]) -> (Vec<u8>, bool) {
        let mut answer = Vec::new();
        loop {
            let mut reply = [0; REPLY_MAX];
            let mut reply_len = 0;
            let mut data = input.as_ptr();
            let mut len = u32::try_from(input.len()).unwrap_or(u32::MAX);
            // SAFETY: `data` and `len` are the input; `reply` has room for the longest answer.
            let result = unsafe {
                shim_kmp_feed(
                    self.0.as_ptr(),
                    &raw mut data,
                    &raw mut len,
                    reply.as_mut_ptr(),
                    &raw mut reply_len,
                )
            };
            input = &input[input.len() - len as usize..];
            answer.extend_from_slice(&reply[..reply_len as usize]);
            match result {
                0 => return (answer, true),
                2 => return (answer, false),
                _ => {}
            }
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        // SAFETY: it was made by shim_kmp_new, and is freed once.
        unsafe { shim_kmp_free(self.0.as_ptr()) }
    }
}
