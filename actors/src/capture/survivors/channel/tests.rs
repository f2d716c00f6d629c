//! Tests a survivor that sends the requested data, and one that does not.

use kmorph_vmcore::writer::shares::Shares;
use kmorph_vmcore::writer::{self, Contents, Control, Options, Output};
use kmorph_vmcore::{MemoryError, PhysicalMemory};

use kmorph_backends::contract::MemoryRange as HostRange;
use kmp_proto::message::{Channel, HeartbeatReq, Hello, HelloFixed, PeerRole};
use kmp_proto::wire::{ErrorCode, VERSION};
use kmp_transport::connection::{greet, welcome};
use kmp_transport::link::memory;

use super::*;

const CAPTURE: u64 = 5;
const PAGE: u64 = 4096;

/// Two pages, a missing page, and one more page. Only others can read them.
struct Beyond([PhysRange; 2]);

impl PhysicalMemory for Beyond {
    fn ranges(&self) -> &[PhysRange] {
        &self.0
    }

    fn read(&self, phys: u64, _: &mut [u8]) -> Result<(), MemoryError> {
        Err(MemoryError::Absent { phys })
    }
}

/// Passes a share of three pages to `test`, which receives into it.
fn with_share(test: impl FnOnce(&mut Share, &mut Receiving)) {
    with_helper(|helper| {
        let mut share = helper.take().unwrap();
        test(&mut share, &mut Receiving::new(CAPTURE));
    });
}

/// Passes a helper to `test`; the helper has a share of three pages.
fn with_helper(test: impl FnOnce(&Helper)) {
    let range = |first: u64, behind: u64| PhysRange {
        start: first * PAGE,
        end: behind * PAGE,
    };
    let memory = Beyond([range(0, 2), range(3, 4)]);
    let shares = Arc::<Shares>::default();
    let helper = shares.helper();
    helper.reaches(memory.0.to_vec());
    let mut control = Control::default();
    control.shares = Some(Arc::clone(&shares));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump");
    let contents = Contents {
        memory: &memory,
        kernel: None,
        cpus: &[],
        level_of_source: 0,
    };
    let options = Options {
        output: Output::Elf,
        level: 0,
        threads: 1,
        time: Duration::ZERO,
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "writer and helper wait for each other"
    )]
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| writer::write(contents, options, &control, &path));
        test(&helper);
        drop(helper);
        writing.join().unwrap().unwrap();
    });
}

fn complete() -> VmcoreComplete {
    VmcoreComplete {
        capture: CAPTURE,
        bytes: 0,
        status: CaptureStatus::Complete,
    }
}

fn chunk(page: u64, pages: usize) -> Kmp {
    let memory = vec![7; pages * 4096];
    Kmp::VmcoreData(VmcoreData::chunk(CAPTURE, page * PAGE, &memory))
}

#[test]
fn what_was_asked_for_is_taken() {
    with_share(|share, receiving| {
        assert_eq!(share.bytes(), 3 * PAGE);
        for message in [Kmp::VmcoreStartReply(complete()), chunk(0, 2), chunk(3, 1)] {
            assert!(receiving.take(&message, share).unwrap().is_none());
        }
        let end = Kmp::VmcoreComplete(complete());
        assert!(receiving.take(&end, share).unwrap().is_some());
        assert_eq!(receiving.bytes, share.bytes());
    });
}

#[test]
fn what_is_missing_is_noticed() {
    with_share(|share, receiving| {
        for message in [Kmp::VmcoreStartReply(complete()), chunk(0, 1), chunk(3, 1)] {
            receiving.take(&message, share).unwrap();
        }
        assert_eq!(receiving.bytes, 2 * PAGE);
    });
}

#[test]
fn what_was_not_asked_for_ends_the_channel() {
    let cases = [
        ("not begun", vec![chunk(0, 1)]),
        ("begun twice", vec![Kmp::VmcoreStartReply(complete())]),
        ("a hole", vec![chunk(2, 1)]),
        ("over the end", vec![chunk(1, 2)]),
        ("over all", vec![chunk(0, 4)]),
        ("far away", vec![chunk(u64::MAX / PAGE, 1)]),
        ("twice", vec![chunk(0, 2), chunk(0, 2)]),
        ("backwards", vec![chunk(3, 1), chunk(0, 1)]),
        ("overlapping", vec![chunk(0, 2), chunk(1, 1)]),
        ("nothing", vec![chunk(0, 0)]),
        (
            "another message",
            vec![Kmp::VmcoreCompleteReply(complete())],
        ),
        (
            "another capture",
            vec![Kmp::VmcoreComplete(VmcoreComplete {
                capture: 6,
                ..complete()
            })],
        ),
    ];
    for (what, messages) in cases {
        with_share(|share, receiving| {
            if what != "not begun" {
                let begun = Kmp::VmcoreStartReply(complete());
                receiving.take(&begun, share).unwrap();
            }
            let last = messages.iter().map(|m| receiving.take(m, share)).last();
            assert!(matches!(last, Some(Err(HelpError::NotAsked(_)))), "{what}");
        });
    }
}

#[test]
fn a_chunk_that_was_changed_on_the_way_ends_the_channel() {
    with_share(|share, receiving| {
        let begun = Kmp::VmcoreStartReply(complete());
        receiving.take(&begun, share).unwrap();
        let mut data = VmcoreData::chunk(CAPTURE, 0, &[7; 4096]);
        data.data[9] ^= 1;
        let taken = receiving.take(&Kmp::VmcoreData(data), share);
        assert!(matches!(taken, Err(HelpError::Damaged(0))));
    });
}

fn hello(role: PeerRole) -> Hello {
    Hello {
        fixed: HelloFixed {
            version_min: VERSION,
            version_max: VERSION,
            role,
            channel: Channel::Bulk,
            flags: 0,
            generation: 1,
            boot_id: [1; 16],
            features: 4,
            session: CAPTURE,
            incarnation: 0,
        },
        instance: "web".to_owned(),
        kernel_release: String::new(),
        agent_version: String::new(),
        nonce: None,
        proof: None,
    }
}

/// Runs the daemon against a survivor that sends `sent` after a request for three pages with the sequence 2.
/// Returns the daemon's result and its messages to the survivor.
fn received(sent: Vec<(Kmp, Option<u32>)>) -> (Result<bool, HelpError>, Vec<Kmp>) {
    let mut received = None;
    with_helper(|helper| {
        let mut share = helper.take().unwrap();
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        received = Some(runtime.block_on(receive(&mut share, sent)));
    });
    received.unwrap()
}

async fn receive(
    share: &mut Share,
    sent: Vec<(Kmp, Option<u32>)>,
) -> (Result<bool, HelpError>, Vec<Kmp>) {
    let (near, far) = memory();
    let instance = hello(PeerRole::Instance);
    let (ours, theirs) = tokio::join!(
        greet(near, hello(PeerRole::Daemon)),
        welcome(far, &instance)
    );
    let (connection, mut survivor) = (ours.unwrap(), theirs.unwrap());
    let file = tempfile::NamedTempFile::new().unwrap();
    let range = HostRange {
        host_path: file.path().to_owned(),
        guest_address: 0,
        length: 4 * PAGE,
        host_offset: 0,
    };
    let job = Job::new(CAPTURE, 3, &[range], None).unwrap();
    let loan = Loan {
        place: LentPlace::PciPort("0000:00:1e.0".to_owned()),
        windows: Vec::new(),
    };
    let mut lent = Lent {
        connection,
        job: &job,
        loan,
    };
    let sequence = lent.ask_for(share).await.unwrap();
    let asked = survivor.reader.next().await.unwrap();
    assert_eq!((asked.header.sequence, sequence), (2, 2));
    for (message, reply) in sent {
        match reply {
            Some(sequence) => survivor.writer.reply(&message, sequence).await.unwrap(),
            None => drop(survivor.writer.send(&message).await.unwrap()),
        }
    }
    let whole = lent.receive(share, sequence).await;
    drop(lent);
    let mut said = Vec::new();
    while let Ok(frame) = survivor.reader.next().await {
        said.push(frame.message);
    }
    (whole, said)
}

fn of_bytes(bytes: u64) -> VmcoreComplete {
    VmcoreComplete {
        bytes,
        ..complete()
    }
}

#[test]
fn a_survivor_says_how_much_it_will_send_and_has_sent_or_the_channel_ends() {
    let three = 3 * PAGE;
    let begun = |bytes, sequence| (Kmp::VmcoreStartReply(of_bytes(bytes)), Some(sequence));
    let all = [(chunk(0, 2), None), (chunk(3, 1), None)];
    let done = |bytes| (Kmp::VmcoreComplete(of_bytes(bytes)), None);
    let sent = |begun, done| {
        let [first, second] = all.clone();
        vec![begun, first, second, done]
    };
    let (whole, said) = received(sent(begun(three, 2), done(three)));
    assert!(whole.unwrap());
    assert_eq!(
        said,
        [Kmp::VmcoreCompleteReply(of_bytes(three))],
        "what it took"
    );
    for (what, messages) in [
        (
            "less was to come",
            sent(begun(three - PAGE, 2), done(three)),
        ),
        ("less was sent", sent(begun(three, 2), done(three - PAGE))),
        (
            "an answer to another request",
            sent(begun(three, 1), done(three)),
        ),
    ] {
        let (ended, said) = received(messages);
        assert!(ended.is_err(), "{what}");
        assert!(said.is_empty(), "{what}: {said:?}");
    }
}

#[test]
fn a_request_that_belongs_on_another_channel_is_refused_and_the_channel_goes_on() {
    let probe = Kmp::HeartbeatReq(HeartbeatReq {
        probe: 1,
        flags: 0,
        self_lag_us: 0,
    });
    let (whole, said) = received(vec![
        (probe, None),
        (Kmp::VmcoreStartReply(of_bytes(3 * PAGE)), Some(2)),
        (chunk(0, 2), None),
        (Kmp::VmcoreComplete(of_bytes(2 * PAGE)), None),
    ]);
    assert!(!whole.unwrap(), "a page could not be read");
    let [Kmp::Error(error), Kmp::VmcoreCompleteReply(taken)] = &said[..] else {
        panic!("{said:?}");
    };
    assert_eq!(error.code, ErrorCode::UnexpectedInState);
    assert_eq!(taken.bytes, 2 * PAGE);
}
