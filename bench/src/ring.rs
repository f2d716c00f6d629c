//! The rings of kerf-vsock between two processes, compared with minimal carriers: a flag followed by the bytes, and a
//! pair of eventfds.

use std::num::NonZeroUsize;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use kmorph_kerf_ring::{Class, Geometry, Link, LinkEvent, Mapped, Memory, PutError, Region};
use kmp_transport::kerf::SharedMemory;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit, median};

const GROUP: &str = "ring";
/// The geometry of `kmorph-kerf-host`: two peers.
const SLOTS: u32 = 256;
const BYTES: u32 = 1024 * 1024;
/// Size of a heartbeat frame, bytes.
const SMALL_BYTES: usize = 80;
/// Size of the share of a morph's state that is sent in one piece, and of its packets, bytes.
const LARGE_BYTES: usize = 210_000;
const PACKET_BYTES: usize = 32 * 1024 - 512;
/// Number of rounds, in which the arrangements take turns, and numbers of round trips in each.
const ROUNDS: usize = 15;
const TRIPS: usize = 2_000;
const LARGE_TRIPS: usize = 200;
/// Spin time before the sleep in [`Wait::SpinsThenSleeps`]: longer than a message takes.
const BRIEFLY: Duration = Duration::from_micros(20);
/// A message that tells the other process to exit.
const END: [u8; 1] = [0];

/// The way in which an end waits for the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// Spins all the time.
    Spins,
    /// Sleeps until the doorbell rings.
    Sleeps,
    /// Spins for [`BRIEFLY`], then sleeps.
    SpinsThenSleeps,
}

pub(crate) fn run() -> Found {
    let cpus = available_cpus();
    let [one, other] = [cpus.first(), cpus.get(1)].map(|cpu| cpu.copied().unwrap_or(0));
    let (apart, together) = ((one, other), (one, one));
    let [mut bare, mut spinning, mut briefly] = [(); 3].map(|()| Vec::new());
    let mut large = Vec::new();
    let mut bells = [apart, together].map(|_| Beside::default());
    for _ in 0..ROUNDS {
        bare.extend(bare_trips(apart));
        spinning.extend(trips(apart, Wait::Spins));
        briefly.extend(trips(apart, Wait::SpinsThenSleeps));
        for (cpus, beside) in [apart, together].into_iter().zip(&mut bells) {
            beside.add(trips(cpus, Wait::Sleeps), eventfd_trips(cpus));
        }
        large.extend(large_trips(apart));
    }
    let one_way = |what: &str, values| Figure::of(GROUP, what, Unit::Nanoseconds, values);
    let mut figures = vec![
        one_way("80 bytes, a flag and the bytes, both spin", bare),
        one_way("80 bytes over the ring, both spin", spinning).bar(Bar::at_most(Of::P50, 500.0)),
        one_way(
            "80 bytes over the ring, spinning 20 µs, then asleep",
            briefly,
        )
        .bar(Bar::at_most(Of::P50, 2_000.0)),
    ];
    for (what, beside) in ["two CPUs", "one CPU"].into_iter().zip(bells) {
        figures.extend(beside.figures(what));
    }
    figures.push(
        one_way("210 kB over the ring, until answered, both spin", large)
            .bar(Bar::at_most(Of::P50, 100_000.0)),
    );
    let remark = format!(
        "ring: two processes; half of each round trip, but for 210 kB; {ROUNDS} rounds of {TRIPS} round trips"
    );
    Found {
        figures,
        remarks: vec![remark],
    }
}

/// Times of the ring with doorbells, of eventfds alone, and their ratios.
#[derive(Default)]
struct Beside {
    ring: Vec<f64>,
    eventfd: Vec<f64>,
    ratios: Vec<f64>,
}

impl Beside {
    fn add(&mut self, ring: Vec<f64>, eventfd: Vec<f64>) {
        self.ratios.push(median(&ring) / median(&eventfd));
        self.ring.extend(ring);
        self.eventfd.extend(eventfd);
    }

    fn figures(self, cpus: &str) -> [Figure; 3] {
        let one_way = |what: &str, values| {
            Figure::of(GROUP, format!("{what}, {cpus}"), Unit::Nanoseconds, values)
        };
        let ratios = Figure::of(
            GROUP,
            format!("doorbells, against eventfds alone, {cpus}"),
            Unit::Ratio,
            self.ratios,
        );
        [
            one_way("80 bytes over the ring, doorbells", self.ring),
            one_way("eventfds alone", self.eventfd),
            ratios.bar(Bar::at_most(Of::P50, 1.15)),
        ]
    }
}

fn available_cpus() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).expect("a process has CPUs");
    (0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .collect()
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).expect("the CPU is in range");
    sched_setaffinity(Pid::from_raw(0), &set).expect("the CPU is available");
}

/// Runs `there` in another process and `here` in this one, each on its own CPU.
fn beside<T>(cpus: (usize, usize), there: impl FnOnce(), here: impl FnOnce() -> T) -> T {
    let before = sched_getaffinity(Pid::from_raw(0)).expect("a process has CPUs");
    // SAFETY: the child only uses memory and descriptors that it owns, and exits without a return.
    match unsafe { fork() }.expect("a process can be started") {
        ForkResult::Child => {
            let _ = set_pdeathsig(Signal::SIGKILL);
            pin(cpus.1);
            there();
            // SAFETY: ends this process at once, without running the parent's destructors a second time.
            unsafe { nix::libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            pin(cpus.0);
            let result = here();
            waitpid(child, None).expect("it ends when it is told to");
            sched_setaffinity(Pid::from_raw(0), &before).expect("they were ours");
            result
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds, of a short time")]
fn nanoseconds(time: Duration) -> f64 {
    time.as_nanos() as f64
}

/// Returns half of the time of each of `count` round trips.
fn halves(count: usize, mut trip: impl FnMut()) -> Vec<f64> {
    // The first trips are slower: they touch pages and fill caches.
    (0..count / 10).for_each(|_| trip());
    let timed = |_| {
        let begin = Instant::now();
        trip();
        nanoseconds(begin.elapsed()) / 2.0
    };
    (0..count).map(timed).collect()
}

/// One end of the ring.
struct End<'a> {
    region: &'a Region<Mapped>,
    link: Link,
    bell: &'a EventFd,
    others_bell: &'a EventFd,
    wait: Wait,
    packet: Vec<u8>,
}

impl End<'_> {
    fn come_up(&mut self) {
        while !matches!(
            self.link.poll(self.region, Duration::ZERO),
            LinkEvent::Up | LinkEvent::CameUp
        ) {
            std::hint::spin_loop();
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        loop {
            match self.link.put(self.region, &[bytes], Class::Data) {
                Ok(()) => break,
                // Only occurs if both ends spin.
                Err(PutError::Full) => std::hint::spin_loop(),
                Err(error) => panic!("{error}"),
            }
        }
        let memory = self.region.memory();
        let (tx, _) = self.link.rings().expect("the link is up");
        if self.wait != Wait::Spins && tx.must_ring(memory) {
            self.others_bell.write(1).expect("a counter is not full");
        }
    }

    fn try_receive(&mut self) -> bool {
        self.packet.clear();
        let taken = self.link.take(self.region, &mut self.packet);
        taken.expect("both ends keep the rules").is_some()
    }

    /// Waits for the next packet.
    fn receive(&mut self) -> &[u8] {
        while !self.spins_until_received() && !self.sleeps_until_received() {}
        &self.packet
    }

    /// Polls for the spin time of this end, but at least once.
    fn spins_until_received(&mut self) -> bool {
        let begin = Instant::now();
        loop {
            if self.try_receive() {
                return true;
            }
            match self.wait {
                Wait::Spins => {}
                Wait::SpinsThenSleeps if begin.elapsed() <= BRIEFLY => {}
                Wait::SpinsThenSleeps | Wait::Sleeps => return false,
            }
            std::hint::spin_loop();
        }
    }

    fn sleeps_until_received(&mut self) -> bool {
        let memory = self.region.memory();
        self.link.rings().expect("the link is up").1.sleep(memory);
        let mut received = self.try_receive();
        if !received {
            self.bell.read().expect("it is rung");
            received = self.try_receive();
        }
        self.link.rings().expect("the link is up").1.awake(memory);
        received
    }
}

/// Creates a ring and runs each end in a process of its own.
fn over_the_ring<T>(
    cpus: (usize, usize),
    wait: Wait,
    there: impl FnOnce(&mut End<'_>),
    here: impl FnOnce(&mut End<'_>) -> T,
) -> T {
    let geometry = Geometry::new(2, SLOTS, BYTES).expect("possible measures");
    let memory = SharedMemory::new(geometry).expect("there is memory");
    let region = memory.region();
    let bells = [(); 2]
        .map(|()| EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("there are descriptors"));
    let generations = [0, 1].map(|peer| region.attach(peer, 1));
    let end = |me: u32| {
        let (mine, others) = (me as usize, 1 - me as usize);
        let mut end = End {
            region,
            link: Link::new(me, 1 - me, generations[mine]),
            bell: &bells[mine],
            others_bell: &bells[others],
            wait,
            packet: Vec::with_capacity(PACKET_BYTES),
        };
        end.come_up();
        end
    };
    beside(cpus, || there(&mut end(1)), || here(&mut end(0)))
}

fn trips(cpus: (usize, usize), wait: Wait) -> Vec<f64> {
    let echo = |end: &mut End<'_>| {
        let mut message = [0; SMALL_BYTES];
        loop {
            let packet = end.receive();
            if packet == END {
                return;
            }
            message.copy_from_slice(packet);
            end.send(&message);
        }
    };
    over_the_ring(cpus, wait, echo, |end| {
        let message = [7; SMALL_BYTES];
        let halves = halves(TRIPS, || {
            end.send(&message);
            assert_eq!(end.receive(), message);
        });
        end.send(&END);
        halves
    })
}

/// Returns the whole time of each round trip: 210 kB there, and an acknowledgement back.
fn large_trips(cpus: (usize, usize)) -> Vec<f64> {
    let answer = |end: &mut End<'_>| {
        let mut all = Vec::with_capacity(LARGE_BYTES);
        loop {
            let packet = end.receive();
            if packet == END {
                return;
            }
            all.extend_from_slice(packet);
            if all.len() == LARGE_BYTES {
                all.clear();
                end.send(&[1]);
            }
        }
    };
    over_the_ring(cpus, Wait::Spins, answer, |end| {
        let bytes = vec![7; LARGE_BYTES];
        let halves = halves(LARGE_TRIPS, || {
            bytes.chunks(PACKET_BYTES).for_each(|part| end.send(part));
            assert_eq!(end.receive(), [1]);
        });
        end.send(&END);
        halves.into_iter().map(|half| half * 2.0).collect()
    })
}

fn eventfd_trips(cpus: (usize, usize)) -> Vec<f64> {
    let [here, there] = [(); 2]
        .map(|()| EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("there are descriptors"));
    /// Value added to the eventfd, in place of 1, to end the echo.
    const LAST: u64 = 2;
    let echo = || {
        while there.read().expect("it is rung") != LAST {
            here.write(1).expect("a counter is not full");
        }
    };
    beside(cpus, echo, || {
        let halves = halves(TRIPS, || {
            there.write(1).expect("a counter is not full");
            here.read().expect("it is rung");
        });
        there.write(LAST).expect("a counter is not full");
        halves
    })
}

/// Measures with a flag and 80 bytes for each direction, each in cache lines of its own.
fn bare_trips(cpus: (usize, usize)) -> Vec<f64> {
    const PAGE: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
    const THERE: u64 = 0;
    const BACK: u64 = 1024;
    const BEHIND: u64 = 64;
    const LAST: u32 = u32::MAX;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address that the system chooses replaces no other mapping. The mapping is never
    // unmapped: one page per round.
    let start = unsafe { mmap_anonymous(None, PAGE, access, MapFlags::MAP_SHARED) };
    let start = start.expect("there is memory");
    // SAFETY: mapped above, and never unmapped.
    let memory = unsafe { Mapped::new(start.as_ptr().cast(), PAGE.get() as u64) };
    let send = |at: u64, number: u32, message: &[u8]| {
        memory.write(at + BEHIND, message);
        memory.store32(at, number, Release);
    };
    let receive = |at: u64, number: u32, message: &mut [u8]| {
        let found = loop {
            match memory.load32(at, Acquire) {
                found if found == number || found == LAST => break found,
                _ => std::hint::spin_loop(),
            }
        };
        memory.read(at + BEHIND, message);
        found
    };
    let echo = || {
        let mut message = [0; SMALL_BYTES];
        let mut number = 1;
        while receive(THERE, number, &mut message) != LAST {
            send(BACK, number, &message);
            number += 1;
        }
    };
    beside(cpus, echo, || {
        let (mut message, mut number) = ([7; SMALL_BYTES], 0);
        let halves = halves(TRIPS, || {
            number += 1;
            send(THERE, number, &message);
            receive(BACK, number, &mut message);
        });
        send(THERE, LAST, &message);
        halves
    })
}
