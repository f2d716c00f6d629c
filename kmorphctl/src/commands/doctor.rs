//! `kmorphctl doctor`.

use kmorph_control_api::address::path;
use kmorph_control_api::{DaemonStatus, DoctorReport, DoctorRequest, Operation};

use super::absolute;
use super::operation::concluded;
use crate::cli::DoctorArgs;
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::figures::{bytes, local_time, millis};
use crate::output::{Output, Tone, Word};

pub(super) async fn run(
    client: &Client,
    out: &mut Output,
    args: &DoctorArgs,
) -> Result<Exit, Failure> {
    if args.last {
        return last(client, out).await;
    }
    let kernel = args.kernel.as_deref().map(absolute).transpose()?;
    let request = DoctorRequest { kernel };
    let operation = client
        .post::<Operation>(&path(&["doctor"]), &request)
        .await?;
    let Some(operation) = concluded(client, out, operation, args.wait).await? else {
        return Ok(Exit::Ok);
    };
    let result = operation.result.unwrap_or_default();
    match serde_json::from_value::<DoctorReport>(result) {
        Ok(report) => show(out, &report),
        // The report of an older daemon lacks fields: the operation succeeded all the same.
        Err(_) => out.line("Done"),
    }?;
    Ok(Exit::Ok)
}

async fn last(client: &Client, out: &mut Output) -> Result<Exit, Failure> {
    let status = client.get::<DaemonStatus>(&path(&["daemon"])).await?;
    if out.is_json() {
        out.json(&status.raw["last_doctor"])?;
    }
    let Some(report) = status.value.last_doctor else {
        let failure = Failure::new(Exit::NotFound, "no self-test has been run".to_owned());
        return Err(failure.hint("`kmorphctl doctor` runs one"));
    };
    if !out.is_json() {
        show(out, &report)?;
    }
    Ok(match report.passed {
        true => Exit::Ok,
        false => Exit::OperationFailed,
    })
}

/// Returns the outcome and its time, in one line.
pub(super) fn outcome(report: &DoctorReport) -> Word {
    let at = local_time(&report.ended_at);
    match &report.reason {
        None => Word::toned(format!("passed, {at}"), Tone::Good),
        Some(reason) => Word::toned(format!("failed, {at}: {reason}"), Tone::Bad),
    }
}

fn show(out: &mut Output, report: &DoctorReport) -> Result<(), Failure> {
    let mut fields: Vec<(&str, Word)> = vec![
        ("Self-test", outcome(report)),
        ("Image", report.kernel_path.clone().into()),
    ];
    if let Some(release) = &report.kernel_release {
        fields.push(("Kernel", release.clone().into()));
    }
    if let Some(panic) = &report.panic {
        fields.push(("Its end", panic.clone().into()));
    }
    if let (Some(length), Some(cpus)) = (report.vmcore_bytes, report.cpus) {
        let text = format!("{}, verified, registers of {cpus} CPU(s)", bytes(length));
        fields.push(("Vmcore", text.into()));
    }
    for (name, ms) in [
        ("To the log", report.log_ms),
        ("To the vmcore", report.captured_ms),
        ("To a successor", report.recovered_ms),
    ] {
        if let Some(ms) = ms {
            fields.push((name, millis(ms).into()));
        }
    }
    out.fields(&fields)
}
