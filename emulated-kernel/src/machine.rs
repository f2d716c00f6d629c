//! The system calls: load, boot and halt, and the failures of a running kernel.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use nix::libc::{EBUSY, EINVAL, EIO, ENOENT, ENOEXEC, ETIMEDOUT};

use crate::mk::{Instance, Mk};
use crate::spawn::{Loaded, Spawn};

type Done = Result<(), i32>;

/// Timeout of a request to halt. The kernel's own timeout is 30 s, which is too long for tests.
const HALT_TIMEOUT: Duration = Duration::from_secs(3);
/// Interval between checks whether an instance has halted.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// The commands of reboot(2).
const BOOT: u32 = 0x4D4B_4C49;
const HALT: u32 = 0x4D4B_4C48;
const HALT_FORCE: u32 = 0x4D4B_4C46;

/// Behavior of a forced halt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Generation {
    /// Reports `loaded` at once, and stops the CPUs if possible: generations D and E.
    Silent,
    /// Waits until all CPUs have stopped: the fork.
    #[default]
    Confirms,
}

/// Injected faults of an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Traps {
    /// The next forced halt does not reach the CPUs.
    deaf: bool,
    /// Delay of changes in the status file.
    lag: Duration,
}

/// The machine: the kernel's records, and the running instances.
pub(crate) struct Machine {
    mk: Arc<Mutex<Mk>>,
    generation: Generation,
    agent: PathBuf,
    directory: PathBuf,
    images: Mutex<HashMap<u32, Loaded>>,
    spawns: Mutex<HashMap<u32, Arc<Spawn>>>,
    traps: Mutex<HashMap<u32, Traps>>,
    boots: Mutex<u64>,
    /// True while boots must wait.
    holds: (Mutex<bool>, Condvar),
    /// True if the machine is on. Loads and boots hold the lock, so that switching off finds and ends everything that
    /// began before.
    power: RwLock<bool>,
}

impl Machine {
    pub(crate) fn new(
        mk: &Arc<Mutex<Mk>>,
        generation: Generation,
        agent: &Path,
        directory: &Path,
    ) -> Self {
        std::fs::create_dir(directory.join("vsock")).unwrap();
        Self {
            mk: Arc::clone(mk),
            generation,
            agent: agent.to_owned(),
            directory: directory.to_owned(),
            images: Mutex::default(),
            spawns: Mutex::default(),
            traps: Mutex::default(),
            boots: Mutex::default(),
            holds: Default::default(),
            power: RwLock::new(true),
        }
    }

    pub(crate) fn load(&self, id: u32, image: &[u8], initrd: &[u8], cmdline: &str) -> Done {
        let _power = self.power()?;
        self.with(id, |instance| match instance.state {
            "ready" => Ok(()),
            _ => Err(EBUSY),
        })?;
        let _lock = self.kexec()?;
        let loaded = Loaded::new(image, initrd, cmdline.to_owned()).ok_or(ENOEXEC)?;
        self.images.lock().unwrap().insert(id, loaded);
        self.enter(id, "loaded");
        Ok(())
    }

    /// Unloads the image, also of a running instance: the kernel does not refuse that.
    pub(crate) fn unload(&self, id: u32) -> Done {
        let _power = self.power()?;
        self.with(id, |_| Ok(()))?;
        let _lock = self.kexec()?;
        let unloaded = self.images.lock().unwrap().remove(&id);
        unloaded.ok_or(ENOENT)?;
        self.enter(id, "ready");
        if let Some(spawn) = self.spawn_of(id) {
            spawn.line.close();
        }
        Ok(())
    }

    pub(crate) fn reboot(self: &Arc<Self>, command: u32, id: u32) -> Done {
        match command {
            BOOT => self.boot(id),
            HALT => {
                // A halt may wait for a long time, so it must not hold the lock.
                drop(self.power()?);
                self.halt(id)
            }
            HALT_FORCE => self.halt_force(id),
            _ => Err(EINVAL),
        }
    }

    /// Makes future boots wait before they change anything, or lets them continue.
    pub(crate) fn hold_boots(&self, held: bool) -> Done {
        let (holds, change) = &self.holds;
        *holds.lock().unwrap() = held;
        change.notify_all();
        Ok(())
    }

    fn boot(self: &Arc<Self>, id: u32) -> Done {
        let (holds, change) = &self.holds;
        drop(change.wait_while(holds.lock().unwrap(), |held| *held));
        let _power = self.power()?;
        let _lock = self.kexec()?;
        self.with(id, |instance| match instance.state {
            _ if instance.cpus.is_empty() => Err(EINVAL),
            "loaded" => Ok(()),
            _ => Err(EBUSY),
        })?;
        let loaded = self.images.lock().unwrap().get(&id).cloned();
        let loaded = loaded.ok_or(EINVAL)?;
        if let Some(before) = self.spawn_of(id) {
            if before.running() > 0 {
                return Err(EBUSY);
            }
            before.line.close();
        }
        let number = {
            let mut boots = self.boots.lock().unwrap();
            *boots += 1;
            *boots
        };
        let directory = self.directory.join("spawns").join(number.to_string());
        let vsock = self.vsock(id);
        self.enter(id, "active");
        let restarts = loaded.restarts_on_panic();
        match Spawn::start(loaded, &self.agent, &directory, &vsock) {
            Ok((spawn, mut child)) => {
                let spawn = Arc::new(spawn);
                self.spawns.lock().unwrap().insert(id, Arc::clone(&spawn));
                let machine = Arc::clone(self);
                std::thread::spawn(move || {
                    let _ = child.wait();
                    machine.ended(id, &spawn);
                });
            }
            Err(error) => {
                // The initramfs has no init to run.
                eprintln!("instance {id} panics: {error}");
                if restarts {
                    self.enter(id, "loaded");
                }
            }
        }
        Ok(())
    }

    /// Powers the instance off and informs the host, because its init has ended.
    fn ended(&self, id: u32, spawn: &Arc<Spawn>) {
        if spawn.line.is_cut() {
            return;
        }
        spawn.stop();
        let is_last = self
            .spawn_of(id)
            .is_some_and(|last| Arc::ptr_eq(&last, spawn));
        if is_last {
            self.enter(id, "loaded");
        }
        spawn.has_said_so.store(true, Ordering::SeqCst);
    }

    fn halt(&self, id: u32) -> Done {
        let _lock = self.kexec()?;
        self.with(id, |instance| match instance.state {
            "active" => Ok(()),
            _ => Err(EINVAL),
        })?;
        let spawn = self.spawn_of(id).ok_or(ETIMEDOUT)?;
        if !spawn.line.is_cut() {
            spawn.ask();
        }
        let asked = Instant::now();
        // An instance under a concurrent forced halt sends no more messages, but the wait continues nevertheless.
        while !spawn.has_said_so.load(Ordering::SeqCst) {
            if asked.elapsed() > HALT_TIMEOUT {
                return Err(ETIMEDOUT);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    fn halt_force(&self, id: u32) -> Done {
        let _power = self.power()?;
        let state = self.with(id, |instance| Ok(instance.state))?;
        let spawn = self.spawn_of(id);
        let deaf = {
            let mut traps = self.traps.lock().unwrap();
            std::mem::take(&mut traps.entry(id).or_default().deaf)
        };
        match (self.generation, state) {
            (Generation::Confirms, "active") if deaf => return Err(ETIMEDOUT),
            (Generation::Confirms, "active") => {
                if let Some(spawn) = spawn {
                    spawn.stop();
                }
            }
            (Generation::Silent, "active" | "loaded") => {
                if let Some(spawn) = spawn.filter(|_| !deaf) {
                    spawn.stop_later();
                }
            }
            _ => return Err(EINVAL),
        }
        self.enter(id, "loaded");
        Ok(())
    }

    /// Injects an event into an instance for a test.
    pub(crate) fn strike(&self, what: &str, name: &str) -> Result<String, i32> {
        let id = self.id_of(name)?;
        let spawn = || self.spawn_of(id).ok_or(EINVAL);
        match what {
            "panic" => {
                let spawn = spawn()?;
                spawn.stop();
                if spawn.loaded.restarts_on_panic() {
                    self.enter(id, "loaded");
                }
            }
            "hang" => spawn()?.hang(),
            "deaf" => self.traps.lock().unwrap().entry(id).or_default().deaf = true,
            "running" => {
                let running = self.spawn_of(id).map_or(0, |spawn| spawn.running());
                return Ok(running.to_string());
            }
            "release" => return Ok(spawn()?.loaded.release.clone()),
            "cmdline" => return Ok(spawn()?.loaded.cmdline.clone()),
            _ => return Err(EINVAL),
        }
        Ok(String::new())
    }

    /// Delays future changes of this instance's status by `lag`; with zero, the current status becomes visible at once.
    pub(crate) fn lag(&self, name: &str, lag: Duration) -> Done {
        let id = self.id_of(name)?;
        self.traps.lock().unwrap().entry(id).or_default().lag = lag;
        self.with(id, |instance| {
            instance.late.take_if(|_| lag.is_zero());
            Ok(())
        })
    }

    /// Ends everything that runs, and prevents any new start.
    pub(crate) fn off(&self) {
        *self.power.write().unwrap() = false;
        let _ = self.hold_boots(false);
        for spawn in self.spawns.lock().unwrap().values() {
            spawn.line.close();
            spawn.stop();
        }
    }

    fn power(&self) -> Result<RwLockReadGuard<'_, bool>, i32> {
        let power = self.power.read().unwrap();
        if *power { Ok(power) } else { Err(EIO) }
    }

    fn spawn_of(&self, id: u32) -> Option<Arc<Spawn>> {
        self.spawns.lock().unwrap().get(&id).cloned()
    }

    fn id_of(&self, name: &str) -> Result<u32, i32> {
        let mk = self.mk.lock().unwrap();
        let instance = mk.instances.iter().find(|i| i.name == name);
        instance.map(|i| i.id).ok_or(ENOENT)
    }

    fn vsock(&self, cid: u32) -> PathBuf {
        self.directory.join("vsock").join(format!("{cid}.sock"))
    }

    fn with<T>(
        &self,
        id: u32,
        look: impl FnOnce(&mut Instance) -> Result<T, i32>,
    ) -> Result<T, i32> {
        let mut mk = self.mk.lock().unwrap();
        let instance = mk.instances.iter_mut().find(|i| i.id == id);
        look(instance.ok_or(ENOENT)?)
    }

    fn enter(&self, id: u32, state: &'static str) {
        let lag = self
            .traps
            .lock()
            .unwrap()
            .get(&id)
            .map_or(Duration::ZERO, |t| t.lag);
        let _ = self.with(id, |instance| {
            instance.late = (!lag.is_zero()).then(|| (instance.shown(), Instant::now() + lag));
            instance.state = state;
            Ok(())
        });
    }

    /// Takes the lock of all loads, boots and halts.
    fn kexec(&self) -> Result<Kexec, i32> {
        let mut mk = self.mk.lock().unwrap();
        if std::mem::replace(&mut mk.kexec, true) {
            return Err(EBUSY);
        }
        Ok(Kexec(Arc::clone(&self.mk)))
    }
}

struct Kexec(Arc<Mutex<Mk>>);

impl Drop for Kexec {
    fn drop(&mut self) {
        self.0.lock().unwrap().kexec = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_is_off_begins_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mk = Arc::new(Mutex::new(Mk::new()));
        let mut web = Instance::default();
        (web.id, web.cpus, web.state) = (1, vec![8], "ready");
        mk.lock().unwrap().instances.push(web);
        let agent = Path::new("/nonexistent");
        let machine = Machine::new(&mk, Generation::Confirms, agent, directory.path());
        let machine = Arc::new(machine);
        let load = || machine.load(1, b"\x7fELF", b"", "console=mktty0");
        load().unwrap();
        machine.off();
        for command in [BOOT, HALT, HALT_FORCE] {
            assert_eq!(machine.reboot(command, 1), Err(EIO), "{command:#x}");
        }
        assert_eq!(machine.unload(1), Err(EIO));
        mk.lock().unwrap().instances[0].state = "ready";
        assert_eq!(load(), Err(EIO));
        assert_eq!(mk.lock().unwrap().instances[0].state, "ready");
        assert!(!directory.path().join("spawns").exists());
    }
}
