//! Faults, warnings and panics, as the kernel wrote them into its log.
//!
//! An event begins with its title and ends with the next title or its end mark. In between:
//!
//! ```text
//! BUG: kernel NULL pointer dereference, address: 0000000000000000        title
//! Oops: 0002 [#1] PREEMPT SMP NOPTI
//! CPU: 0 PID: 1 Comm: init Not tainted 6.1.0                             who
//! Hardware name: QEMU Standard PC
//! RIP: 0010:sysrq_handle_crash+0x16/0x20                                 where
//! RAX: 0000000000000000 RBX: …                                           registers
//! Call Trace:
//!  __handle_sysrq.cold+0x44/0x11c                                        calls; `?` before a doubtful one
//! Modules linked in: pvpanic_pci …
//! ---[ end trace 0000000000000000 ]---
//! ```

use serde::Serialize;

use crate::kernel::log::Log;

/// Most events that are kept: the first and, beyond that, none, but for the panic.
const EVENTS_MAX: usize = 64;
/// Most calls of one event.
const CALLS_MAX: usize = 256;
/// Most bytes of one text.
const TEXT_MAX_BYTES: usize = 4096;

/// What kind of event it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The kernel's code did what it must not.
    Oops,
    /// A check of the kernel's own failed; it went on.
    Warning,
    /// A CPU did not come to an end with something, or a task waits too long.
    Lockup,
    /// The kernel gave up.
    Panic,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// Its kind.
    pub kind: EventKind,
    /// Its first line.
    pub title: String,
    /// Nanoseconds since boot.
    pub time_ns: u64,
    /// CPU, task and taint, as the kernel wrote them.
    pub who: Option<String>,
    /// The number of the CPU.
    pub cpu: Option<u32>,
    /// The task's number.
    pub pid: Option<u32>,
    /// The task's name.
    pub comm: Option<String>,
    /// The machine, as the firmware names it.
    pub hardware: Option<String>,
    /// Where the kernel was.
    pub rip: Option<String>,
    /// Names and values, hexadecimal, of the kernel's registers.
    pub registers: Vec<(String, String)>,
    /// The code around the instruction, hexadecimal.
    pub code: Option<String>,
    /// The calls that led there, innermost first.
    pub call_trace: Vec<String>,
    /// The modules that were loaded.
    pub modules: Option<Vec<String>>,
}

impl Event {
    fn new(kind: EventKind, title: &str, time_ns: u64) -> Self {
        Self {
            kind,
            title: cut(title),
            time_ns,
            who: None,
            cpu: None,
            pid: None,
            comm: None,
            hardware: None,
            rip: None,
            registers: Vec::new(),
            code: None,
            call_trace: Vec::new(),
            modules: None,
        }
    }
}

/// How the lines that begin an event begin.
const TITLES: [(&str, EventKind); 13] = [
    ("Kernel panic - not syncing: ", EventKind::Panic),
    ("BUG: soft lockup", EventKind::Lockup),
    ("watchdog: BUG: soft lockup", EventKind::Lockup),
    ("watchdog: CPU", EventKind::Lockup),
    ("INFO: task ", EventKind::Lockup),
    ("rcu: INFO: ", EventKind::Lockup),
    ("BUG: ", EventKind::Oops),
    ("kernel BUG at ", EventKind::Oops),
    ("general protection fault", EventKind::Oops),
    ("divide error: ", EventKind::Oops),
    ("invalid opcode: ", EventKind::Oops),
    ("Oops: ", EventKind::Oops),
    ("WARNING: ", EventKind::Warning),
];

/// The event that a line begins.
fn title(line: &str) -> Option<EventKind> {
    let title = TITLES.iter().find(|(start, _)| line.starts_with(start));
    title.map(|(_, kind)| *kind)
}

/// The events of a log.
pub fn events(log: &Log) -> Vec<Event> {
    let mut reader = Reader::default();
    for record in &log.records {
        for line in String::from_utf8_lossy(&record.text).lines() {
            reader.line(line, record.time_ns);
        }
    }
    reader.done
}

#[derive(Default)]
struct Reader {
    done: Vec<Event>,
    /// Lines go to the last event.
    open: bool,
    in_trace: bool,
    /// The registers that follow are not the kernel's at that moment.
    registers_over: bool,
}

impl Reader {
    fn line(&mut self, line: &str, time_ns: u64) {
        if let Some(kind) = title(line) {
            if !self.continues(line, kind) {
                self.begin(kind, line, time_ns);
            }
            return;
        }
        if !self.open {
            return;
        }
        if line.starts_with("---[ end ") {
            self.open = false;
            return;
        }
        let Some(event) = self.done.last_mut() else {
            return;
        };
        if line == "Call Trace:" {
            self.in_trace = true;
            self.registers_over = true;
        } else if self.in_trace && line.starts_with(' ') {
            if event.call_trace.len() < CALLS_MAX {
                event.call_trace.push(cut(line.trim()));
            }
        } else {
            self.in_trace = false;
            if line.starts_with("RIP: 0033:") {
                self.registers_over = true;
            }
            detail(event, line, self.registers_over);
        }
    }

    /// `Oops:` is the second line of a fault whose first line names it better.
    fn continues(&self, line: &str, kind: EventKind) -> bool {
        let last = self.done.last().filter(|_| self.open);
        kind == EventKind::Oops
            && line.starts_with("Oops: ")
            && last.is_some_and(|e| e.kind == EventKind::Oops && e.rip.is_none())
    }

    fn begin(&mut self, kind: EventKind, title: &str, time_ns: u64) {
        self.open = true;
        self.in_trace = false;
        self.registers_over = false;
        let event = Event::new(kind, title, time_ns);
        if self.done.len() < EVENTS_MAX {
            self.done.push(event);
        } else if kind == EventKind::Panic {
            self.done.pop();
            self.done.push(event);
        } else {
            self.open = false;
        }
    }
}

/// A line of an event that tells more of it. The first of each kind counts.
fn detail(event: &mut Event, line: &str, registers_over: bool) {
    let fill = |slot: &mut Option<String>, text: &str| {
        slot.get_or_insert_with(|| cut(text));
    };
    if line.starts_with("CPU: ") {
        if event.who.is_none() {
            event.cpu = word_after(line, "CPU: ").and_then(|word| word.parse().ok());
            event.pid = word_after(line, "PID: ").and_then(|word| word.parse().ok());
            event.comm = comm(line);
            event.who = Some(cut(line));
        }
    } else if let Some(name) = line.strip_prefix("Hardware name: ") {
        fill(&mut event.hardware, name);
    } else if let Some(list) = line.strip_prefix("Modules linked in:") {
        let list = list.split("[last unloaded").next().unwrap_or_default();
        let names = list.split_whitespace().map(cut).collect();
        event.modules.get_or_insert(names);
    } else if registers_over {
    } else if let Some(rip) = line.strip_prefix("RIP: 0010:") {
        fill(&mut event.rip, rip);
    } else if let Some(code) = line.strip_prefix("Code: ") {
        fill(&mut event.code, code);
    } else {
        event.registers.extend(registers(line));
    }
}

/// The task's name: what stands before its taint.
fn comm(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("Comm: ")?;
    let end = [" Not tainted", " Tainted: "]
        .iter()
        .filter_map(|mark| rest.rfind(mark))
        .min();
    Some(cut(rest.get(..end?)?))
}

fn word_after<'a>(line: &'a str, mark: &str) -> Option<&'a str> {
    line.split_once(mark)?.1.split_whitespace().next()
}

/// Registers of one line: `NAME: digits` again and again. Of `RSP: 0018:digits` the digits count.
fn registers(line: &str) -> Vec<(String, String)> {
    let mut words = line.split_whitespace().peekable();
    let mut found = Vec::new();
    while let Some(word) = words.next() {
        let Some(name) = word.strip_suffix(':').filter(|name| is_register(name)) else {
            // Not a line of registers, or not any more.
            return found;
        };
        let Some(value) = words.next() else {
            return found;
        };
        let digits = value.rsplit(':').next().unwrap_or(value);
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return found;
        }
        found.push((name.to_owned(), digits.to_owned()));
    }
    found
}

fn is_register(name: &str) -> bool {
    const OTHERS: [&str; 7] = ["EFLAGS", "ORIG_RAX", "CR0", "CR2", "CR3", "CR4", "CS"];
    let general = name.strip_prefix('R').is_some_and(|rest| {
        rest.len() == 2
            && rest
                .bytes()
                .all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
    });
    general || OTHERS.contains(&name)
}

fn cut(text: &str) -> String {
    let end = (0..=TEXT_MAX_BYTES.min(text.len()))
        .rev()
        .find(|n| text.is_char_boundary(*n));
    text[..end.unwrap_or(0)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::log::Record;

    fn log(text: &str) -> Log {
        let record = |(n, line): (usize, &str)| Record {
            time_ns: n as u64,
            caller: 0,
            text: line.as_bytes().to_vec(),
        };
        Log {
            records: text.lines().enumerate().map(record).collect(),
            ..Log::default()
        }
    }

    const OOPS: &str = "\
usb 1-1: new device
BUG: kernel NULL pointer dereference, address: 0000000000000000
#PF: supervisor write access in kernel mode
Oops: 0002 [#1] PREEMPT SMP NOPTI
CPU: 1 UID: 0 PID: 77 Comm: my prog Tainted: G            E      6.12.9 #1
Hardware name: QEMU Standard PC (Q35 + ICH9, 2009), BIOS 1.16.3
RIP: 0010:sysrq_handle_crash+0x16/0x20
Code: eb d1 e8 4d <c6> 04 25
RSP: 0018:ffffb0e2c0013e38 EFLAGS: 00010246
RAX: 0000000000000000 RBX: 0000000000000063 RCX: 0000000000000000
CR2: 0000000000000000 CR3: 0000000002a50000 CR4: 00000000000006b0
Call Trace:
 <TASK>
 __handle_sysrq.cold+0x44/0x11c
 ? vfs_write+0xc7/0x3f0
RIP: 0033:0x47b7a0
RAX: ffffffffffffffda RBX: 0000000000000001 RCX: 000000000047b7a0
 </TASK>
Modules linked in: pvpanic_pci(E) pvpanic(E) [last unloaded: x]
---[ end trace 0000000000000000 ]---
RIP: 0010:other+0x1/0x2
Kernel panic - not syncing: Fatal exception
Kernel Offset: 0x15400000
";

    #[test]
    fn an_oops_is_read_with_its_registers_calls_and_modules() {
        let events = events(&log(OOPS));
        assert_eq!(events.len(), 2, "{events:?}");
        let oops = &events[0];
        assert_eq!(oops.kind, EventKind::Oops);
        assert_eq!(
            oops.title,
            "BUG: kernel NULL pointer dereference, address: 0000000000000000"
        );
        assert_eq!((oops.cpu, oops.pid, oops.time_ns), (Some(1), Some(77), 1));
        assert_eq!(oops.comm.as_deref(), Some("my prog"));
        assert_eq!(oops.rip.as_deref(), Some("sysrq_handle_crash+0x16/0x20"));
        let register = |name: &str| {
            let mut all = oops.registers.iter().filter(|(n, _)| n == name);
            let value = all.next().map(|(_, value)| value.as_str());
            assert!(all.next().is_none(), "{name} twice");
            value
        };
        assert_eq!(register("RSP"), Some("ffffb0e2c0013e38"));
        assert_eq!(register("EFLAGS"), Some("00010246"));
        assert_eq!(register("RAX"), Some("0000000000000000"));
        assert_eq!(register("CR3"), Some("0000000002a50000"));
        assert_eq!(
            oops.call_trace[1..],
            ["__handle_sysrq.cold+0x44/0x11c", "? vfs_write+0xc7/0x3f0"]
        );
        let modules = ["pvpanic_pci(E)", "pvpanic(E)"].map(str::to_owned).to_vec();
        assert_eq!(oops.modules, Some(modules));
        assert_eq!(events[1].kind, EventKind::Panic);
        assert_eq!(events[1].rip, None);
    }

    #[test]
    fn a_log_full_of_warnings_still_ends_with_its_panic() {
        let text = "WARNING: CPU: 0 PID: 1 at x.c:1 f+0x1/0x2\n".repeat(1000) + OOPS;
        let events = events(&log(&text));
        assert_eq!(events.len(), EVENTS_MAX);
        assert_eq!(
            events[EVENTS_MAX - 1].title,
            "Kernel panic - not syncing: Fatal exception"
        );
    }
}
