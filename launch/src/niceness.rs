//! How much a thread stands back behind others, or goes before them: its nice value, setpriority(2).
//!
//! On Linux each thread has its own, and begins with that of the thread that starts it.

use std::io;

/// The nice value of the calling thread: -20 goes first, 19 last.
///
/// # Errors
/// The system's.
pub fn own() -> io::Result<i32> {
    Ok(rustix::process::getpriority_process(None)?)
}

/// Gives the calling thread this nice value. One system call, and no memory: it may be called between fork and exec.
///
/// # Errors
/// The system's: only root may give a lower value than the thread has.
pub fn set_own(value: i32) -> io::Result<()> {
    Ok(rustix::process::setpriority_process(None, value)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_stands_back_alone_and_its_own_threads_with_it() {
        let before = own().unwrap();
        let inside = std::thread::spawn(|| {
            set_own(19).unwrap();
            let child = std::thread::spawn(|| own().unwrap());
            (own().unwrap(), child.join().unwrap())
        });
        assert_eq!(inside.join().unwrap(), (19, 19));
        assert_eq!(own().unwrap(), before);
    }
}
