//! The commands: a table from names to functions, and shared helpers.

mod keys;
mod server;
mod strings;

use kmorph_workload::arena::ArenaError;
use kmorph_workload::store::{Store, UnixMillis};

use crate::connection::Client;
use crate::info::Facts;
use crate::resp;

/// Maximum size of a reply, in bytes. A command with a larger reply gets an error instead.
pub(crate) const MAX_REPLY_BYTES: usize = 256 << 20;
const LONGEST_NAME: usize = 16;

/// The context of a command.
pub(crate) struct Context<'a> {
    pub(crate) store: &'a mut Store,
    pub(crate) client: &'a mut Client,
    pub(crate) facts: &'a Facts,
    pub(crate) out: &'a mut Vec<u8>,
    pub(crate) now: UnixMillis,
}

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum CommandError {
    /// The client's error: the reply, with its code.
    Reply(String),
    /// The store's error.
    Store(ArenaError),
}

impl From<ArenaError> for CommandError {
    fn from(error: ArenaError) -> Self {
        Self::Store(error)
    }
}

impl CommandError {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self::Reply(text.into())
    }

    fn syntax() -> Self {
        Self::new("ERR syntax error")
    }

    fn not_an_integer() -> Self {
        Self::new("ERR value is not an integer or out of range")
    }
}

pub(crate) type Result = std::result::Result<(), CommandError>;
/// Arguments without the command's name.
type Args<'a> = &'a [&'a [u8]];
type Handler = fn(&mut Context<'_>, Args<'_>) -> Result;

/// Name, minimum and maximum number of arguments, function.
const COMMANDS: &[(&str, usize, usize, Handler)] = &[
    ("APPEND", 2, 2, strings::append),
    ("CLIENT", 1, 8, server::client),
    ("COMMAND", 0, usize::MAX, server::command),
    ("CONFIG", 1, usize::MAX, server::config),
    ("DBSIZE", 0, 0, keys::dbsize),
    ("DECR", 1, 1, strings::decr),
    ("DECRBY", 2, 2, strings::decrby),
    ("DEL", 1, usize::MAX, keys::del),
    ("ECHO", 1, 1, server::echo),
    ("EXISTS", 1, usize::MAX, keys::exists),
    ("EXPIRE", 2, 2, keys::expire),
    ("EXPIREAT", 2, 2, keys::expireat),
    ("FLUSHALL", 0, 1, keys::flush),
    ("FLUSHDB", 0, 1, keys::flush),
    ("GET", 1, 1, strings::get),
    ("GETDEL", 1, 1, strings::getdel),
    ("GETSET", 2, 2, strings::getset),
    ("HELLO", 0, 6, server::hello),
    ("INCR", 1, 1, strings::incr),
    ("INCRBY", 2, 2, strings::incrby),
    ("INFO", 0, usize::MAX, server::info),
    ("KEYS", 1, 1, keys::keys),
    ("MGET", 1, usize::MAX, strings::mget),
    ("MSET", 2, usize::MAX, strings::mset),
    ("PERSIST", 1, 1, keys::persist),
    ("PEXPIRE", 2, 2, keys::pexpire),
    ("PEXPIREAT", 2, 2, keys::pexpireat),
    ("PING", 0, 1, server::ping),
    ("PSETEX", 3, 3, strings::psetex),
    ("PTTL", 1, 1, keys::pttl),
    ("QUIT", 0, usize::MAX, server::quit),
    ("SCAN", 1, 7, keys::scan),
    ("SELECT", 1, 1, server::select),
    ("SET", 2, 9, strings::set),
    ("SETEX", 3, 3, strings::setex),
    ("SETNX", 2, 2, strings::setnx),
    ("STRLEN", 1, 1, strings::strlen),
    ("TIME", 0, 0, server::time),
    ("TTL", 1, 1, keys::ttl),
    ("TYPE", 1, 1, keys::kind),
    ("UNLINK", 1, usize::MAX, keys::del),
];

/// Runs one command, whose first argument is its name, and writes exactly one reply.
///
/// # Errors
/// Only errors that end the server: the store is damaged, or no longer belongs to this process.
/// Then the reply must not be sent.
pub(crate) fn run(
    context: &mut Context<'_>,
    args: Args<'_>,
) -> std::result::Result<(), ArenaError> {
    let Some((name, args)) = args.split_first() else {
        return Ok(());
    };
    let before = context.out.len();
    let result = match lookup(name) {
        None => Err(unknown(name)),
        Some((known, least, most, _)) if !(least..=most).contains(&&args.len()) => {
            let name = known.to_ascii_lowercase();
            Err(CommandError::new(format!(
                "ERR wrong number of arguments for '{name}' command"
            )))
        }
        Some((_, _, _, handler)) => handler(context, args),
    };
    let text = match result {
        Ok(()) if context.out.len() - before > MAX_REPLY_BYTES => {
            format!("ERR the reply is larger than {MAX_REPLY_BYTES} bytes")
        }
        Ok(()) => return Ok(()),
        Err(CommandError::Reply(text)) => text,
        Err(CommandError::Store(ArenaError::Full)) => {
            "OOM command not allowed when used memory > 'maxmemory'.".to_owned()
        }
        Err(CommandError::Store(fatal)) => return Err(fatal),
    };
    context.out.truncate(before);
    resp::error(context.out, &text);
    Ok(())
}

fn lookup(name: &[u8]) -> Option<&'static (&'static str, usize, usize, Handler)> {
    let mut upper = [0; LONGEST_NAME];
    let upper = upper.get_mut(..name.len())?;
    upper.copy_from_slice(name);
    upper.make_ascii_uppercase();
    COMMANDS
        .binary_search_by(|(known, ..)| known.as_bytes().cmp(upper))
        .ok()
        .and_then(|at| COMMANDS.get(at))
}

fn unknown(name: &[u8]) -> CommandError {
    let shown: String = String::from_utf8_lossy(name).chars().take(64).collect();
    CommandError::new(format!("ERR unknown command '{shown}'"))
}

fn integer(text: &[u8]) -> std::result::Result<i64, CommandError> {
    resp::number(text).ok_or_else(CommandError::not_an_integer)
}

fn is(text: &[u8], word: &str) -> bool {
    text.eq_ignore_ascii_case(word.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_so_that_every_command_is_found() {
        for (name, ..) in COMMANDS {
            assert!(lookup(name.as_bytes()).is_some(), "{name}");
            assert!(lookup(name.to_ascii_lowercase().as_bytes()).is_some());
        }
        assert!(lookup(b"A-NAME-LONGER-THAN-ANY").is_none());
        assert!(lookup(b"").is_none());
    }
}
