//! The keys in which two configurations differ.

use std::collections::BTreeMap;

use serde_json::Value;

use super::File;

/// The tables, and the keys of the file itself, that are read at the daemon's start alone.
const READ_ONCE: [&str; 5] = ["backend", "paths", "qemu", "multikernel", "log"];

/// Whether the daemon reads `key` at its start alone.
pub(crate) fn is_read_once(key: &str) -> bool {
    let top = key.split('.').next().unwrap_or(key);
    READ_ONCE.contains(&top)
}

/// The keys, as `table.key`, that have another value in `new` than in `old`. A key that is not set has its default.
pub(crate) fn changed_keys(old: &File, new: &File) -> Vec<String> {
    let (old, new) = (values(old), values(new));
    let differ = new
        .into_iter()
        .filter(|(key, value)| old.get(key) != Some(value));
    differ.map(|(key, _)| key).collect()
}

fn values(file: &File) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    let Ok(Value::Object(tables)) = serde_json::to_value(file) else {
        return all;
    };
    for (table, value) in tables {
        match value {
            Value::Object(keys) => {
                all.extend(
                    keys.into_iter()
                        .map(|(key, value)| (format!("{table}.{key}"), value)),
                );
            }
            value => _ = all.insert(table, value),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_named_and_nothing_else() {
        let file = |text: &str| toml::from_str::<File>(text).unwrap();
        let changed = |old, new| changed_keys(&file(old), &file(new));
        assert!(changed("", "").is_empty());
        let default = "[defaults]\nheartbeat_timeout_s = 5.0";
        assert!(changed("", default).is_empty(), "the default, written out");
        assert_eq!(
            changed("", "[defaults]\nauto_heal = false"),
            ["defaults.auto_heal"]
        );
        assert_eq!(changed("[pool]\nmemory_mib = 1", ""), ["pool.memory_mib"]);
        let many = "backend = \"qemu\"\n[log]\nlevel = \"debug\"\n[qemu]\naccel = \"kvm\"\n[vmcore]\nkeep = 1";
        let keys = changed("", many);
        assert_eq!(keys, ["backend", "log.level", "qemu.accel", "vmcore.keep"]);
        let waits: Vec<_> = keys.iter().map(|key| is_read_once(key)).collect();
        assert_eq!(waits, [true, true, true, false]);
    }
}
