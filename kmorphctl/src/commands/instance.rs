//! Commands that act on one instance: terminate, ping, recover.

use std::time::Duration;

use kmorph_control_api::address::{path, query};
use kmorph_control_api::{ErrorCode, InstanceStatus, Operation, PingReport};
use serde_json::json;

use super::operation::concluded;
use crate::cli::{PingArgs, TerminateArgs, WaitArgs};
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::figures::micros;
use crate::output::Output;

pub(super) async fn terminate(
    client: &Client,
    out: &mut Output,
    args: &TerminateArgs,
) -> Result<Exit, Failure> {
    let force = args.force.then(|| "true".to_owned());
    let address = path(&["instances", &args.name]) + &query(&[("force", force)]);
    let operation = client.delete::<Operation>(&address).await?;
    if concluded(client, out, operation, args.wait)
        .await?
        .is_none()
    {
        return Ok(Exit::Ok);
    }
    out.line(&format!("Terminated: {}", args.name))?;
    Ok(Exit::Ok)
}

pub(super) async fn recover(
    client: &Client,
    out: &mut Output,
    name: &str,
    wait: WaitArgs,
) -> Result<Exit, Failure> {
    let address = path(&["instances", name, "recover"]);
    let operation = client.post::<Operation>(&address, &json!({})).await?;
    if concluded(client, out, operation, wait).await?.is_none() {
        return Ok(Exit::Ok);
    }
    let status = client
        .get::<InstanceStatus>(&path(&["instances", name]))
        .await?
        .value;
    let summary = status.summary;
    out.line(&format!(
        "Recovered: {name} (generation {})",
        summary.generation
    ))?;
    out.line(&format!("Running kernel: {}", summary.kernel_release))?;
    Ok(Exit::Ok)
}

/// Round trips so far.
#[derive(Default)]
struct Pings {
    sent: u32,
    answered: Vec<u64>,
}

impl Pings {
    fn summary(&self) -> String {
        let Pings { sent, answered } = self;
        let received = answered.len();
        let (Some(min), Some(max)) = (answered.iter().min(), answered.iter().max()) else {
            return format!("{sent} sent, none answered");
        };
        // The division is safe: there is a smallest round trip, so `received` is not zero.
        let mean = answered.iter().sum::<u64>() / received as u64;
        let (min, mean, max) = (micros(*min), micros(mean), micros(*max));
        format!("{sent} sent, {received} answered; round trip min {min}, mean {mean}, max {max}")
    }
}

pub(super) async fn ping(
    client: &Client,
    out: &mut Output,
    args: &PingArgs,
) -> Result<Exit, Failure> {
    let mut pings = Pings::default();
    let mut last_silence = None;
    for number in 0..args.count {
        if number > 0 && !pause(args.interval).await {
            break;
        }
        pings.sent += 1;
        match one_ping(client, out, &args.name).await {
            Ok(report) => pings.answered.push(report.rtt_us),
            Err(failure) if failure.code == Some(ErrorCode::Timeout) => {
                if args.count > 1 && !out.is_json() {
                    out.line(&failure.message)?;
                    out.flush()?;
                }
                last_silence = Some(failure);
            }
            Err(failure) => return Err(failure),
        }
    }
    if args.count > 1 && !out.is_json() {
        out.line(&pings.summary())?;
    }
    match last_silence {
        Some(failure) if pings.answered.is_empty() => Err(failure),
        _ => Ok(Exit::Ok),
    }
}

/// Waits; returns false if Ctrl-C ended the wait.
async fn pause(seconds: f64) -> bool {
    tokio::select! {
        () = tokio::time::sleep(Duration::from_secs_f64(seconds)) => true,
        _ = tokio::signal::ctrl_c() => false,
    }
}

async fn one_ping(client: &Client, out: &mut Output, name: &str) -> Result<PingReport, Failure> {
    let address = path(&["instances", name, "ping"]);
    let answer = client.post::<PingReport>(&address, &json!({})).await?;
    if out.is_json() {
        out.json_line(&answer.raw)?;
    } else {
        let PingReport {
            generation, rtt_us, ..
        } = answer.value;
        let text = format!(
            "{name}: generation {generation} answered in {}",
            micros(rtt_us)
        );
        out.line(&text)?;
        out.flush()?;
    }
    Ok(answer.value)
}
