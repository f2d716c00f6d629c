//! `kmorphctl vmcore capture`.

use kmorph_control_api::address::path;
use kmorph_control_api::{CaptureReport, CaptureRequest, Operation};

use super::absolute;
use super::operation::concluded;
use crate::cli::CaptureArgs;
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::figures::{bytes, millis};
use crate::output::Output;

pub(super) async fn capture(
    client: &Client,
    out: &mut Output,
    args: &CaptureArgs,
) -> Result<Exit, Failure> {
    let request = CaptureRequest {
        output: absolute(&args.output)?,
    };
    let address = path(&["instances", &args.name, "vmcore"]);
    let operation = client.post::<Operation>(&address, &request).await?;
    let Some(operation) = concluded(client, out, operation, args.wait).await? else {
        return Ok(Exit::Ok);
    };
    let result = operation.result.unwrap_or_default();
    match serde_json::from_value::<CaptureReport>(result) {
        Ok(report) => said(out, &report),
        // The report of an older daemon lacks fields: the operation succeeded all the same.
        Err(_) => out.line("Done"),
    }?;
    Ok(Exit::Ok)
}

fn said(out: &mut Output, report: &CaptureReport) -> Result<(), Failure> {
    let size = bytes(report.bytes);
    out.line(&format!("Captured: {} ({size})", report.path))?;
    match report.frozen_ms {
        Some(frozen) => out.line(&format!("Frozen for: {}", millis(frozen)))?,
        None => out.line(&format!("Not frozen: {} was not executing", report.name))?,
    }
    for (name, read) in &report.read_by {
        out.line(&format!("Read by {name}: {} of it", bytes(*read)))?;
    }
    match (&report.panic, &report.log_error) {
        (Some(panic), _) => out.line(&format!("Its kernel's log: {panic}"))?,
        (None, Some(reason)) => {
            out.line(&format!("Its kernel's log could not be read: {reason}"))?;
        }
        (None, None) => {}
    }
    if let Some(reason) = &report.not_filtered {
        out.line(&format!(
            "Some pages that could have been left out are included: {reason}"
        ))?;
    }
    out.hint(&format!(
        "`kmorphctl vmcore analyze {}` shows its contents",
        report.path
    ))
}
