//! `kmorphctl morph`: single steps, and whole morphs.

use kmorph_control_api::address::path;
use kmorph_control_api::{
    Check, CommitRequest, DowntimeSteps, MorphPhase, MorphRequest, MorphStatus, Operation,
    OtherProvider,
};
use serde_json::json;

use super::absolute;
use super::operation::concluded;
use crate::cli::{MorphArgs, MorphForm, MorphTarget, MorphWholeArgs, WaitArgs};
use crate::client::{Answer, Client};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::figures::{bytes, local_time, micros};
use crate::output::{Output, Tone, Word};

pub(super) async fn run(
    client: &Client,
    out: &mut Output,
    args: MorphArgs,
) -> Result<Exit, Failure> {
    let form = match (args.form, args.whole) {
        (None, Some(whole)) => return morph(client, out, whole).await,
        (Some(form), None) => form,
        _ => {
            let text = "give either a subcommand (prepare, validate, …) or a name and --kernel";
            return Err(Failure::new(Exit::Usage, text).hint("see `kmorphctl morph --help`"));
        }
    };
    match form {
        MorphForm::Prepare(args) => {
            let request = request(&args.target)?;
            let address = path(&["instances", &args.name, "morph"]);
            let operation = client.post(&address, &request).await?;
            end(client, out, &args.name, operation, args.wait).await
        }
        MorphForm::Validate { name, wait } => {
            let address = path(&["instances", &name, "morph", "validate"]);
            let operation = client.post(&address, &json!({})).await?;
            end(client, out, &name, operation, wait).await
        }
        MorphForm::Commit {
            name,
            force,
            downtime_budget_ms,
            wait,
        } => {
            let address = path(&["instances", &name, "morph", "commit"]);
            let request = CommitRequest {
                force,
                downtime_budget_us: downtime_budget_ms,
            };
            let operation = client.post(&address, &request).await?;
            end(client, out, &name, operation, wait).await
        }
        MorphForm::Rollback { name, wait } => {
            let address = path(&["instances", &name, "morph", "rollback"]);
            let operation = client.post(&address, &json!({})).await?;
            end(client, out, &name, operation, wait).await
        }
        MorphForm::Status(name) => status(client, out, &name.name).await,
        MorphForm::Run(whole) => morph(client, out, whole).await,
    }
}

fn request(target: &MorphTarget) -> Result<MorphRequest, Failure> {
    Ok(MorphRequest {
        kernel: absolute(&target.kernel)?,
        kernel_cmdline: target.kernel_cmdline.clone(),
        initramfs: target.initramfs.as_deref().map(absolute).transpose()?,
        auto_validate: false,
        auto_commit: false,
        force: false,
        downtime_budget_us: target.downtime_budget_ms,
    })
}

async fn morph(client: &Client, out: &mut Output, args: MorphWholeArgs) -> Result<Exit, Failure> {
    let request = MorphRequest {
        auto_validate: true,
        auto_commit: args.auto_commit,
        force: args.force,
        ..request(&args.target())?
    };
    let address = path(&["instances", &args.name, "morph"]);
    let operation = client.post(&address, &request).await?;
    end(client, out, &args.name, operation, args.wait()).await
}

/// Waits for the operation and prints the morph's state.
async fn end(
    client: &Client,
    out: &mut Output,
    name: &str,
    operation: Answer<Operation>,
    wait: WaitArgs,
) -> Result<Exit, Failure> {
    let Some(operation) = concluded(client, out, operation, wait).await? else {
        return Ok(Exit::Ok);
    };
    let result = operation.result.unwrap_or_default();
    match serde_json::from_value::<MorphStatus>(result) {
        Ok(morph) => said(out, name, &morph),
        // The report of an older daemon lacks fields: the operation succeeded all the same.
        Err(_) => out.line("Done"),
    }?;
    Ok(Exit::Ok)
}

fn said(out: &mut Output, name: &str, morph: &MorphStatus) -> Result<(), Failure> {
    let (from, to) = (&morph.from_kernel, &morph.to_kernel);
    match morph.phase {
        MorphPhase::Committed => {
            out.line(&format!(
                "Morphed: {name} (generation {} -> {})",
                morph.from_generation, morph.to_generation
            ))?;
            out.line(&format!("Running kernel: {to}"))?;
            if let Some(downtime) = &morph.downtime {
                out.line(&format!("Downtime: {}", downtime_text(downtime)))?;
            }
            Ok(())
        }
        MorphPhase::Committable => {
            out.line("Validation successful (health checks passed)")?;
            show_checks(out, &morph.checks)?;
            if let Some(estimate) = morph.estimated_downtime_us {
                let budget = micros(morph.downtime_budget_us);
                let estimate = micros(estimate);
                out.line(&format!("Estimated downtime: {estimate} (budget {budget})"))?;
            }
            out.hint(&format!(
                "{name} still runs {from}: `kmorphctl morph commit {name}` switches to {to}, \
                 `kmorphctl morph rollback {name}` abandons the morph"
            ))
        }
        MorphPhase::RolledBack => {
            out.line(&format!("Rolled back: {name}"))?;
            out.line(&format!("Running kernel: {from}"))
        }
        _ => {
            out.line(&format!(
                "Prepared: {name}, {} of state",
                bytes(morph.state_bytes)
            ))?;
            out.hint(&format!(
                "{name} still runs {from}: `kmorphctl morph validate {name}` is next"
            ))
        }
    }
}

fn downtime_text(steps: &DowntimeSteps) -> String {
    format!(
        "{} (freeze {}, final delta {}, activate {}, record {}, serve {})",
        micros(steps.total_us),
        micros(steps.freeze_us),
        micros(steps.final_delta_us),
        micros(steps.activate_us),
        micros(steps.record_us),
        micros(steps.serve_us)
    )
}

fn show_checks(out: &mut Output, checks: &[Check]) -> Result<(), Failure> {
    for check in checks {
        let mark = match check.passed {
            true => Word::toned("passed", Tone::Good),
            false => Word::toned("failed", Tone::Bad),
        };
        let mark = out.paint(&mark);
        let what = format!(
            "{} ({}) {}",
            check.name,
            micros(check.duration_us),
            check.detail
        );
        let what = out.paint(&Word::from(what.trim_end()));
        out.raw(&format!("  {mark}: {what}"))?;
    }
    Ok(())
}

fn phase_name(phase: MorphPhase) -> String {
    let name = serde_json::to_value(phase).ok();
    let name = name.as_ref().and_then(|name| name.as_str()).unwrap_or("");
    name.replace('_', " ")
}

async fn status(client: &Client, out: &mut Output, name: &str) -> Result<Exit, Failure> {
    let answer = client
        .get::<MorphStatus>(&path(&["instances", name, "morph"]))
        .await?;
    if out.is_json() {
        out.json(&answer.raw)?;
        return Ok(Exit::Ok);
    }
    let morph = answer.value;
    let mut fields: Vec<(&str, Word)> = vec![
        ("Instance", morph.instance.into()),
        ("Phase", phase_name(morph.phase).into()),
        (
            "Kernels",
            format!("{} -> {}", morph.from_kernel, morph.to_kernel).into(),
        ),
        (
            "Generations",
            format!("{} -> {}", morph.from_generation, morph.to_generation).into(),
        ),
        ("Operation", morph.operation.into()),
        ("Started", local_time(&morph.started_at).into()),
        ("State", bytes(morph.state_bytes).into()),
    ];
    if let Some(provider) = morph.provider {
        fields.push(("State provider", provider.into()));
    }
    for OtherProvider { provider, reason } in morph.other_providers {
        fields.push(("Not used", format!("{provider}: {reason}").into()));
    }
    if let Some(mode) = morph.mode {
        let text = match mode.as_str() {
            "rounds" => format!("{} rounds, {} sent", morph.rounds, bytes(morph.sent_bytes)),
            _ => mode.replace('_', " "),
        };
        fields.push(("Transfer", text.into()));
    }
    fields.push(("Downtime budget", micros(morph.downtime_budget_us).into()));
    if let Some(estimate) = morph.estimated_downtime_us {
        fields.push(("Estimated downtime", micros(estimate).into()));
    }
    if let Some(expires) = &morph.expires_at {
        fields.push(("Expires", local_time(expires).into()));
    }
    if let Some(downtime) = &morph.downtime {
        fields.push(("Downtime", downtime_text(downtime).into()));
    }
    if let Some(reason) = morph.reason {
        fields.push(("Reason", Word::toned(reason, Tone::Warning)));
    }
    out.fields(&fields)?;
    show_checks(out, &morph.checks)?;
    Ok(Exit::Ok)
}
