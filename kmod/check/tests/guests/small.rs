//! Small packets that wait for a program: each costs its kernel more than its credit pays for.

use crate::guest::{Machine, SERIES, Series};
use crate::hostile::{END_OF_MESSAGE, Header, NO_MORE, Op, Raw, SEQPACKET, STREAM};
use crate::{KERF, MESSAGES, commands};

/// The service that reads nothing until it is released.
const STALLED: u32 = 7011;

/// A program does not read for a while, and its peer sends small packets, as many as its credit pays for. None costs the
/// connection: the vsock core of Linux 6.12.95 has a limit on the buffers of a socket too.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn small_packets_wait_for_a_program_that_does_not_read() {
    for series in SERIES {
        let machine = Machine::new(2);
        let mut guest = machine.guest(
            1,
            series,
            &commands(&[
                KERF,
                "services",
                "say=serving",
                "until=0.rx_bytes.75000",
                "until=0.rx_bytes.150000",
                "until=0.rx_bytes.260210",
                "release",
                "say=released",
                "complaints",
                "say=end",
                "forever",
            ]),
        );
        guest.wait_for("KERF said serving");
        let mut raw = Raw::new(&machine, 1);
        raw.connect(STREAM, STALLED);
        let data = Header::new(STREAM, Op::Data, STALLED);
        // One byte at a time, one more than the core merges, and around the size at which a buffer is worth it.
        for (len, packets) in [(1, 150_000), (200, 300), (129, 300), (575, 10), (576, 10)] {
            for _ in 0..packets {
                raw.send(&data, &vec![1; len]);
            }
        }
        let total = 150_000 + 300 * 329 + 10 * 1151;
        guest.wait_for("KERF said released");
        let mut end = Header::new(STREAM, Op::Shutdown, STALLED);
        end.flags = NO_MORE;
        raw.send(&end, b"");
        assert_eq!(
            raw.take_data(),
            format!("{total} {total}").into_bytes(),
            "{series}"
        );
        guest.wait_for("KERF said end");
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

/// A program does not read for a while, and another one sends it small messages, to the guest itself and to another guest. The
/// sender is made to wait before they cost the connection.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn a_sender_of_small_messages_waits() {
    for (a, b) in Series::pairs() {
        let machine = Machine::new(3);
        let serve = [KERF, "services", "say=serving", "forever"];
        let mut server = machine.guest(1, a, &commands(&serve));
        server.wait_for("KERF said serving");
        let then = [
            KERF,
            "services",
            "link=1",
            "metered=1",
            "metered=3",
            "complaints",
        ];
        let mut client = machine.guest(2, b, &commands(&then));
        client.wait_for("KERF done");
        assert_eq!(client.failures(), Vec::<String>::new(), "{b} to {a}");
        assert_eq!(server.failures(), Vec::<String>::new(), "{a}");
    }
}

/// A program does not read, and messages of a byte come, each of which costs a buffer and a byte of credit. Linux 6.1 has no
/// limit on them and panicked at 93,000; now their socket is reset.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn small_messages_use_up_no_memory() {
    for series in SERIES {
        let machine = Machine::new(2);
        let mut guest = machine.guest(
            1,
            series,
            &commands(&[
                KERF,
                "services",
                "say=serving",
                "until=0.rx_packets.50000",
                "until=0.rx_packets.100000",
                "until=0.rx_packets.150000",
                "say=end",
                "complaints",
                "forever",
            ]),
        );
        guest.wait_for("KERF said serving");
        let mut raw = Raw::new(&machine, 1);
        raw.connect(SEQPACKET, MESSAGES);
        let mut message = Header::new(SEQPACKET, Op::Data, MESSAGES);
        message.flags = END_OF_MESSAGE;
        raw.flood(&mut guest, "KERF said end", u64::MAX, |_| (message, b"x"));
        // What waits for this side are the program's answers, and then the reset.
        while raw.take().op != Op::Reset as u16 {}
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}
