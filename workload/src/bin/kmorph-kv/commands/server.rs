//! Commands about the connection and the server.

use super::{Args, CommandError, Context, Result, integer, is};
use crate::connection::MAX_NAME_BYTES;
use crate::{glob, info, resp};

pub(super) fn ping(context: &mut Context<'_>, args: Args<'_>) -> Result {
    match args.first() {
        Some(text) => resp::bulk(context.out, text),
        None => resp::simple(context.out, "PONG"),
    }
    Ok(())
}

pub(super) fn echo(context: &mut Context<'_>, args: Args<'_>) -> Result {
    resp::bulk(context.out, args[0]);
    Ok(())
}

pub(super) fn quit(context: &mut Context<'_>, _: Args<'_>) -> Result {
    context.client.closing = true;
    resp::simple(context.out, "OK");
    Ok(())
}

pub(super) fn select(context: &mut Context<'_>, args: Args<'_>) -> Result {
    if integer(args[0])? != 0 {
        return Err(CommandError::new("ERR DB index is out of range"));
    }
    resp::simple(context.out, "OK");
    Ok(())
}

pub(super) fn time(context: &mut Context<'_>, _: Args<'_>) -> Result {
    resp::array(context.out, 2);
    for part in [context.now / 1000, context.now % 1000 * 1000] {
        resp::bulk(context.out, part.to_string().as_bytes());
    }
    Ok(())
}

pub(super) fn hello(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let mut args = args.iter();
    if let Some(version) = args.next() {
        if resp::number(version) != Some(2) {
            return Err(CommandError::new("NOPROTO unsupported protocol version"));
        }
        while let Some(option) = args.next() {
            match args.next() {
                Some(name) if is(option, "SETNAME") => context.client.name = checked_name(name)?,
                _ => return Err(CommandError::new("ERR only SETNAME is supported in HELLO")),
            }
        }
    }
    let id = i64::try_from(context.client.id).unwrap_or(i64::MAX);
    resp::array(context.out, 14);
    for (name, value) in [
        ("server", "kmorph-kv"),
        ("version", env!("CARGO_PKG_VERSION")),
        ("mode", "standalone"),
        ("role", "master"),
    ] {
        resp::bulk(context.out, name.as_bytes());
        resp::bulk(context.out, value.as_bytes());
    }
    resp::bulk(context.out, b"proto");
    resp::integer(context.out, 2);
    resp::bulk(context.out, b"id");
    resp::integer(context.out, id);
    resp::bulk(context.out, b"modules");
    resp::array(context.out, 0);
    Ok(())
}

fn checked_name(name: &[u8]) -> std::result::Result<Vec<u8>, CommandError> {
    let plain = name.iter().all(|byte| (b'!'..=b'~').contains(byte));
    if plain && name.len() <= MAX_NAME_BYTES {
        return Ok(name.to_vec());
    }
    Err(CommandError::new(
        "ERR Client names cannot contain spaces, newlines or special characters.",
    ))
}

pub(super) fn client(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let (what, rest) = (args[0], &args[1..]);
    if is(what, "SETNAME") && rest.len() == 1 {
        context.client.name = checked_name(rest[0])?;
        resp::simple(context.out, "OK");
    } else if is(what, "GETNAME") && rest.is_empty() {
        let name = &context.client.name;
        resp::bulk_or_null(context.out, (!name.is_empty()).then_some(name));
    } else if is(what, "ID") && rest.is_empty() {
        let id = i64::try_from(context.client.id).unwrap_or(i64::MAX);
        resp::integer(context.out, id);
    } else if is(what, "SETINFO") && rest.len() == 2 {
        resp::simple(context.out, "OK");
    } else {
        return Err(CommandError::new(
            "ERR unknown subcommand or wrong number of arguments for 'client': \
             SETNAME, GETNAME, ID and SETINFO are supported",
        ));
    }
    Ok(())
}

pub(super) fn command(context: &mut Context<'_>, args: Args<'_>) -> Result {
    match args.first() {
        Some(what) if is(what, "COUNT") => {
            let count = super::COMMANDS.len();
            resp::integer(context.out, i64::try_from(count).unwrap_or(0));
        }
        // No documentation for redis-cli's hints.
        _ => resp::array(context.out, 0),
    }
    Ok(())
}

pub(super) fn config(context: &mut Context<'_>, args: Args<'_>) -> Result {
    if is(args[0], "RESETSTAT") {
        resp::simple(context.out, "OK");
        return Ok(());
    }
    if !is(args[0], "GET") || args.len() < 2 {
        return Err(CommandError::new(
            "ERR only CONFIG GET is supported: set options on the command line",
        ));
    }
    let facts = context.facts;
    let settings = [
        ("appendonly", "no".to_owned()),
        ("databases", "1".to_owned()),
        ("maxclients", facts.max_clients.to_string()),
        ("maxmemory", context.store.capacity().to_string()),
        ("proto-max-bulk-len", facts.limits.bulk.to_string()),
        ("save", String::new()),
    ];
    let asked: Vec<_> = settings
        .iter()
        .filter(|(name, _)| {
            args[1..]
                .iter()
                .any(|pattern| glob::matches(&pattern.to_ascii_lowercase(), name.as_bytes()))
        })
        .collect();
    resp::array(context.out, asked.len() * 2);
    for (name, value) in asked {
        resp::bulk(context.out, name.as_bytes());
        resp::bulk(context.out, value.as_bytes());
    }
    Ok(())
}

pub(super) fn info(context: &mut Context<'_>, _: Args<'_>) -> Result {
    let text = info::text(context.facts, context.store)?;
    resp::bulk(context.out, text.as_bytes());
    Ok(())
}
