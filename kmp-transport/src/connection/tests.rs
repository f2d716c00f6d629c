use kmp_proto::message::HeartbeatReq;

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
        assert!(!writer.has_sent(0) && !writer.has_sent(writer.next_sequence));
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
