//! The cost of importing libkerf in Python: inside Python, and as whole processes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit};

/// Number of processes of each kind.
const RUNS: usize = 50;

/// Python code that prints the milliseconds of the import. `time` is built in, so its import is free.
const IMPORT: &str = "import time; begun = time.perf_counter(); import libkerf; \
                      print((time.perf_counter() - begun) * 1e3)";

/// Measures in the environment that `scripts/build-python` creates, in a few seconds.
pub(crate) fn run(group: &'static str) -> Found {
    let python = environment().join("bin/python");
    match measure(&python, group) {
        Ok(figures) => Found {
            figures,
            remarks: Vec::new(),
        },
        Err(error) => {
            let python = python.display();
            let hint = "scripts/build-python builds it";
            Found {
                figures: Vec::new(),
                remarks: vec![format!(
                    "{group}: the import in Python was not measured: {python}: {error}; {hint}"
                )],
            }
        }
    }
}

fn environment() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target
        .unwrap_or_else(|| root.join("target"))
        .join("python/venv")
}

fn measure(python: &Path, group: &'static str) -> Result<Vec<Figure>, String> {
    // The first run writes Python's bytecode, and fills the page cache.
    timed(python, IMPORT)?;
    let (mut inside, mut with, mut without) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        without.push(timed(python, "pass")?.0);
        with.push(timed(python, "import libkerf")?.0);
        let (_, said) = timed(python, IMPORT)?;
        let said = said.trim();
        inside.push(said.parse().map_err(|_| format!("it says {said:?}"))?);
    }
    let ratio = median(&with) / median(&without);
    let of = |name: &str, values| Figure::of(group, name, Unit::Milliseconds, values);
    let ratio = Figure::single(group, "… against python -c pass (p50)", Unit::Ratio, ratio);
    Ok(vec![
        of("import libkerf, as Python sees it", inside).bar(Bar::at_most(Of::P99, 30.0)),
        of("python -c pass", without),
        of("python -c 'import libkerf'", with),
        ratio,
    ])
}

/// Returns the milliseconds of a whole process, and its output.
fn timed(python: &Path, code: &str) -> Result<(f64, String), String> {
    let begun = Instant::now();
    let output = Command::new(python)
        .args(["-c", code])
        // A directory without packages, so that only installed ones can be imported.
        .current_dir("/")
        .output()
        .map_err(|error| error.to_string())?;
    let elapsed = begun.elapsed().as_secs_f64() * 1e3;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok((
        elapsed,
        String::from_utf8_lossy(&output.stdout).into_owned(),
    ))
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
