//! Finds a spawn whose outcome was never recorded because the daemon died. The sources are the files written to
//! the run directory before the start, and the record that each process wrote before it executed its program.

use std::io;
use std::path::Path;

use kmorph_launch::InstanceName;

use crate::birth;
use crate::cgroup::{Cgroup, Cgroups};
use crate::contract::{BackendKind, Containment, Placement};
use crate::fencing;

/// Name, in a run directory, of the placement without its processes: written before anything is started.
pub(crate) const PLACEMENT: &str = "placement.json";

/// Creates the containment for the processes of a new generation.
///
/// # Errors
/// If its place has live processes that no journal knows.
pub(crate) fn contain(
    cgroups: Option<&Cgroups>,
    name: &InstanceName,
    generation: u64,
) -> io::Result<(Option<Cgroup>, Containment)> {
    let made = cgroups.map(|cgroups| cgroups.make(&format!("{name}.{generation}")));
    let cgroup = match made {
        None => None,
        Some(Ok(cgroup)) if cgroup.is_populated()? => {
            let text = format!(
                "processes of another journal run in the cgroup {:?}; end them first",
                cgroup.path()
            );
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        Some(Ok(cgroup)) => Some(cgroup),
        // Cgroups are limited or gone: the generation's fence will rest on scans, and report that.
        Some(Err(_)) => None,
    };
    let containment = Containment {
        cgroup: cgroup.as_ref().map(|cgroup| cgroup.id().clone()),
        tag: Some(birth::new_tag()?),
    };
    Ok((cgroup, containment))
}

/// Records where a generation is about to be started.
///
/// # Errors
/// If the record cannot be written.
pub(crate) fn announce(placement: &Placement, roles: &[&str]) -> io::Result<()> {
    birth::begin(&placement.run_dir, roles)?;
    let record = serde_json::to_vec(placement)?;
    std::fs::write(placement.run_dir.join(PLACEMENT), record)
}

/// Looks for such a spawn, and ends it if it is still under way. Returns `None` if no part of it can run. `kind` is the
/// calling backend, `roles` are the roles of its processes; the first one is the process whose end is the instance's
/// end.
///
/// # Errors
/// If a query of the system failed, or another backend than `kind` began the spawn.
pub(crate) fn find(
    kind: BackendKind,
    name: &InstanceName,
    generation: u64,
    run_dir: &Path,
    roles: &[&str],
    host_boot_id: &str,
) -> io::Result<Option<Placement>> {
    let Ok(record) = std::fs::read(run_dir.join(PLACEMENT)) else {
        return Ok(None);
    };
    let Ok(mut placement) = serde_json::from_slice::<Placement>(&record) else {
        return Ok(None);
    };
    let is_it = placement.name == *name && placement.generation == generation;
    if !is_it || placement.host_boot_id != host_boot_id {
        return Ok(None);
    }
    if placement.backend != kind {
        let text = format!("the {} backend runs it", placement.backend.as_str());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    birth::close(run_dir)?;
    for role in roles {
        placement.processes.extend(birth::recorded(run_dir, role)?);
    }
    if fencing::is_left(&placement)? {
        return Ok(Some(placement));
    }
    remove_cgroup(&placement.containment)?;
    Ok(None)
}

/// Removes the cgroup of a generation, once its processes have ended.
///
/// # Errors
/// If it has live processes.
pub(crate) fn remove_cgroup(containment: &Containment) -> io::Result<()> {
    match containment.cgroup.as_ref().map(Cgroup::known) {
        Some(Ok(Some(cgroup))) => cgroup.remove(),
        // No cgroup, removed, or not visible from here.
        _ => Ok(()),
    }
}
