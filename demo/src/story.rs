//! The steps of the story. Each step checks its result.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kmorph_control_api::{
    InstanceState, InstanceStatus, MorphStatus, Operation, OperationKind, RecoveryOutcome,
    RecoveryRecord,
};
use kmorph_tests::resp::Client;
use kmorph_tests::{Control, Host};
use serde::de::DeserializeOwned;

use crate::client::{Seen, Steady};
use crate::figures::{Figures, Healing, Morph, time};
use crate::setting::{Harm, Setting};
use crate::shell::{Shell, quoted};
use crate::stage::Stage;
use crate::trouble::{Trouble, expect};

/// The instance's name.
const NAME: &str = "web";
/// Undisturbed time of the client between two steps.
const QUIET: Duration = Duration::from_secs(2);
/// Minimum length of the windows with and without a morph.
const WATCHED_MIN: Duration = Duration::from_secs(2);
/// Interval between requests to the daemon while waiting.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// Size of one value, bytes.
const VALUE_BYTES: usize = 64 * 1024;
/// Maximum number of lines of the daemon's log that are shown.
const LOG_SHOWN_LINES: usize = 20;

/// The paths of the story.
pub(crate) struct Ground {
    dir: PathBuf,
    control: Control,
    shell: Shell,
}

impl Ground {
    /// Returns the directories and the socket of `host`.
    pub(crate) fn of(host: &Host) -> Self {
        let programs = kmorph_tests::program("kmorphctl");
        let programs = programs.parent().unwrap_or(Path::new("."));
        let dir = host.path("");
        Self {
            control: host.control().clone(),
            shell: Shell::new(programs, &dir.join("run/kmorphd.sock")),
            dir,
        }
    }

    /// Returns the last lines of the daemon's log.
    pub(crate) fn daemon_log(&self) -> String {
        let log = std::fs::read_to_string(self.dir.join("state/kmorphd.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_SHOWN_LINES)..].join("\n")
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Trouble> {
        let fail = |reason: String| Trouble::Daemon {
            path: path.to_owned(),
            reason,
        };
        let reply = self.control.try_request("GET", path, None);
        let reply = reply.ok_or_else(|| fail("it cannot be reached".to_owned()))?;
        if reply.status != 200 {
            return Err(fail(format!("{} {}", reply.status, reply.body)));
        }
        serde_json::from_str(&reply.body).map_err(|error| fail(error.to_string()))
    }

    fn instance(&self) -> Result<InstanceStatus, Trouble> {
        self.get(&format!("/v1/instances/{NAME}"))
    }
}

/// Tells the story and returns the measured figures.
pub(crate) fn tell(
    setting: &Setting,
    ground: &Ground,
    stage: &mut Stage,
) -> Result<Figures, Trouble> {
    stage.say(setting.introduction())?;
    start_daemon(setting, ground, stage)?;
    let port = spawn(setting, ground, stage)?;
    let client = Steady::start(port, setting.pace()).map_err(Trouble::Client)?;
    stage.say(&format!(
        "A client now increments a counter on port {port} every {} ms and checks each answer.",
        setting.pace().as_millis()
    ))?;
    let mut healings = Vec::new();
    for harm in [Harm::Dies, Harm::Hangs] {
        std::thread::sleep(QUIET);
        healings.push(heal(harm, setting, ground, stage, &client)?);
    }
    let mut morphs = Vec::new();
    for kernel in &setting.newer_kernels {
        morphs.push(morph(kernel, setting, ground, stage, port, &client)?);
    }
    drop(client);
    stage.step("The end")?;
    ground
        .shell
        .run(stage, &format!("kmorphctl terminate {NAME}"))?;
    ground.shell.run(stage, "kmorphctl daemon stop")?;
    Ok(Figures { healings, morphs })
}

fn start_daemon(setting: &Setting, ground: &Ground, stage: &mut Stage) -> Result<(), Trouble> {
    stage.step("A daemon with directories of its own")?;
    let shell = &ground.shell;
    shell.show_environment(stage)?;
    let config = quoted(&ground.dir.join("kmorphd.conf"));
    shell.run(stage, &format!("cat {config}"))?;
    let launcher = setting.launcher();
    shell.run(
        stage,
        &format!("{launcher}kmorphctl daemon start --config={config}"),
    )
}

/// Spawns the instance, and returns the port of its server.
fn spawn(setting: &Setting, ground: &Ground, stage: &mut Stage) -> Result<u16, Trouble> {
    stage.step("An instance that runs kmorph-kv, a server that speaks Redis' protocol")?;
    let line = format!(
        "kmorphctl spawn {NAME} --kernel={}{} --publish=127.0.0.1:0:6379 --workload=kmorph-kv",
        quoted(&setting.old_kernel),
        setting.spawn_words()
    );
    ground.shell.run(stage, &line)?;
    ground.shell.run(stage, "kmorphctl list")?;
    let instance = ground.instance()?;
    let published = instance.summary.published.first();
    let port = published.and_then(|p| p.listen.rsplit_once(':')?.1.parse().ok());
    port.ok_or_else(|| Trouble::NotAsTold("the instance has no published port".to_owned()))
}

fn heal(
    harm: Harm,
    setting: &Setting,
    ground: &Ground,
    stage: &mut Stage,
    client: &Steady,
) -> Result<Healing, Trouble> {
    stage.step(setting.heading(harm))?;
    let before = ground.instance()?;
    tell_of(stage, "The client so far", &client.take())?;
    let hurt_at = jiff::Timestamp::now();
    setting.harm(stage, harm, &before)?;
    let record = recovered(setting, ground, before.summary.generation)?;
    await_answers(setting, client)?;
    std::thread::sleep(QUIET);
    ground
        .shell
        .run(stage, "kmorphctl recovery-log --since=5m")?;
    ground.shell.run(stage, "kmorphctl list")?;
    let seen = client.take();
    tell_of(stage, "The client meanwhile", &seen)?;
    let now = ground.instance()?;
    expect(now.summary.state == InstanceState::Running, || {
        format!("{NAME} is {:?} after its healing", now.summary.state)
    })?;
    expect(seen.wrong.is_empty(), || {
        format!("the client got wrong answers: {:?}", seen.wrong)
    })?;
    let verdict = since(hurt_at, &record.started_at)?;
    let healing = Duration::from_secs_f64(record.total_ms.unwrap_or_default().max(0.0) / 1000.0);
    Ok(Healing {
        what: setting.word(harm),
        verdict,
        healthy: verdict + healing,
        seen,
    })
}

/// Waits for the recovery of `generation`.
fn recovered(
    setting: &Setting,
    ground: &Ground,
    generation: u64,
) -> Result<RecoveryRecord, Trouble> {
    let path = format!("/v1/recoveries?instance={NAME}");
    let record = wait("the recovery to end", setting.patience(), || {
        let all: Vec<RecoveryRecord> = ground.get(&path)?;
        let mut of_this = all
            .into_iter()
            .filter(|r| r.failed_generation == generation);
        Ok(of_this.find(|r| r.outcome != RecoveryOutcome::Running))
    })?;
    expect(record.outcome == RecoveryOutcome::Recovered, || {
        let reason = record.reason.clone().unwrap_or_default();
        format!("the recovery ended as {:?}: {reason}", record.outcome)
    })?;
    Ok(record)
}

/// Waits until the client receives answers again.
fn await_answers(setting: &Setting, client: &Steady) -> Result<(), Trouble> {
    let before = client.answered();
    wait("the client to be answered", setting.patience(), || {
        Ok((client.answered() > before).then_some(()))
    })
}

fn morph(
    kernel: &Path,
    setting: &Setting,
    ground: &Ground,
    stage: &mut Stage,
    port: u16,
    client: &Steady,
) -> Result<Morph, Trouble> {
    stage.step("It is morphed to a newer kernel, while the client goes on")?;
    let (count, mib) = (setting.values(), (setting.values() * VALUE_BYTES) >> 20);
    fill(port, count).map_err(Trouble::Client)?;
    stage.say(&format!("The server now holds {count} values, {mib} MiB."))?;
    std::thread::sleep(QUIET);
    client.take();
    let begun = Instant::now();
    let kernel = quoted(kernel);
    let budget = setting.downtime_budget_ms();
    ground.shell.run(
        stage,
        &format!(
            "kmorphctl morph {NAME} --kernel={kernel} --auto-commit --downtime-budget-ms={budget}"
        ),
    )?;
    await_answers(setting, client)?;
    std::thread::sleep(WATCHED_MIN.saturating_sub(begun.elapsed()));
    let watched = begun.elapsed();
    let during = client.take();
    std::thread::sleep(watched);
    let without = client.take();
    ground
        .shell
        .run(stage, &format!("kmorphctl status {NAME}"))?;
    tell_of(stage, "The client meanwhile", &during)?;
    expect(during.wrong.is_empty() && during.began_anew == 0, || {
        format!("the client got wrong answers in the morph: {during:?}")
    })?;
    expect(during.failed <= setting.failures_allowed(), || {
        format!("the client's requests failed in the morph: {during:?}")
    })?;
    check(port, count)?;
    stage.say(&format!("All {count} values are there."))?;
    let status = last_morph(ground)?;
    let now = ground.instance()?;
    expect(now.summary.kernel_release == status.to_kernel, || {
        format!(
            "{NAME} runs {} and not {}",
            now.summary.kernel_release, status.to_kernel
        )
    })?;
    let steps = status.downtime.as_ref();
    let downtime = steps.map(|steps| Duration::from_micros(steps.total_us));
    Ok(Morph {
        to: status.to_kernel,
        downtime: downtime.unwrap_or_default(),
        watched,
        during,
        without,
    })
}

/// Returns the last morph.
fn last_morph(ground: &Ground) -> Result<MorphStatus, Trouble> {
    let all: Vec<Operation> = ground.get("/v1/operations")?;
    let mut morphs = all.into_iter().filter(|op| op.kind == OperationKind::Morph);
    let result = morphs.next_back().and_then(|op| op.result);
    let status = result.and_then(|result| serde_json::from_value(result).ok());
    status.ok_or_else(|| Trouble::NotAsTold("the daemon does not know of the morph".to_owned()))
}

fn fill(port: u16, count: usize) -> std::io::Result<()> {
    let mut client = Client::connect(port)?;
    (0..count).try_for_each(|n| client.call(&["SET", &key(n), &value(n)]).map(|_| ()))
}

fn check(port: u16, count: usize) -> Result<(), Trouble> {
    let mut client = Client::connect(port).map_err(Trouble::Client)?;
    for n in 0..count {
        let found = client.call(&["GET", &key(n)]).map_err(Trouble::Client)?;
        expect(found == value(n), || {
            format!("value {n} is not what it was before the morph")
        })?;
    }
    Ok(())
}

fn key(n: usize) -> String {
    format!("demo:value:{n}")
}

/// Returns a value that identifies its key.
fn value(n: usize) -> String {
    format!("{n:08}").repeat(VALUE_BYTES / 8)
}

fn tell_of(stage: &Stage, whose: &str, seen: &Seen) -> Result<(), Trouble> {
    let text = format!(
        "{whose}: {} answers, {} failed request{}, longest gap {}.",
        seen.answered,
        seen.failed,
        if seen.failed == 1 { "" } else { "s" },
        time(seen.longest_gap)
    );
    stage.say(&text)?;
    if let Some(reason) = &seen.first_failure {
        stage.say(&format!(
            "  Its connection broke ({reason}); it connected again."
        ))?;
    }
    if seen.began_anew > 0 {
        stage.say("  The counter began anew: what was in memory died with the instance.")?;
    }
    Ok(())
}

/// Returns the time from `then` to the time that the daemon recorded; zero within the same millisecond.
fn since(then: jiff::Timestamp, written: &str) -> Result<Duration, Trouble> {
    let written: jiff::Timestamp = written
        .parse()
        .map_err(|error| Trouble::NotAsTold(format!("a time of the daemon: {error}")))?;
    Ok(Duration::try_from(written.duration_since(then)).unwrap_or_default())
}

/// Calls `look` repeatedly until it returns a value.
fn wait<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>, Trouble>,
) -> Result<T, Trouble> {
    let begun = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if begun.elapsed() >= limit {
            let what = what.to_owned();
            return Err(Trouble::Late { what, limit });
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}
