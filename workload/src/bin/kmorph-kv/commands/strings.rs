//! Commands on values: GET, SET, and in-place changes.

use kmorph_workload::store::{Expiry, MAX_KEY_BYTES, UnixMillis};

use super::{Args, CommandError, Context, MAX_REPLY_BYTES, Result, integer, is};
use crate::resp;

/// Milliseconds in one second.
pub(super) const SECOND: i64 = 1000;

fn checked(key: &[u8]) -> Result {
    if key.len() > MAX_KEY_BYTES {
        let text = format!("ERR the key is longer than {MAX_KEY_BYTES} bytes");
        return Err(CommandError::new(text));
    }
    Ok(())
}

fn store(context: &mut Context<'_>, key: &[u8], value: &[u8], expiry: Expiry) -> Result {
    checked(key)?;
    Ok(context.store.set(key, value, expiry, context.now)?)
}

pub(super) fn get(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let value = context.store.get(args[0], context.now)?;
    resp::bulk_or_null(context.out, value);
    Ok(())
}

pub(super) fn getdel(context: &mut Context<'_>, args: Args<'_>) -> Result {
    get(context, args)?;
    context.store.remove(args[0], context.now)?;
    Ok(())
}

pub(super) fn getset(context: &mut Context<'_>, args: Args<'_>) -> Result {
    get(context, args)?;
    store(context, args[0], args[1], Expiry::Never)
}

pub(super) fn strlen(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let len = context.store.value_len(args[0], context.now)?.unwrap_or(0);
    resp::integer(context.out, i64::try_from(len).unwrap_or(i64::MAX));
    Ok(())
}

pub(super) fn mget(context: &mut Context<'_>, args: Args<'_>) -> Result {
    resp::array(context.out, args.len());
    for key in args {
        let value = context.store.get(key, context.now)?;
        resp::bulk_or_null(context.out, value);
        // Stop early: the caller refuses a reply of this size.
        if context.out.len() > 2 * MAX_REPLY_BYTES {
            break;
        }
    }
    Ok(())
}

pub(super) fn mset(context: &mut Context<'_>, args: Args<'_>) -> Result {
    if !args.len().is_multiple_of(2) {
        let text = "ERR wrong number of arguments for 'mset' command";
        return Err(CommandError::new(text));
    }
    for key in args.iter().step_by(2) {
        checked(key)?;
    }
    for pair in args.chunks_exact(2) {
        store(context, pair[0], pair[1], Expiry::Never)?;
    }
    resp::simple(context.out, "OK");
    Ok(())
}

/// The options of SET.
struct SetOptions {
    expiry: Expiry,
    if_missing: bool,
    if_there: bool,
    give_old: bool,
}

fn set_options(
    context: &Context<'_>,
    args: Args<'_>,
) -> std::result::Result<SetOptions, CommandError> {
    let mut options = SetOptions {
        expiry: Expiry::Never,
        if_missing: false,
        if_there: false,
        give_old: false,
    };
    let mut args = args.iter();
    while let Some(option) = args.next() {
        if is(option, "NX") {
            options.if_missing = true;
        } else if is(option, "XX") {
            options.if_there = true;
        } else if is(option, "GET") {
            options.give_old = true;
        } else {
            if options.expiry != Expiry::Never {
                return Err(CommandError::syntax());
            }
            let mut time = || args.next().ok_or_else(CommandError::syntax);
            options.expiry = if is(option, "KEEPTTL") {
                Expiry::Keep
            } else if is(option, "EX") {
                after("set", time()?, SECOND, context.now)?
            } else if is(option, "PX") {
                after("set", time()?, 1, context.now)?
            } else if is(option, "EXAT") {
                after("set", time()?, SECOND, 0)?
            } else if is(option, "PXAT") {
                after("set", time()?, 1, 0)?
            } else {
                return Err(CommandError::syntax());
            };
        }
    }
    if options.if_missing && options.if_there {
        return Err(CommandError::syntax());
    }
    Ok(options)
}

pub(super) fn set(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let (key, value) = (args[0], args[1]);
    checked(key)?;
    let options = set_options(context, &args[2..])?;
    let there = context.store.contains(key, context.now)?;
    let refused = (options.if_missing && there) || (options.if_there && !there);
    if options.give_old {
        get(context, &args[..1])?;
    }
    if !refused {
        store(context, key, value, options.expiry)?;
    }
    match (options.give_old, refused) {
        (true, _) => {}
        (false, true) => resp::bulk_or_null(context.out, None),
        (false, false) => resp::simple(context.out, "OK"),
    }
    Ok(())
}

pub(super) fn setnx(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let there = context.store.contains(args[0], context.now)?;
    if !there {
        store(context, args[0], args[1], Expiry::Never)?;
    }
    resp::integer(context.out, i64::from(!there));
    Ok(())
}

pub(super) fn setex(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let expiry = after("setex", args[1], SECOND, context.now)?;
    store(context, args[0], args[2], expiry)?;
    resp::simple(context.out, "OK");
    Ok(())
}

pub(super) fn psetex(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let expiry = after("psetex", args[1], 1, context.now)?;
    store(context, args[0], args[2], expiry)?;
    resp::simple(context.out, "OK");
    Ok(())
}

/// Returns a positive time in units of `unit` milliseconds after `base`.
fn after(
    command: &str,
    text: &[u8],
    unit: i64,
    base: UnixMillis,
) -> std::result::Result<Expiry, CommandError> {
    integer(text)?
        .checked_mul(unit)
        .filter(|millis| *millis > 0)
        .and_then(|millis| u64::try_from(millis).ok())
        .and_then(|millis| base.checked_add(millis))
        .map(Expiry::At)
        .ok_or_else(|| CommandError::new(format!("ERR invalid expire time in '{command}' command")))
}

pub(super) fn append(context: &mut Context<'_>, args: Args<'_>) -> Result {
    checked(args[0])?;
    let len = context.store.append(args[0], args[1], context.now)?;
    resp::integer(context.out, i64::try_from(len).unwrap_or(i64::MAX));
    Ok(())
}

pub(super) fn incr(context: &mut Context<'_>, args: Args<'_>) -> Result {
    add(context, args[0], 1)
}

pub(super) fn decr(context: &mut Context<'_>, args: Args<'_>) -> Result {
    add(context, args[0], -1)
}

pub(super) fn incrby(context: &mut Context<'_>, args: Args<'_>) -> Result {
    add(context, args[0], integer(args[1])?)
}

pub(super) fn decrby(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let by = integer(args[1])?
        .checked_neg()
        .ok_or_else(|| CommandError::new("ERR decrement would overflow"))?;
    add(context, args[0], by)
}

fn add(context: &mut Context<'_>, key: &[u8], by: i64) -> Result {
    let old = match context.store.get(key, context.now)? {
        Some(text) => integer(text)?,
        None => 0,
    };
    let new = old
        .checked_add(by)
        .ok_or_else(|| CommandError::new("ERR increment or decrement would overflow"))?;
    store(context, key, new.to_string().as_bytes(), Expiry::Keep)?;
    resp::integer(context.out, new);
    Ok(())
}
