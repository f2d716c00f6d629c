use super::*;

fn places() -> Places {
    let dir = PathBuf::from("/nonexistent");
    Places {
        config: None,
        state_dir: dir.clone(),
        run_dir: dir.clone(),
        kv: dir,
    }
}

fn parse(text: &str) -> Result<Settings, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kmorphd.conf");
    std::fs::write(&path, text).unwrap();
    let file = File::read(&path).map_err(|e| e.to_string())?;
    file.settings(places()).map_err(|e| e.to_string())
}

#[test]
fn an_empty_file_is_the_defaults() {
    let settings = parse("").unwrap();
    assert_eq!(settings.recoveries_max, 8);
    assert!(settings.pool.cpus_shared);
    assert!(!settings.pool.cpus.is_empty());
}

#[test]
fn an_unknown_key_and_a_wrong_type_are_refused_with_their_line() {
    let error = parse("[defaults]\nheartbeat_timeout_s = 1\nheartbeet = 2\n").unwrap_err();
    assert!(
        error.contains("line 3") && error.contains("heartbeet"),
        "{error}"
    );
    let error = parse("[limits]\nrecoveries = \"many\"\n").unwrap_err();
    assert!(error.contains("line 2, column"), "{error}");
    assert!(
        parse("backend = \"vmware\"\n")
            .unwrap_err()
            .contains("line 1")
    );
}

#[test]
fn the_pool_of_multikernel_is_not_the_hosts() {
    let settings = parse("backend = \"multikernel\"").unwrap();
    assert!(settings.pool.cpus.is_empty() && !settings.pool.cpus_shared);
    assert_eq!(settings.pool.memory_bytes, 0);
}

#[test]
fn what_looks_like_a_fault_and_is_none_is_taken() {
    for text in [
        "[pool]\nshare_memory = true\nmemory_mib = 1073741824",
        "[qemu]\nprogram = \"qemu-system-x86_64\"",
        "backend = \"qemu\"\n[defaults]\nvmcore = \"required\"",
    ] {
        parse(text).unwrap();
    }
}

#[test]
fn a_rate_of_captures_is_taken_over_and_there_is_none_by_default() {
    assert_eq!(parse("").unwrap().vmcore.rate, None);
    let limited = parse("[vmcore]\nrate_mib_s = 8").unwrap();
    assert_eq!(
        limited.vmcore.rate,
        kmorph_vmcore::paced::Rate::mib_per_second(8)
    );
}

#[test]
fn the_budget_of_a_morph_is_what_is_configured_or_what_the_backend_can_keep() {
    for (text, millis) in [
        ("", 10.0),
        ("backend = \"qemu\"", 100.0),
        ("backend = \"multikernel\"", 10.0),
        ("backend = \"qemu\"\n[morph]\ndowntime_budget_ms = 2.5", 2.5),
    ] {
        let budget = parse(text).unwrap().downtime_budget;
        assert_eq!(budget, Duration::from_secs_f64(millis / 1e3), "{text}");
    }
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    for (text, key) in [
        (
            "[defaults]\nheartbeat_timeout_s = 0.0",
            "heartbeat_timeout_s",
        ),
        ("[limits]\nstart_timeout_s = -1", "start_timeout_s"),
        ("[limits]\nrecoveries = 0", "recoveries"),
        (
            "[morph]\ndowntime_budget_ms = 0",
            "line 2, column 22: morph.downtime_budget_ms",
        ),
        (
            "[morph]\ndowntime_budget_ms = nan",
            "morph.downtime_budget_ms",
        ),
        ("[vmcore]\nlevel = 32", "vmcore.level"),
        ("[vmcore]\nthreads = 0", "vmcore.threads"),
        ("[vmcore]\nrate_mib_s = 7", "vmcore.rate_mib_s"),
        ("[vmcore]\nrate_mib_s = 65537", "vmcore.rate_mib_s"),
        ("[vmcore]\nsurvivors = 9", "vmcore.survivors"),
        ("[vmcore]\nkeep = 0", "vmcore.keep"),
        ("[vmcore]\ndir = \"vmcores\"", "vmcore.dir"),
        ("backend = \"multikernel\"\n[pool]\nmemory_mib = 1", "pool"),
        ("[multikernel]\nroot = \"sys\"", "multikernel.root"),
        (
            "[multikernel]\nvsock_sockets = \"x\"",
            "multikernel.vsock_sockets",
        ),
        (
            "[pool]\nmemory_mib = 1073741824",
            "line 2, column 14: pool.memory_mib: this machine has",
        ),
        (
            "[paths]\nstate_dir = \"state\"",
            "line 2, column 13: paths.state_dir: state is not an absolute path",
        ),
        ("[paths]\nrun_dir = \"\"", "paths.run_dir"),
        ("[paths]\nsocket = \"./s\"", "paths.socket"),
        ("[paths]\nagent = \"bin/agent\"", "paths.agent"),
        ("[paths]\nkv = \"kv\"", "paths.kv"),
        ("[paths]\ncache_dir = \"cache\"", "paths.cache_dir"),
        ("[qemu]\nprogram = \"bin/qemu\"", "qemu.program"),
        ("[qemu]\nvhost_vsock = \"./vhost\"", "qemu.vhost_vsock"),
        ("[qemu]\nkerf_host = \"../host\"", "qemu.kerf_host"),
        ("[qemu]\nmodules = \"modules\"", "qemu.modules"),
        ("[qemu]\nkerf_modules = \"kmod\"", "qemu.kerf_modules"),
        (
            "[defaults]\nvmcore = \"on\"",
            "line 2, column 10: defaults.vmcore",
        ),
        (
            "[defaults]\nmorph_timeout_s = 0.5",
            "line 2, column 19: defaults.morph_timeout_s",
        ),
        ("[pool]\ncpus = []", "pool.cpus"),
        ("[pool]\ncpus = [60000]", "pool.cpus"),
        (
            "[pool]\nmemory_mib = 18446744073709551615",
            "pool.memory_mib",
        ),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.contains(key), "{text}: {error}");
    }
}
