//! The effect of a capture on another instance that lives: its answers to a client that sends requests without a pause,
//! before and during the capture.

use std::time::{Duration, Instant};

use kmorph_control_api::Operation;
use kmorph_tests::resp::{Seen, Steady};
use kmorph_tests::{Events, Host, kernels};
use serde_json::json;

use crate::Found;
use crate::figure::{Figure, Unit};
use crate::instances::{fill, key_value, port, spawn, terminate};

const GROUP: &str = "vmcore";
const CAPTURED: &str = "large";
const SURVIVOR: &str = "other";
const ROUNDS: usize = 5;
/// Size of the values in the captured instance, MiB.
const VALUES_MIB: usize = 256;
/// Time before a capture that is compared with the capture; an equal time passes before that.
const BEFORE: Duration = Duration::from_secs(2);
/// A rate limit that leaves most of the machine to others.
const RATE_MIB_S: u64 = 64;
const CONFIG: &str = "backend = \"qemu\"\n[defaults]\nheartbeat_timeout_s = 10.0\nmemory_mib = 4096\n\
                      [pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n";

/// Beginning and end of a capture.
type Span = (Instant, Instant);

pub(crate) fn run() -> Found {
    let host = Host::with(CONFIG);
    let events = Events::follow(host.control());
    let kernel = kernels::debian("6.1");
    spawn(&host, &events, &key_value(CAPTURED, &kernel, &[]));
    fill(port(&host, CAPTURED), VALUES_MIB << 20);
    let mut other = key_value(SURVIVOR, &kernel, &[]);
    other["memory_bytes"] = json!(512 << 20);
    spawn(&host, &events, &other);
    let mut figures = measured(&host, "by default");
    let limited = format!("{CONFIG}[vmcore]\nrate_mib_s = {RATE_MIB_S}\n");
    host.configure(&limited);
    host.control().request("POST", "/v1/daemon/reload", None);
    figures.extend(measured(&host, &format!("at {RATE_MIB_S} MiB/s")));
    terminate(&host, CAPTURED);
    terminate(&host, SURVIVOR);
    let remark = format!(
        "vmcore: a survivor of 512 MiB, and a client that asks it without a pause; the other instance, 4 GiB with \
         {VALUES_MIB} MiB of values, is captured by hand"
    );
    Found {
        figures,
        remarks: vec![remark],
    }
}

fn measured(host: &Host, how: &str) -> Vec<Figure> {
    let client = Steady::start(port(host, SURVIVOR), Duration::ZERO);
    let spans: Vec<Span> = (0..ROUNDS).map(|_| capture(host)).collect();
    let seen = client.stop();
    assert_eq!(
        (seen.failed, seen.wrong),
        (0, 0),
        "{:?}",
        seen.first_failure
    );
    let of = |what: &str, unit, value: &dyn Fn(&Span) -> f64| {
        let values = spans.iter().map(value).collect();
        Figure::of(GROUP, format!("{what}, {how}"), unit, values)
    };
    vec![
        of("a capture by hand", Unit::Milliseconds, &|(from, to)| {
            millis(*to - *from)
        }),
        of(
            "a survivor's answers in a second, before against meanwhile",
            Unit::Ratio,
            &|(from, to)| rate(&seen, *from - BEFORE, *from) / rate(&seen, *from, *to),
        ),
        of(
            "a survivor's longest gap meanwhile",
            Unit::Milliseconds,
            &|(from, to)| millis(seen.longest_gap_between(*from, *to)),
        ),
        of("its longest gap before", Unit::Milliseconds, &|(
            from,
            _,
        )| {
            millis(seen.longest_gap_between(*from - BEFORE, *from))
        }),
    ]
}

fn capture(host: &Host) -> Span {
    std::thread::sleep(BEFORE * 2);
    let path = host.path("core");
    let body = json!({ "output": path });
    let address = format!("/v1/instances/{CAPTURED}/vmcore");
    let from = Instant::now();
    let _: Operation = host.control().succeed("POST", &address, Some(&body));
    let to = Instant::now();
    std::fs::remove_file(path).expect("it was written");
    (from, to)
}

fn rate(seen: &Seen, from: Instant, to: Instant) -> f64 {
    let answers = seen.answers.iter().filter(|at| (from..to).contains(at));
    let count = u32::try_from(answers.count()).expect("not that many");
    f64::from(count) / (to - from).as_secs_f64()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
