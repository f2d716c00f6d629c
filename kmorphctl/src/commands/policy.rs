//! `kmorphctl policy`.

use std::fs::Permissions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kmorph_control_api::address::path;
use kmorph_control_api::{Policy, PolicyPatch, PolicySet, REQUEST_BODY_MAX_BYTES};
use serde_json::json;

use super::input;
use crate::cli::{AutoHeal, PolicyCommand, PolicySetting};
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::figures::seconds;
use crate::output::{LastColumn, Output, Tone, Word};
use crate::policy_file::{self, PolicyFile};

pub(super) async fn run(
    client: &Client,
    out: &mut Output,
    command: PolicyCommand,
) -> Result<Exit, Failure> {
    match command {
        PolicyCommand::Show { instance: None } => {
            let all = client.get::<PolicySet>(&path(&["policies"])).await?;
            if out.is_json() {
                out.json(&all.raw)?;
                return Ok(Exit::Ok);
            }
            table(out, &all.value)
        }
        PolicyCommand::Show {
            instance: Some(name),
        } => {
            let one = client
                .get::<Policy>(&path(&["instances", &name, "policy"]))
                .await?;
            if out.is_json() {
                out.json(&one.raw)?;
                return Ok(Exit::Ok);
            }
            let instance = [(name, one.value)].into();
            table(out, &PolicySet { instance })
        }
        PolicyCommand::Set(setting) => set(client, out, setting).await,
        PolicyCommand::Export { output } => export(client, out, output).await,
        PolicyCommand::Import { file } => import(client, out, &file).await,
    }
}

fn table(out: &mut Output, set: &PolicySet) -> Result<Exit, Failure> {
    let row = |(name, policy): (&String, &Policy)| {
        let auto_heal = match policy.auto_heal {
            true => Word::from("enabled"),
            false => Word::toned("disabled", Tone::Warning),
        };
        vec![
            name.clone().into(),
            seconds(policy.heartbeat_timeout_s).into(),
            auto_heal,
            seconds(policy.morph_timeout_s).into(),
            policy.vmcore.as_str().into(),
            policy.stuck_cpu.as_str().into(),
        ]
    };
    let rows = set.instance.iter().map(row).collect();
    let header = [
        "INSTANCE",
        "HEARTBEAT TIMEOUT",
        "AUTO-HEAL",
        "MORPH TIMEOUT",
        "VMCORE",
        "STUCK CPU",
    ];
    out.table(
        &header,
        rows,
        LastColumn::Words,
        "No instances, so no policies",
    )?;
    Ok(Exit::Ok)
}

async fn set(client: &Client, out: &mut Output, setting: PolicySetting) -> Result<Exit, Failure> {
    let (name, patch) = match setting {
        PolicySetting::HeartbeatTimeout { name, seconds } => (
            name,
            PolicyPatch {
                heartbeat_timeout_s: Some(seconds),
                ..PolicyPatch::default()
            },
        ),
        PolicySetting::AutoHeal { name, state } => (
            name,
            PolicyPatch {
                auto_heal: Some(state == AutoHeal::Enabled),
                ..PolicyPatch::default()
            },
        ),
        PolicySetting::Vmcore { name, state } => (
            name,
            PolicyPatch {
                vmcore: Some(state.into()),
                ..PolicyPatch::default()
            },
        ),
        PolicySetting::StuckCpu { name, state } => (
            name,
            PolicyPatch {
                stuck_cpu: Some(state.into()),
                ..PolicyPatch::default()
            },
        ),
        PolicySetting::MorphTimeout { name, seconds } => (
            name,
            PolicyPatch {
                morph_timeout_s: Some(seconds),
                ..PolicyPatch::default()
            },
        ),
    };
    let address = path(&["instances", &name, "policy"]);
    let answer = client.patch::<Policy>(&address, &patch).await?;
    if out.is_json() {
        out.json(&answer.raw)?;
        return Ok(Exit::Ok);
    }
    let instance = [(name, answer.value)].into();
    table(out, &PolicySet { instance })
}

async fn export(
    client: &Client,
    out: &mut Output,
    output: Option<PathBuf>,
) -> Result<Exit, Failure> {
    let all = client.get::<PolicySet>(&path(&["policies"])).await?;
    let text = policy_file::render(&all.value)?;
    let Some(file) = output else {
        out.bytes(text.as_bytes())?;
        return Ok(Exit::Ok);
    };
    replace(&file, &text).map_err(|error| Failure::file("write", &file, &error))?;
    let count = all.value.instance.len();
    if out.is_json() {
        out.json(&json!({ "file": file.to_string_lossy(), "instances": count }))?;
    } else {
        out.line(&format!(
            "Policies of {count} instance(s) written to {}",
            file.display()
        ))?;
    }
    Ok(Exit::Ok)
}

/// Replaces a file atomically: readers, also after a full disk, find either the old or the new contents. Does not
/// follow a symbolic link, which in a directory that others may write to could point to one of this user's files.
/// Writes directly to a file that is not regular (a pipe).
fn replace(file: &Path, text: &str) -> std::io::Result<()> {
    let permissions = match std::fs::symlink_metadata(file) {
        Ok(there) if there.is_symlink() => {
            let text = "it is a symbolic link, and links are not followed: name the file itself";
            return Err(std::io::Error::new(ErrorKind::InvalidInput, text));
        }
        Ok(there) if there.is_file() => Some(there.permissions()),
        Ok(_) => return write_as_it_is(file, text),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let directory = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // The name is unpredictable and the file is new, so no planted file or link is written to.
    let mut new = tempfile::Builder::new()
        .prefix(".kmorph-policies-")
        // The usual mode of a new file, reduced by the umask.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory)?;
    new.write_all(text.as_bytes())?;
    if let Some(permissions) = permissions {
        new.as_file().set_permissions(permissions)?;
    }
    new.as_file().sync_all()?;
    new.persist(file)?;
    std::fs::File::open(directory)?.sync_all()
}

fn write_as_it_is(file: &Path, text: &str) -> std::io::Result<()> {
    let mut open = std::fs::File::options()
        .write(true)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(file)?;
    open.write_all(text.as_bytes())
}

async fn import(client: &Client, out: &mut Output, file: &Path) -> Result<Exit, Failure> {
    let (name, text) = read(file)?;
    let policies = PolicyFile::parse(name, text)?;
    // The daemon refuses an unknown name too; this check reports its line.
    let in_force = client.get::<PolicySet>(&path(&["policies"])).await?;
    policies.check_names(&in_force.value)?;
    let answer = client
        .put::<PolicySet>(&path(&["policies"]), &policies.set)
        .await?;
    if out.is_json() {
        out.json(&answer.raw)?;
        return Ok(Exit::Ok);
    }
    out.line(&format!(
        "Policies of {} instance(s) applied",
        answer.value.instance.len()
    ))?;
    table(out, &answer.value)
}

/// Returns the name and the text of a policy file; `-` is standard input.
fn read(file: &Path) -> Result<(String, String), Failure> {
    let (name, bytes) = input::read(file, REQUEST_BODY_MAX_BYTES as u64, "policy file")?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::invalid(format!("{name} is not UTF-8 after byte {at}"))
    })?;
    Ok((name, text))
}
