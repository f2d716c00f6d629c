//! A heartbeat costs no memory: writing and reading a heartbeat allocate nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use kmp_proto::codec::{Decoder, encode};
use kmp_proto::message::{
    Health, HeartbeatReq, HeartbeatRsp, HeartbeatRspFixed, Message, WorkloadState,
};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is passed on unchanged to the system's allocator; counting touches only a
// thread-local that needs neither allocation nor destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller upholds the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn heartbeats() -> [Message; 2] {
    let request = HeartbeatReq {
        probe: 1,
        flags: 0,
        self_lag_us: 2,
    };
    let response = HeartbeatRsp::from(HeartbeatRspFixed {
        probe: 1,
        health: Health::Healthy,
        workload: WorkloadState::Running,
        cpu_count: 1,
        cpu_busy_permille: 2,
        pressure_cpu: 3,
        pressure_memory: 4,
        pressure_io: 5,
        memory_total_kib: 6,
        memory_available_kib: 7,
        io_read_bytes: 8,
        io_write_bytes: 9,
    });
    [
        Message::HeartbeatReq(request),
        Message::HeartbeatRsp(response),
    ]
}

#[test]
fn a_heartbeat_is_written_and_read_without_allocating() {
    let messages = heartbeats();
    let mut out = Vec::with_capacity(256);
    let mut decoder = Decoder::new();
    let before = ALLOCATIONS.with(Cell::get);
    let mut equal = true;
    for message in &messages {
        out.clear();
        equal &= encode(message, 1, 1, &mut out).is_ok();
        let mut input = &out[..];
        equal &= matches!(decoder.feed(&mut input), Ok(Some(frame)) if frame.message == *message);
    }
    let allocations = ALLOCATIONS.with(Cell::get) - before;
    assert!(equal);
    assert_eq!(allocations, 0);
}
