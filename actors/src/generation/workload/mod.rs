//! Checks a workload before any work begins, so that the refusal can name the limit.

mod environment;

use std::path::Path;

use crate::model::{Failure, FailureKind, Workload};
use kmorph_launch::AGENT_CONFIG_MAX_BYTES;
use nix::sys::resource::{Resource, getrlimit};

pub use environment::ENV_FILE_MAX_BYTES;
pub(crate) use environment::complete;

/// The name of the reference workload, without a path.
pub const KV_NAME: &str = "kmorph-kv";

/// Maximum number of arguments of a workload.
pub const ARGUMENTS_MAX: usize = 4096;
/// Maximum number of variables added to the environment of a workload.
pub const VARIABLES_MAX: usize = 4096;
/// Maximum size of an argument, and of a `NAME=VALUE`, in bytes: Linux' MAX_ARG_STRLEN without the final NUL.
pub const STRING_MAX_BYTES: usize = 32 * 4096 - 1;
/// Space that the kernel always grants to a program's arguments and environment together, whatever its stack limit:
/// ARG_MAX, bytes.
const EXEC_MIN_BYTES: usize = 128 * 1024;
/// Maximum space that the kernel grants: three quarters of _STK_LIM, bytes.
const EXEC_MAX_BYTES: usize = 6 * 1024 * 1024;
/// Maximum size of arguments and environment in the agent's configuration, as JSON, bytes: the rest of the
/// configuration ([`AGENT_CONFIG_MAX_BYTES`]) is for the other settings.
const DESCRIPTION_MAX_BYTES: u64 = AGENT_CONFIG_MAX_BYTES / 4 * 3;
/// Reserve for the agent's own environment and a few variables, bytes.
const RESERVE_BYTES: usize = 32 * 1024;
/// Overhead that the kernel counts for each string: the NUL and a pointer.
const STRING_OVERHEAD_BYTES: usize = 1 + 8;

/// Refuses a workload that no kernel would start.
pub(crate) fn check_workload(workload: &Workload) -> Result<(), Failure> {
    check(workload, exec_bytes()).map_err(|text| Failure::new(FailureKind::InvalidRequest, text))
}

/// Refuses a program that is not on this machine: instances run it from the host, or take a copy of it.
pub(crate) async fn check_program(workload: &Workload) -> Result<(), Failure> {
    let program = workload.program.as_str();
    if program == KV_NAME {
        return Ok(());
    }
    let path = std::path::PathBuf::from(program);
    let found = crate::platform::ambient::io(move || std::fs::metadata(path)).await;
    let reason = match found {
        Ok(found) if found.is_file() => return Ok(()),
        Ok(_) => "not a regular file".to_owned(),
        Err(error) => error.to_string(),
    };
    let text = format!("there is no program {program:?} on this machine: {reason}");
    Err(Failure::new(FailureKind::NotFound, text).hint(format!(
        "name a program by its absolute path, or the reference server by {KV_NAME}"
    )))
}

/// Returns the maximum total size of arguments and environment, in bytes. A program may use a quarter of its
/// stack limit (execve(2)). Instances inherit the limit of this process; guests have a larger one.
fn exec_bytes() -> usize {
    let stack = getrlimit(Resource::RLIMIT_STACK).map_or(0, |(soft, _)| soft);
    let quarter = usize::try_from(stack / 4).unwrap_or(usize::MAX);
    quarter.clamp(EXEC_MIN_BYTES, EXEC_MAX_BYTES) - RESERVE_BYTES
}

fn check(workload: &Workload, exec_bytes: usize) -> Result<(), String> {
    let program = workload.program.as_str();
    if program != KV_NAME && !Path::new(program).is_absolute() {
        return Err(format!(
            "the workload {program:?} is not an absolute path; only {KV_NAME} is known by its name"
        ));
    }
    let count = workload.args.len();
    if count > ARGUMENTS_MAX {
        return Err(format!(
            "{count} arguments are too many: a workload takes {ARGUMENTS_MAX}"
        ));
    }
    let count = workload.env.len();
    if count > VARIABLES_MAX {
        return Err(format!(
            "{count} environment variables are too many: a workload takes {VARIABLES_MAX}"
        ));
    }
    let mut total = 0;
    for (number, text) in std::iter::once(program)
        .chain(workload.args.iter().map(String::as_str))
        .enumerate()
    {
        let what = match number {
            0 => "the program's path".to_owned(),
            n => format!("argument {n}"),
        };
        total += string_bytes(&what, text.len(), text)?;
    }
    if let Some(path) = &workload.env_file
        && !Path::new(path).is_absolute()
    {
        return Err(format!(
            "the environment file {path:?} is not an absolute path"
        ));
    }
    for (name, value) in &workload.env {
        let shown: String = name.chars().take(80).collect();
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(format!(
                "invalid name of an environment variable: {shown:?}"
            ));
        }
        let what = format!("the environment variable {shown:?}");
        total += string_bytes(&what, name.len() + 1 + value.len(), value)?;
    }
    if total > exec_bytes {
        return Err(format!(
            "arguments and environment take {total} bytes together: the kernel of this machine takes {exec_bytes}"
        ));
    }
    let described = serde_json::to_vec(workload).map_or(u64::MAX, |json| json.len() as u64);
    if described > DESCRIPTION_MAX_BYTES {
        return Err(format!(
            "arguments and environment take {described} bytes together as JSON: an agent takes {DESCRIPTION_MAX_BYTES}"
        ));
    }
    Ok(())
}

/// Returns the size that the kernel counts for a string of `length` bytes.
fn string_bytes(what: &str, length: usize, text: &str) -> Result<usize, String> {
    if text.contains('\0') {
        return Err(format!("{what} has a NUL in it"));
    }
    if length > STRING_MAX_BYTES {
        return Err(format!(
            "{what} has {length} bytes: the kernel takes {STRING_MAX_BYTES} in one string"
        ));
    }
    Ok(length + STRING_OVERHEAD_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXEC_BYTES: usize = EXEC_MIN_BYTES;

    fn with(args: Vec<String>, env: &[(&str, String)]) -> Result<(), String> {
        let workload = Workload {
            program: "/bin/server".to_owned(),
            args,
            env: env
                .iter()
                .map(|(n, v)| ((*n).to_owned(), v.clone()))
                .collect(),
            env_file: None,
        };
        check(&workload, EXEC_BYTES)
    }

    #[test]
    fn what_the_kernel_takes_is_taken() {
        with(Vec::new(), &[]).unwrap();
        with(vec![String::new(); ARGUMENTS_MAX], &[]).unwrap();
        with(vec!["x".repeat(EXEC_BYTES / 2)], &[("A", String::new())]).unwrap();
    }

    #[test]
    fn what_it_does_not_take_is_refused_with_what_is_allowed() {
        let long = "x".repeat(STRING_MAX_BYTES + 1);
        let refused = [
            (with(vec!["x".to_owned(); 100_000], &[]), "4096"),
            (with(vec![long.clone()], &[]), "131071"),
            (with(Vec::new(), &[("A", long)]), "131071"),
            (with(vec!["x".repeat(EXEC_BYTES / 8); 8], &[]), "131072"),
            (with(vec!["\u{1}".repeat(EXEC_BYTES / 3)], &[]), "196608"),
            (with(vec!["a\0b".to_owned()], &[]), "argument 1 has a NUL"),
            (
                with(Vec::new(), &[("A=B", String::new())]),
                "invalid name of an environment variable: \"A=B\"",
            ),
            (with(Vec::new(), &[("", String::new())]), "invalid name"),
        ];
        for (result, words) in refused {
            let text = result.unwrap_err();
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn a_program_is_named_by_its_absolute_path() {
        for program in ["server", "./server", ""] {
            let workload = Workload {
                program: program.to_owned(),
                args: Vec::new(),
                env: std::collections::BTreeMap::new(),
                env_file: None,
            };
            assert!(
                check(&workload, EXEC_BYTES)
                    .unwrap_err()
                    .contains("absolute")
            );
        }
    }
}
