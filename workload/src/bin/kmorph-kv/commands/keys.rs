//! Commands on keys: existence, listing, expiry.

use kmorph_workload::store::{Expiry, TimeToLive, UnixMillis};

use super::strings::SECOND;
use super::{Args, CommandError, Context, MAX_REPLY_BYTES, Result, integer, is};
use crate::{glob, resp};

/// Default number of keys per SCAN.
const SCAN_COUNT: i64 = 10;
/// Maximum number of keys per SCAN.
const MAX_SCAN_COUNT: i64 = 100_000;

fn count(context: &mut Context<'_>, number: u64) {
    resp::integer(context.out, i64::try_from(number).unwrap_or(i64::MAX));
}

pub(super) fn del(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let mut removed = 0;
    for key in args {
        removed += u64::from(context.store.remove(key, context.now)?);
    }
    count(context, removed);
    Ok(())
}

pub(super) fn exists(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let mut there = 0;
    for key in args {
        there += u64::from(context.store.contains(key, context.now)?);
    }
    count(context, there);
    Ok(())
}

pub(super) fn kind(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let there = context.store.contains(args[0], context.now)?;
    resp::simple(context.out, if there { "string" } else { "none" });
    Ok(())
}

pub(super) fn ttl(context: &mut Context<'_>, args: Args<'_>) -> Result {
    time_to_live(context, args[0], SECOND)
}

pub(super) fn pttl(context: &mut Context<'_>, args: Args<'_>) -> Result {
    time_to_live(context, args[0], 1)
}

fn time_to_live(context: &mut Context<'_>, key: &[u8], unit: i64) -> Result {
    let left = match context.store.time_to_live(key, context.now)? {
        TimeToLive::NoKey => -2,
        TimeToLive::Never => -1,
        TimeToLive::Millis(left) => {
            // Rounded as in redis: half a unit rounds up.
            i64::try_from(left)
                .unwrap_or(i64::MAX)
                .saturating_add(unit / 2)
                / unit
        }
    };
    resp::integer(context.out, left);
    Ok(())
}

pub(super) fn expire(context: &mut Context<'_>, args: Args<'_>) -> Result {
    expire_at(context, args, SECOND, context.now)
}

pub(super) fn pexpire(context: &mut Context<'_>, args: Args<'_>) -> Result {
    expire_at(context, args, 1, context.now)
}

pub(super) fn expireat(context: &mut Context<'_>, args: Args<'_>) -> Result {
    expire_at(context, args, SECOND, 0)
}

pub(super) fn pexpireat(context: &mut Context<'_>, args: Args<'_>) -> Result {
    expire_at(context, args, 1, 0)
}

fn expire_at(context: &mut Context<'_>, args: Args<'_>, unit: i64, base: UnixMillis) -> Result {
    let invalid = || CommandError::new("ERR invalid expire time in 'expire' command");
    let base = i64::try_from(base).map_err(|_| invalid())?;
    let at = integer(args[1])?
        .checked_mul(unit)
        .and_then(|millis| millis.checked_add(base))
        .ok_or_else(invalid)?;
    // A time in the past removes the key.
    let done = match u64::try_from(at) {
        Ok(at) if at > context.now => {
            context
                .store
                .set_expiry(args[0], Expiry::At(at), context.now)?
        }
        _ => context.store.remove(args[0], context.now)?,
    };
    count(context, u64::from(done));
    Ok(())
}

pub(super) fn persist(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let done = context
        .store
        .set_expiry(args[0], Expiry::Never, context.now)?;
    count(context, u64::from(done));
    Ok(())
}

pub(super) fn dbsize(context: &mut Context<'_>, _: Args<'_>) -> Result {
    let keys = context.store.keys()?;
    count(context, keys);
    Ok(())
}

pub(super) fn flush(context: &mut Context<'_>, args: Args<'_>) -> Result {
    if !args.iter().all(|arg| is(arg, "SYNC") || is(arg, "ASYNC")) {
        return Err(CommandError::syntax());
    }
    context.store.flush()?;
    resp::simple(context.out, "OK");
    Ok(())
}

pub(super) fn keys(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let mut found = 0;
    let mut names = Vec::new();
    context.store.scan(0, u64::MAX, context.now, |key| {
        if names.len() <= MAX_REPLY_BYTES && glob::matches(args[0], key) {
            found += 1;
            resp::bulk(&mut names, key);
        }
    })?;
    resp::array(context.out, found);
    context.out.append(&mut names);
    Ok(())
}

pub(super) fn scan(context: &mut Context<'_>, args: Args<'_>) -> Result {
    let cursor = resp::number(args[0])
        .and_then(|cursor| u64::try_from(cursor).ok())
        .ok_or_else(|| CommandError::new("ERR invalid cursor"))?;
    let mut pattern: &[u8] = b"*";
    let mut at_least = SCAN_COUNT;
    let mut any_type = true;
    if !args.len().is_multiple_of(2) {
        for option in args[1..].chunks_exact(2) {
            if is(option[0], "MATCH") {
                pattern = option[1];
            } else if is(option[0], "COUNT") {
                at_least = integer(option[1])?;
            } else if is(option[0], "TYPE") {
                any_type = is(option[1], "string");
            } else {
                return Err(CommandError::syntax());
            }
        }
    } else {
        return Err(CommandError::syntax());
    }
    if at_least < 1 {
        return Err(CommandError::syntax());
    }
    let at_least = u64::try_from(at_least.min(MAX_SCAN_COUNT)).unwrap_or(1);
    let mut found = 0;
    let mut names = Vec::new();
    let next = context.store.scan(cursor, at_least, context.now, |key| {
        if any_type && glob::matches(pattern, key) {
            found += 1;
            resp::bulk(&mut names, key);
        }
    })?;
    resp::array(context.out, 2);
    resp::bulk(context.out, next.to_string().as_bytes());
    resp::array(context.out, found);
    context.out.append(&mut names);
    Ok(())
}
