//! `kmorphctl operation`.

use kmorph_control_api::address::path;
use kmorph_control_api::{Operation, OperationState};

use crate::cli::{OperationCommand, WaitArgs};
use crate::client::{Answer, Client};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::figures::local_time;
use crate::operation_wait::{finish, kind_name, state_name};
use crate::output::{LastColumn, Output, Tone, Word};

pub(super) async fn run(
    client: &Client,
    out: &mut Output,
    command: OperationCommand,
) -> Result<Exit, Failure> {
    match command {
        OperationCommand::List => list(client, out).await,
        OperationCommand::Show { id } => {
            let operation = client.get(&path(&["operations", &id])).await?;
            show(out, &operation)
        }
        OperationCommand::Watch { id, wait_timeout } => {
            let operation = client.get(&path(&["operations", &id])).await?;
            let wait = WaitArgs {
                no_wait: false,
                wait_timeout,
            };
            let operation = finish(client, out, operation, wait).await?;
            show(out, &operation)
        }
        OperationCommand::Cancel { id } => {
            let address = path(&["operations", &id, "cancel"]);
            let operation: Answer<Operation> =
                client.post(&address, &serde_json::json!({})).await?;
            if out.is_json() {
                out.json(&operation.raw)?;
                return Ok(Exit::Ok);
            }
            out.line(&format!("Cancellation of {id} requested"))?;
            out.hint(&format!(
                "`kmorphctl operation watch {id}` waits until it is over"
            ))?;
            Ok(Exit::Ok)
        }
    }
}

/// Waits as requested. Returns the operation if it has ended and is still to be printed: not with JSON, which has
/// printed everything, and not if the command did not wait.
pub(super) async fn concluded(
    client: &Client,
    out: &mut Output,
    operation: Answer<Operation>,
    wait: WaitArgs,
) -> Result<Option<Operation>, Failure> {
    let operation = finish(client, out, operation, wait).await?;
    if out.is_json() {
        out.json(&operation.raw)?;
        return Ok(None);
    }
    if !operation.value.is_over() {
        begun(out, &operation.value)?;
        return Ok(None);
    }
    Ok(Some(operation.value))
}

/// Prints the started operation, for a command that does not wait.
fn begun(out: &mut Output, operation: &Operation) -> Result<(), Failure> {
    let Operation { id, instance, .. } = operation;
    let kind = kind_name(operation.kind);
    out.line(&format!("Started: {kind} of {instance} as {id}"))?;
    out.hint(&format!(
        "`kmorphctl operation watch {id}` waits until it is over"
    ))
}

fn toned(state: OperationState) -> Word {
    let tone = match state {
        OperationState::Running => Tone::Plain,
        OperationState::Succeeded => Tone::Good,
        OperationState::Failed => Tone::Bad,
        OperationState::Cancelled => Tone::Warning,
    };
    Word::toned(state_name(state), tone)
}

async fn list(client: &Client, out: &mut Output) -> Result<Exit, Failure> {
    let answer = client.get::<Vec<Operation>>(&path(&["operations"])).await?;
    if out.is_json() {
        out.json(&answer.raw)?;
        return Ok(Exit::Ok);
    }
    let row = |operation: Operation| {
        let now = match (&operation.error, operation.state) {
            (Some(error), _) => error.message.clone(),
            (None, OperationState::Running) => operation.progress.step.clone(),
            _ => String::new(),
        };
        vec![
            operation.id.into(),
            kind_name(operation.kind).into(),
            operation.instance.into(),
            toned(operation.state),
            local_time(&operation.started_at).into(),
            now.into(),
        ]
    };
    let rows = answer.value.into_iter().map(row).collect();
    let header = [
        "ID",
        "KIND",
        "INSTANCE",
        "STATE",
        "STARTED",
        "STEP OR ERROR",
    ];
    out.table(&header, rows, LastColumn::Sentences, "No operations")?;
    Ok(Exit::Ok)
}

fn show(out: &mut Output, operation: &Answer<Operation>) -> Result<Exit, Failure> {
    if out.is_json() {
        out.json(&operation.raw)?;
        return Ok(Exit::Ok);
    }
    let Operation {
        id,
        instance,
        progress,
        ..
    } = &operation.value;
    let mut fields: Vec<(&str, Word)> = vec![
        ("Operation", id.clone().into()),
        ("Kind", kind_name(operation.value.kind).into()),
        ("Instance", instance.clone().into()),
        ("Status", toned(operation.value.state)),
    ];
    if !operation.value.is_over() {
        fields.push(("Step", progress.step.clone().into()));
        if progress.total > 0 {
            let text = format!("{} of {} {}", progress.done, progress.total, progress.unit);
            fields.push(("Progress", text.into()));
        }
    }
    fields.push(("Started", local_time(&operation.value.started_at).into()));
    if let Some(ended) = &operation.value.ended_at {
        fields.push(("Ended", local_time(ended).into()));
    }
    if let Some(uid) = operation.value.requested_by {
        fields.push(("Requested by", format!("uid {uid}").into()));
    }
    if let Some(error) = &operation.value.error {
        fields.push(("Error", Word::toned(error.message.clone(), Tone::Bad)));
    }
    out.fields(&fields)?;
    Ok(Exit::Ok)
}
