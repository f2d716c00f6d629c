//! The control socket for tests: a Unix socket that takes one line and answers with one line.
//!
//! ```text
//!  load <id> <image> <initrd|-> <command line>      unload <id>      reboot <command> <id>
//!  panic|hang|deaf|running|release|cmdline <name>    lag <name> <milliseconds>
//!  ──▶ ok[ <answer>] | error <errno>
//! ```

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::libc::{EINVAL, EIO};

use crate::machine::Machine;

/// The socket's name in the emulator's directory.
pub(crate) const SOCKET: &str = "control.sock";

pub(crate) fn serve(machine: &Arc<Machine>, directory: &Path) {
    let listener = UnixListener::bind(directory.join(SOCKET)).unwrap();
    let machine = Arc::clone(machine);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let machine = Arc::clone(&machine);
            std::thread::spawn(move || answer(&machine, &stream));
        }
    });
}

fn answer(machine: &Arc<Machine>, mut stream: &UnixStream) {
    let mut line = String::new();
    if BufReader::new(stream).read_line(&mut line).is_err() {
        return;
    }
    let text = match carry_out(machine, line.trim_end_matches('\n')) {
        Ok(answer) => format!("ok {answer}"),
        Err(errno) => format!("error {errno}"),
    };
    let _ = writeln!(stream, "{}", text.trim_end());
}

fn carry_out(machine: &Arc<Machine>, line: &str) -> Result<String, i32> {
    let words: Vec<&str> = line.splitn(5, ' ').collect();
    let number = |text: &str| text.parse::<u32>().map_err(|_| EINVAL);
    let done = match words.as_slice() {
        ["load", id, image, initrd, cmdline] => {
            let image = std::fs::read(image).map_err(|_| EIO)?;
            let initrd = match *initrd {
                "-" => Vec::new(),
                path => std::fs::read(path).map_err(|_| EIO)?,
            };
            machine.load(number(id)?, &image, &initrd, cmdline)
        }
        ["unload", id] => machine.unload(number(id)?),
        ["reboot", command, id] => machine.reboot(number(command)?, number(id)?),
        ["lag", name, ms] => machine.lag(name, Duration::from_millis(number(ms)?.into())),
        ["boots", "wait"] => machine.hold_boots(true),
        ["boots", "go"] => machine.hold_boots(false),
        [what, name] => return machine.strike(what, name),
        _ => Err(EINVAL),
    };
    done.map(|()| String::new())
}
