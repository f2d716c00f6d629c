//! Starts a generation: chooses a kernel instance, marks it, loads the image, boots.
//!
//! ```text
//!  choose ─▶ mark ─▶ create (one overlay) ─▶ load ─▶ boot ─▶ read back
//!              └──────── undone in reverse when one of them fails ◀┘
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kmorph_launch::StartMode;
use libkerf::allocate::{self, Request, Shortage};
use libkerf::kernel::{ApplyError, BootError, Files, Parked};
use libkerf::machine::Machine;
use libkerf::model::Instance;
use libkerf::overlay::Status;

use super::release::TakeError;
use super::slots::{Content, Mark, Origin, Slots};
use crate::contract::{KernelInstance, SpawnError, SpawnSpec};
use crate::guest;

/// The kernel's own part of the command line. After a panic the kernel restarts at once, which informs the host;
/// otherwise it would stand still and seem to run.
const KERNEL_CMDLINE: &str = "console=mktty0 quiet panic=-1 oops=panic";
/// Maximum length of the command line of a kernel on x86, with its NUL (`COMMAND_LINE_SIZE`), bytes.
const CMDLINE_MAX_BYTES: usize = 2048;
/// Maximum wait for other processes' changes.
const PATIENCE: Duration = Duration::from_secs(5);

/// The loaded images.
pub(super) struct Boot {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) cmdline: String,
}

/// Returns the command line of a kernel; the part after `--` goes to init: the agent's arguments.
pub(super) fn cmdline(own: &str) -> Result<String, SpawnError> {
    let own = own.trim();
    let text = format!("{KERNEL_CMDLINE} {own} -- --config {}", guest::AGENT_CONFIG);
    if text.len() >= CMDLINE_MAX_BYTES {
        let over = text.len() + 1 - CMDLINE_MAX_BYTES;
        return Err(SpawnError::Refused(format!(
            "the kernel command line is {over} bytes too long: with the agent's arguments, a kernel accepts at most \
             {CMDLINE_MAX_BYTES}"
        )));
    }
    Ok(text)
}

/// A kernel instance chosen for a generation.
struct Chosen {
    name: String,
    /// True if it already exists: kerf has created it.
    there: bool,
}

impl Slots {
    /// Starts a generation. Returns its kernel instance and resources. Blocking. After a failure nothing of the
    /// generation is left, unless the error says so.
    pub(super) fn spawn(
        &self,
        spec: &SpawnSpec,
        boot: &Boot,
        xdp_pins: &Path,
    ) -> Result<(KernelInstance, Instance), SpawnError> {
        let chosen = self.choose(spec)?;
        let name = chosen.name.as_str();
        for other in Self::names(&spec.name)
            .iter()
            .filter(|other| *other != name)
        {
            self.keeps_network(name, chosen.there, other, xdp_pins)?;
        }
        let mark = Mark {
            instance: spec.name.clone(),
            generation: spec.generation,
            run_dir: spec.run_dir.clone(),
            host_boot_id: self.host_boot_id.clone(),
            origin: self.origin(spec, &chosen)?,
            fenced: false,
        };
        self.begin(name, &mark)
            .map_err(|error| failed("writing the record of", name, &error))?;
        let begun = self.create(spec, &chosen, &mark).and_then(|instance| {
            self.boot(name, boot)?;
            Ok(instance)
        });
        match begun {
            Ok(instance) => {
                let id = instance.id.unwrap_or_default();
                let name = name.to_owned();
                Ok((KernelInstance { name, id }, instance))
            }
            Err(error) => Err(self.undo(name, &mark, error)),
        }
    }

    /// Returns the origin of the kernel instance, or of the one about to be created.
    fn origin(&self, spec: &SpawnSpec, chosen: &Chosen) -> Result<Origin, SpawnError> {
        let name = &chosen.name;
        if !chosen.there {
            let origin = Origin::new(&spec.name, spec.generation);
            return origin.map_err(|error| failed("naming", name, &error));
        }
        let creation = self.kernel.creation(name);
        let creation = creation.map_err(|error| failed("looking at", name, &error))?;
        Ok(Origin::Theirs(creation.map(|made| made.transaction)))
    }

    /// Returns the first of the two kernel instances that is free, or was prepared with kerf.
    fn choose(&self, spec: &SpawnSpec) -> Result<Chosen, SpawnError> {
        let mut taken = Vec::new();
        for name in Self::names(&spec.name) {
            let asked = self.content(&name);
            let content = asked.map_err(|error| failed("looking at", &name, &error))?;
            let there = match content {
                Content::Absent => false,
                Content::Foreign(Status::Ready) => true,
                Content::Marked(mark, Status::Ready) if mark.fenced || self.is_empty(&name)? => {
                    // A daemon that died has left it behind.
                    let taken = self.take_away(&name, &mark, None);
                    taken.map_err(|error| failed("tidying", &name, &error))?;
                    !mark.origin.is_ours()
                }
                Content::Outlived(_, Status::Ready) => {
                    let removed = self.records.remove(&name);
                    removed.map_err(|error| failed("removing the record of", &name, &error))?;
                    true
                }
                Content::Foreign(status) | Content::Outlived(_, status) => {
                    return Err(SpawnError::Unavailable(format!(
                        "kernel instance {name:?} is {}, and kmorph did not load it; stop it \
                         with kerf kill, and unload it with kerf unload",
                        status.as_str()
                    )));
                }
                Content::Marked(_, status) => {
                    taken.push(format!("{name} is {}", status.as_str()));
                    continue;
                }
            };
            return Ok(Chosen { name, there });
        }
        Err(SpawnError::Unavailable(format!(
            "both kernel instances of {} are in use ({}); remove them with kerf kill, unload and delete",
            spec.name,
            taken.join(", ")
        )))
    }

    /// Returns whether no kernel was ever loaded for the marked generation.
    fn is_empty(&self, name: &str) -> Result<bool, SpawnError> {
        let record = self.records.load(name);
        let record = record.map_err(|error| failed("reading the record of", name, &error))?;
        Ok(record.is_none_or(|record| record.loaded_at.is_none()))
    }

    /// Creates the kernel instance next to the running ones, unless it exists, and reads its resources back.
    fn create(
        &self,
        spec: &SpawnSpec,
        chosen: &Chosen,
        mark: &Mark,
    ) -> Result<Instance, SpawnError> {
        let name = chosen.name.as_str();
        if !chosen.there {
            let (cpus, memory) = self.size(spec, name)?;
            let request = Request {
                name: name.to_owned(),
                cpus,
                memory,
                ..Request::default()
            };
            let _one = self.changing();
            let machine = Machine::read(Path::new("/")).unwrap_or_default();
            let made = self.apply(PATIENCE, &|state| {
                let mut overlay = allocate::instance(state, &machine, &request)?;
                if let Origin::Ours(note) = &mark.origin {
                    overlay.note = Some(note.clone());
                }
                Ok(overlay)
            });
            made.map_err(|error| not_made(name, &error))?;
        }
        let instance = self.kernel.instance(name);
        let instance = instance.map_err(|error| failed("reading back", name, &error))?;
        if instance.cpus.is_empty() {
            return Err(SpawnError::Refused(format!(
                "kernel instance {name:?} has no CPUs; give it some with kerf update {name} --cpus"
            )));
        }
        guest::check_memory(instance.memory_bytes)?;
        Ok(instance)
    }

    /// Returns CPUs and memory of a new kernel instance: the requested ones, or in a morph those of its predecessor.
    fn size(&self, spec: &SpawnSpec, name: &str) -> Result<(usize, u64), SpawnError> {
        if matches!(spec.start, StartMode::AwaitState { .. }) {
            for other in Self::names(&spec.name)
                .iter()
                .filter(|other| *other != name)
            {
                let asked = self.content(other);
                let content = asked.map_err(|error| failed("looking at", other, &error))?;
                if let Content::Marked(_, Status::Active) = content {
                    let old = self.kernel.instance(other);
                    let old = old.map_err(|error| failed("reading", other, &error))?;
                    return Ok((old.cpus.len(), old.memory_bytes));
                }
            }
        }
        Ok((spec.cpus.len(), spec.memory_bytes))
    }

    fn boot(&self, name: &str, boot: &Boot) -> Result<(), SpawnError> {
        let files = Files {
            kernel: boot.kernel.clone(),
            initrd: Some(boot.initramfs.clone()),
            cmdline: boot.cmdline.clone(),
        };
        let loaded = self
            .kernel
            .load_files(&*self.calls, name, &files, &self.records);
        loaded.map_err(|error| failed("loading a kernel into", name, &error))?;
        let booted = self.kernel.boot(&*self.calls, name);
        booted.map_err(|error| match error {
            BootError::Ended { .. } => SpawnError::System {
                what: format!("booting kernel instance {name:?}"),
                source: io::Error::other(format!(
                    "{error}. To see it, make and load a kernel instance with kerf create and kerf load, and boot it \
                     with kerf start --console"
                )),
            },
            error => failed("booting", name, &error),
        })
    }

    /// Undoes the start of a generation that failed with `error`.
    fn undo(&self, name: &str, mark: &Mark, error: SpawnError) -> SpawnError {
        match self.try_undo(name, mark) {
            Ok(()) => error,
            Err(why) => SpawnError::Remains(format!(
                "{error}; and of kernel instance {name:?} something is left ({why}): kerf show {name}"
            )),
        }
    }

    fn try_undo(&self, name: &str, mark: &Mark) -> Result<(), String> {
        let text = |error: &dyn std::error::Error| error.to_string();
        match self.content(name).map_err(|error| text(&error))? {
            // A kernel instance that another program created meanwhile belongs to that program.
            Content::Absent | Content::Foreign(_) | Content::Outlived(..) => {
                let forgotten = self.forget_of(name, mark.generation, &mark.run_dir);
                forgotten.map_err(|error| text(&error))
            }
            Content::Marked(_, status) => {
                if status == Status::Active {
                    let parked = self.kernel.halt_by_force(&*self.calls, name);
                    if parked.map_err(|error| text(&error))? == Parked::Unconfirmed {
                        return Err("it was booted, and its CPUs may be running".to_owned());
                    }
                }
                if status.has_kernel() {
                    self.unload(name).map_err(|error| text(&error))?;
                    // If the mark stays, it must state that nothing is loaded.
                    self.begin(name, mark).map_err(|error| text(&error))?;
                }
                let taken = self.take_away(name, mark, None);
                taken.map_err(|error| text(&error))
            }
        }
    }
}

fn failed(action: &str, name: &str, error: &dyn std::error::Error) -> SpawnError {
    SpawnError::System {
        what: format!("{action} kernel instance {name:?}"),
        source: io::Error::other(error.to_string()),
    }
}

/// Converts an error: missing resources are for the user or the operator to supply.
fn not_made(name: &str, error: &TakeError) -> SpawnError {
    match error {
        TakeError::Shortage(shortage @ Shortage::Senseless(_)) => {
            SpawnError::Refused(shortage.to_string())
        }
        TakeError::Shortage(Shortage::NameTaken(_)) => SpawnError::Unavailable(format!(
            "somebody else has just made a kernel instance {name:?}; spawn again to run it as it is, or take it away \
             with kerf delete {name} first"
        )),
        TakeError::Shortage(shortage) => SpawnError::Unavailable(format!(
            "the kernel's pool cannot give {name} what it needs: {shortage}; a morph needs as much again as the \
             instance has; give the pool more with kerf init, or ask for less"
        )),
        TakeError::Apply(ApplyError::Locked(locked)) => SpawnError::Unavailable(locked.to_string()),
        error => failed("making", name, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_words_come_before_the_agents_arguments_and_fit() {
        let line = cmdline(" mitigations=off ").unwrap();
        assert!(line.starts_with("console=mktty0 "), "{line}");
        assert!(
            line.ends_with("oops=panic mitigations=off -- --config /etc/kmorph/agent.json"),
            "{line}"
        );
        let error = cmdline(&"x".repeat(CMDLINE_MAX_BYTES)).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }
}
