//! A survivor that sends what it was asked for, and one that does not.

use kmorph_vmcore::writer::shares::Shares;
use kmorph_vmcore::writer::{self, Contents, Control, Options, Output};
use kmorph_vmcore::{MemoryError, PhysicalMemory};

use super::*;

const CAPTURE: u64 = 5;
const PAGE: u64 = 4096;

/// Two pages, and one behind a page that is not there; all of them only others can read.
struct Beyond([PhysRange; 2]);

impl PhysicalMemory for Beyond {
    fn ranges(&self) -> &[PhysRange] {
        &self.0
    }

    fn read(&self, phys: u64, _: &mut [u8]) -> Result<(), MemoryError> {
        Err(MemoryError::Absent { phys })
    }
}

/// Has `test` receive a share of three pages.
fn with_share(test: impl FnOnce(&mut Share, &mut Receiving)) {
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
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| writer::write(contents, options, &control, &path));
        let mut share = helper.take().unwrap();
        test(&mut share, &mut Receiving::new(CAPTURE));
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
