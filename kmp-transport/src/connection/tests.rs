use kmp_proto::message::{
    HeartbeatReq, MorphTransfer, MorphTransferFixed, StateProvider, TransferMode, TransferOp,
};
use tokio::io::AsyncReadExt;

use super::*;
use crate::link::memory;

fn probe() -> Message {
    Message::HeartbeatReq(HeartbeatReq {
        probe: 1,
        flags: 0,
        self_lag_us: 0,
    })
}

#[tokio::test]
async fn sequences_begin_at_1_and_wrap_to_1() {
    let (near, far) = memory();
    let (mut reader, _) = framed(far, Channel::Control);
    let (_, mut writer) = framed(near, Channel::Control);
    assert!(!writer.has_sent(1));
    for (next, sent) in [(None, 1), (None, 2), (Some(u32::MAX), u32::MAX), (None, 1)] {
        writer.next_sequence = next.unwrap_or(writer.next_sequence);
        assert_eq!(writer.send(&probe()).await.unwrap(), sent);
        assert_eq!(reader.next().await.unwrap().header.sequence, sent);
        assert!(writer.has_sent(sent));
        assert!(!writer.has_sent(0) && !writer.has_sent(sent.wrapping_add(1)));
    }
    assert!(writer.has_sent(u32::MAX), "before it wrapped");
}

#[tokio::test]
async fn a_timestamp_is_the_time_since_this_system_booted() {
    let (near, far) = memory();
    let (mut reader, _) = framed(far, Channel::Control);
    let (_, mut writer) = framed(near, Channel::Control);
    let now = || {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).unwrap();
        u64::try_from(std::time::Duration::from(now).as_nanos()).unwrap()
    };
    let before = now();
    writer.send(&probe()).await.unwrap();
    let timestamp = reader.next().await.unwrap().header.timestamp;
    assert!((before..=now()).contains(&timestamp), "{timestamp}");
}

fn large() -> MorphTransfer {
    let fixed = MorphTransferFixed {
        session: 1,
        offset: 0,
        total_bytes: 0,
        dirty_bytes: 0,
        round: 0,
        flags: 0,
        chunk_crc32: 0,
        op: TransferOp::Chunk,
        mode: TransferMode::Rounds,
        provider: StateProvider::Cooperative,
    };
    MorphTransfer::chunk(fixed, vec![0; 512 * 1024])
}

/// A rare large message leaves no large buffer on a channel that then sends only small ones.
#[tokio::test]
async fn a_channel_keeps_no_large_buffer_unless_it_is_bulk() {
    for channel in [Channel::Heartbeat, Channel::Control, Channel::Bulk] {
        let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
        let reads = tokio::spawn(async move {
            let mut sink = vec![0; 64 * 1024];
            while theirs.read(&mut sink).await.is_ok_and(|length| length > 0) {}
        });
        let (_reader, mut writer) = framed(Box::new(ours), channel);
        let large = Message::MorphTransfer(large());
        writer.send(&large).await.unwrap();
        let kept = writer.buffer.capacity();
        assert_eq!(kept > 0, channel == Channel::Bulk, "{channel:?}: {kept}");
        drop((_reader, writer));
        reads.await.unwrap();
    }
}
