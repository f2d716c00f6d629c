//! `kmorphctl spawn`.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use kmorph_control_api::address::path;
use kmorph_control_api::{InstanceStatus, Operation, SpawnRequest, WorkloadRequest};

use super::absolute;
use super::operation::concluded;
use crate::cli::SpawnArgs;
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;

pub(super) async fn run(
    client: &Client,
    out: &mut Output,
    args: SpawnArgs,
) -> Result<Exit, Failure> {
    let (name, wait) = (args.name.clone(), args.wait);
    let request = request(args)?;
    let operation = client
        .post::<Operation>(&path(&["instances"]), &request)
        .await?;
    if concluded(client, out, operation, wait).await?.is_none() {
        return Ok(Exit::Ok);
    }
    let status = client
        .get::<InstanceStatus>(&path(&["instances", &name]))
        .await?
        .value;
    let summary = status.summary;
    out.line(&format!(
        "Instance: {name} (generation {})",
        summary.generation
    ))?;
    out.line(&format!("Running kernel: {}", summary.kernel_release))?;
    for port in summary.published {
        out.line(&format!("Published: {} -> {}", port.listen, port.port))?;
    }
    Ok(Exit::Ok)
}

fn request(args: SpawnArgs) -> Result<SpawnRequest, Failure> {
    let workload = match args.program() {
        Some((program, arguments)) => Some(WorkloadRequest {
            program: program_path(program)?,
            args: arguments,
            env: args.env.into_iter().collect(),
            env_file: args.env_file.as_deref().map(absolute).transpose()?,
        }),
        None => None,
    };
    Ok(SpawnRequest {
        name: args.name,
        kernel: absolute(&args.kernel)?,
        kernel_cmdline: args.kernel_cmdline,
        initramfs: args.initramfs.as_deref().map(absolute).transpose()?,
        cpus: args.cpus,
        memory_bytes: args.memory,
        workload,
        publish: args.publish,
        monitor: args.monitor,
        heartbeat_timeout_s: args.heartbeat_timeout,
    })
}

/// The name of the daemon's built-in workload.
const KV_NAME: &str = "kmorph-kv";

/// Returns the absolute path of a program. `./server` is relative to the current directory; a bare name is looked up
/// in PATH, as in a shell.
fn program_path(program: String) -> Result<String, Failure> {
    if program == KV_NAME {
        return Ok(program);
    }
    if program.contains('/') {
        return absolute(program.as_ref());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    match in_path(&program, &path) {
        Some(found) => absolute(&found),
        None => {
            let looked = path.to_string_lossy();
            let text = format!("program {program:?} not found in PATH ({looked})");
            Err(Failure::new(Exit::NotFound, text).hint(format!(
                "give the path of the program, or use {KV_NAME} for the reference server"
            )))
        }
    }
}

/// Returns the first executable file with this name in the directories of `path`.
fn in_path(name: &str, path: &OsStr) -> Option<PathBuf> {
    let places = std::env::split_paths(path).map(|dir| dir.join(name));
    places.into_iter().find(|place| {
        let found = std::fs::metadata(place);
        found.is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    })
}
