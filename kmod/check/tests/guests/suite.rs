//! The kernel's own `vsock_test` over this module: `make test-vsock`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use crate::guest::{Guest, Machine};
use crate::image::network_card;
use crate::{KERF, VSOCK};

/// Reasons of tests that do not pass: `where|test|reason`, see [`Reasons`].
const REASONS: &str = include_str!("../../../../tests/kmod/vsock_test.reasons");
/// A test may wait for its other side and then run, two minutes each; the other side may do so before it.
const SILENCE: Duration = Duration::from_secs(600);
/// The two guests.
const A: u32 = 1;
const B: u32 = 2;
const CID_BASE: u32 = 2;

/// Where `vsock_test` has run, and how each of its tests ended.
struct Run {
    server: String,
    client: String,
    /// The series whose `vsock_test` it was.
    of: String,
    /// By number: the name, and what went wrong on either side.
    tests: BTreeMap<usize, (String, Vec<String>)>,
}

impl Run {
    fn new(server: &str, client: &str, of: &str) -> Self {
        Self {
            server: server.to_owned(),
            client: client.to_owned(),
            of: of.to_owned(),
            tests: BTreeMap::new(),
        }
    }

    fn place(&self) -> String {
        format!("{} < {}", self.server, self.client)
    }

    /// Takes what a guest has said as one side.
    fn take(&mut self, guest: &Guest, mode: &str) {
        let start = format!("KERF suite {mode} ");
        for line in guest
            .said()
            .iter()
            .filter_map(|line| line.strip_prefix(&start))
        {
            let (number, rest) = line.split_once(' ').unwrap();
            let (outcome, rest) = rest.split_once(' ').unwrap();
            let (name, why) = match outcome {
                "passed" => (rest, None),
                // Names have no colon.
                _ => rest
                    .split_once(": ")
                    .map(|(name, why)| (name, Some(why)))
                    .unwrap(),
            };
            let number = number.parse().unwrap();
            let test = self
                .tests
                .entry(number)
                .or_insert_with(|| (name.to_owned(), Vec::new()));
            test.1.extend(why.map(|why| format!("{mode}: {why}")));
        }
    }

    fn failed(&self) -> Vec<&(String, Vec<String>)> {
        self.tests
            .values()
            .filter(|(_, why)| !why.is_empty())
            .collect()
    }
}

/// Programs, as `scripts/test-vsock` has built them: a directory for each series.
fn program(of: &str) -> PathBuf {
    let all = std::env::var_os("KERF_VSOCK_TEST")
        .map(PathBuf::from)
        .unwrap();
    all.join(of).join("vsock_test")
}

/// Of two series the older one: both sides must run the same program, and the older kernel may lack what a newer one tests.
fn older<'a>(one: &'a str, other: &'a str) -> &'a str {
    let key =
        |series: &str| -> Vec<u32> { series.split('.').map(|n| n.parse().unwrap()).collect() };
    if key(one) <= key(other) { one } else { other }
}

/// Both sides in one guest, over the transport that `load` loads.
fn alone(series: &str, transport: &str, load: &str) -> Run {
    let machine = Machine::new(1).with_program(program(series));
    let commands = [
        VSOCK[0],
        VSOCK[1],
        load,
        "network=0",
        "vsock_test=both.1",
        "complaints",
    ];
    let mut guest = machine.alone(series, &commands);
    guest.wait_while_it_speaks("KERF done", SILENCE);
    assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    let mut run = Run::new(&format!("{series}, {transport}"), "itself", series);
    run.take(&guest, "server");
    run.take(&guest, "client");
    run
}

/// Two guests; when their kernels differ, each as server and as client.
fn between(a: &str, b: &str) -> Vec<Run> {
    let of = older(a, b);
    let machine = Machine::new(3).with_program(program(of));
    let wire = machine.socket("wire");
    let boot = |peer, series: &str, first, then, server| {
        let mut commands: Vec<String> = VSOCK.iter().map(|&c| c.to_owned()).collect();
        commands.extend(network_card(series));
        let other = A + B - peer;
        commands.extend([
            KERF.to_owned(),
            format!("network={peer}"),
            format!("link={other}"),
            format!("vsock_test={first}.{}", CID_BASE + other),
        ]);
        if a != b {
            commands.push(format!("vsock_test={then}.{}", CID_BASE + other));
        }
        commands.push("complaints".to_owned());
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        let end = format!(
            "stream,id=wire,server={server},addr.type=unix,addr.path={}",
            wire.display()
        );
        let card = format!("virtio-net-pci,netdev=wire,romfile=,mac=52:54:00:00:00:0{peer}");
        machine.guest_with(
            peer,
            series,
            &commands,
            &["-netdev", &end, "-device", &card],
        )
    };
    let mut one = boot(A, a, "server", "client", "on");
    one.wait_for("KERF ok network");
    let mut other = boot(B, b, "client", "server", "off");
    for guest in [&mut one, &mut other] {
        guest.wait_while_it_speaks("KERF done", SILENCE);
        assert_eq!(guest.failures(), Vec::<String>::new(), "{a} and {b}");
    }
    let (mut there, mut back) = (Run::new(a, b, of), Run::new(b, a, of));
    there.take(&one, "server");
    there.take(&other, "client");
    back.take(&other, "server");
    back.take(&one, "client");
    let runs = [there, back].into_iter();
    runs.filter(|run| !run.tests.is_empty()).collect()
}

/// Why tests do not pass. A line's `where` is the server's and the client's column of the table with ` < ` between them,
/// or `*` for all places.
struct Reasons(Vec<(&'static str, &'static str, &'static str)>);

impl Reasons {
    fn new() -> Self {
        let lines = REASONS.lines().filter(|line| !line.starts_with('#'));
        let parts = lines.map(|line| {
            let mut parts = line.splitn(3, '|');
            let mut next = || parts.next().expect("where|test|reason");
            (next(), next(), next())
        });
        Self(parts.collect())
    }

    fn of(&self, run: &Run, test: &str) -> Option<&'static str> {
        let place = run.place();
        let fits = |at: &str| at == "*" || at == place;
        self.0
            .iter()
            .find(|(at, name, _)| fits(at) && *name == test)
            .map(|(.., why)| *why)
    }
}

/// Runs it between all pairs of the kernels that `KERF_VSOCK_KERNELS` names, and in each of them over the kernel's own
/// loopback transport and this one. Writes a table to `KERF_VSOCK_TABLE`, and fails when a test does not pass for which no
/// reason is written down.
#[test]
#[ignore = "boots guests: make test-vsock"]
fn the_kernels_own_vsock_test() {
    let Ok(kernels) = std::env::var("KERF_VSOCK_KERNELS") else {
        println!("no programs: make test-vsock builds them");
        return;
    };
    let kernels: Vec<&str> = kernels.split(' ').collect();
    let mut runs = Vec::new();
    let mut add = |run: Run| {
        println!("{}: {:?} do not pass", run.place(), run.failed());
        runs.push(run);
    };
    for (at, a) in kernels.iter().enumerate() {
        add(alone(a, "its own vsock_loopback", "load=vsock_loopback"));
        let ours = "load=kerf-vsock:backend=loopback";
        add(alone(a, "kerf-vsock's loopback", ours));
        for b in &kernels[at..] {
            between(a, b).into_iter().for_each(&mut add);
        }
    }
    let reasons = Reasons::new();
    let mut table =
        "| server | client | vsock_test of | passed | not passed |\n|---|---|---|---|---|\n"
            .to_owned();
    let mut unexplained = Vec::new();
    for run in &runs {
        let failed = run.failed();
        let named = failed.iter().map(|(name, why)| {
            let reason = reasons.of(run, name).unwrap_or_else(|| {
                unexplained.push(format!("{}: {name}: {}", run.place(), why.join("; ")));
                "not explained"
            });
            format!("{name}: {reason}")
        });
        let named = named.collect::<Vec<_>>().join("; ");
        let (passed, all) = (run.tests.len() - failed.len(), run.tests.len());
        writeln!(
            table,
            "| {} | {} | {} | {passed} of {all} | {named} |",
            run.server, run.client, run.of
        )
        .unwrap();
    }
    print!("{table}");
    if let Some(path) = std::env::var_os("KERF_VSOCK_TABLE") {
        std::fs::write(path, table).unwrap();
    }
    assert_eq!(unexplained, Vec::<String>::new());
    // In each kernel over two transports, and one run for each ordered pair.
    assert_eq!(runs.len(), kernels.len() * (2 + kernels.len()));
}
