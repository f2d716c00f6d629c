//! `kmorphctl recovery-log`.

use kmorph_control_api::address::{path, query};
use kmorph_control_api::{RecoveryOutcome, RecoveryRecord};

use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::figures::{bytes, local_time, millis};
use crate::output::{LastColumn, Output, Tone, Word};

fn outcome_word(outcome: RecoveryOutcome) -> Word {
    let (text, tone) = match outcome {
        RecoveryOutcome::Running => ("under way", Tone::Warning),
        RecoveryOutcome::Recovered => ("recovered", Tone::Good),
        RecoveryOutcome::Failed => ("failed", Tone::Bad),
        RecoveryOutcome::Quarantined => ("quarantined", Tone::Bad),
        RecoveryOutcome::OperatorActionNeeded => ("operator action needed", Tone::Bad),
    };
    Word::toned(text, tone)
}

pub(super) async fn log(
    client: &Client,
    out: &mut Output,
    instance: Option<String>,
    since: Option<String>,
) -> Result<Exit, Failure> {
    let address = path(&["recoveries"]) + &query(&[("instance", instance), ("since", since)]);
    let answer = client.get::<Vec<RecoveryRecord>>(&address).await?;
    if out.is_json() {
        out.json(&answer.raw)?;
        return Ok(Exit::Ok);
    }
    let rows = answer.value.into_iter().map(row).collect();
    let header = [
        "ID",
        "STARTED",
        "INSTANCE",
        "GENERATION",
        "CAUSE",
        "OUTCOME",
        "FENCED",
        "TOTAL",
        "EVIDENCE",
    ];
    out.table(&header, rows, LastColumn::Sentences, "No recoveries")?;
    Ok(Exit::Ok)
}

fn row(record: RecoveryRecord) -> Vec<Word> {
    let generation = match record.new_generation {
        Some(new) => format!("{} -> {new}", record.failed_generation),
        None => record.failed_generation.to_string(),
    };
    let took = |ms: Option<f64>| ms.map_or_else(|| "-".to_owned(), millis);
    let mut evidence = record.evidence;
    if let Some(reason) = record
        .reason
        .filter(|_| record.outcome != RecoveryOutcome::Recovered)
    {
        evidence.push(reason);
    }
    if let Some(vmcore) = record.vmcore {
        evidence.extend(vmcore.panic);
        evidence.extend(vmcore.path.map(|path| format!("vmcore: {path}")));
        let read_by = vmcore.read_by.iter();
        evidence.extend(read_by.map(|(name, read)| format!("{name} read {} of it", bytes(*read))));
        evidence.extend(vmcore.error.map(|why| format!("no vmcore: {why}")));
    }
    vec![
        record.id.to_string().into(),
        local_time(&record.started_at).into(),
        record.instance.into(),
        generation.into(),
        record.cause.replace('_', " ").into(),
        outcome_word(record.outcome),
        took(record.fence_ms).into(),
        took(record.total_ms).into(),
        evidence.join("; ").into(),
    ]
}
