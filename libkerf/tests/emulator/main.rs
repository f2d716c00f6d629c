//! The kernel's files, emulated: a file system that reacts to writes like the kernel and shares no code with libkerf.
//! The tests require root and /dev/fuse.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

#[path = "../beside/kerf.rs"]
#[allow(dead_code, reason = "shared with another test")]
mod kerf;

mod boot;
mod records;

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use kmorph_emulated_kernel::{Emulator, Trap};
use libkerf::allocate::{self, Exchange, Handover, Request};
use libkerf::check::{Context, Rule};
use libkerf::dts;
use libkerf::kernel::{ApplyError, Kernel, KernelError, Lock, LockError};
use libkerf::machine::Machine;
use libkerf::model::PciAddress;
use libkerf::overlay::{CpuMove, Create, DeviceMove, Operation, Overlay, Status, Target};

const MIB: u64 = 1 << 20;

struct Ground {
    emulator: Emulator,
    kernel: Kernel,
}

/// Returns a kernel whose pool has six CPUs, 3 GiB and a network card; `None` if this machine cannot emulate a kernel.
fn ground() -> Option<Ground> {
    if !nix::unistd::Uid::effective().is_root() || !Path::new("/dev/fuse").exists() {
        eprintln!(
            "SKIPPED: the kernel's files are emulated with FUSE, which takes root and /dev/fuse"
        );
        return None;
    }
    let emulator = Emulator::start();
    let kernel = Kernel::at(emulator.root(), emulator.beside("run/kerf.lock"));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/trees/baseline.dts");
    let baseline = dts::read(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(matches!(
        kernel.state(None),
        Err(KernelError::NoPool { .. })
    ));
    let system = kernel
        .write_baseline(&baseline, Context::default())
        .unwrap();
    assert_eq!(system.resources.cpus, [8, 10, 12, 14, 16, 18]);
    assert_eq!(system.resources.memory_bytes(), 0xc000_0000);
    let again = kernel.write_baseline(&baseline, Context::default());
    assert!(
        again.unwrap_err().to_string().contains("busy"),
        "a pool is made once"
    );
    Some(Ground { emulator, kernel })
}

fn create(name: &str, cpus: &[u64]) -> Overlay {
    let instance = libkerf::model::Instance {
        name: name.to_owned(),
        cpus: cpus.to_vec(),
        memory_bytes: 256 * MIB,
        ..Default::default()
    };
    let create = Create {
        instance,
        ..Create::default()
    };
    Overlay::new([(Target::Instances, vec![Operation::Create(Box::new(create))])])
}

fn nic() -> PciAddress {
    PciAddress::parse("0000:09:00.0").unwrap()
}

fn give(name: &str, operations: Vec<Operation>) -> Overlay {
    Overlay::new([(Target::Instance(name.to_owned()), operations)])
}

#[test]
fn an_instance_is_made_changed_and_removed() {
    let Some(Ground {
        kernel,
        emulator: _mounted,
    }) = ground()
    else {
        return;
    };
    let state = kernel.state(None).unwrap();
    let request = Request {
        name: "web".to_owned(),
        cpus: 2,
        memory: 256 * MIB,
        ..Request::default()
    };
    let overlay = allocate::instance(&state, &Machine::default(), &request).unwrap();
    let applied = kernel.apply(&overlay, None).unwrap();
    assert_eq!(applied.transaction, 2, "the kernel's first number");
    let web = kernel.instance("web").unwrap();
    assert_eq!(
        (web.cpus.len(), web.memory_bytes, web.id),
        (2, 256 * MIB, Some(1))
    );
    assert_eq!(kernel.status("web").unwrap(), Status::Ready);

    let mut after = applied.state.system.clone();
    let free = applied.state.system.free_cpus();
    after.instances[0].cpus = vec![web.cpus[0], free[0], free[1]];
    after.instances[0].devices.push("0000:09:00.0".to_owned());
    after.instances[0].memory_bytes += 64 * MIB;
    let overlay = applied.state.overlay_to(&after).unwrap();
    let applied = kernel.apply(&overlay, None).unwrap();
    assert_eq!(
        applied.state.system.instances[0].devices,
        [nic().node_name()]
    );

    kernel.rollback(applied.transaction).unwrap();
    assert_eq!(kernel.instance("web").unwrap(), web, "as before");

    let remove = Overlay::new([(Target::Instances, vec![Operation::Remove("web".to_owned())])]);
    kernel.apply(&remove, None).unwrap();
    assert!(kernel.instance_names().unwrap().is_empty());
    assert_eq!(kernel.state(None).unwrap().system.free_cpus().len(), 6);
}

#[test]
fn a_new_instance_has_its_memory_in_pieces_and_where_it_asks_for_it() {
    let Some(Ground {
        kernel,
        emulator: _mounted,
    }) = ground()
    else {
        return;
    };
    let made = |name: &str, nodes: &[u32], memory_bytes: u64| {
        let mut overlay = create(name, &[]);
        if let Operation::Create(create) = &mut overlay.fragments[0].operations[0] {
            create.instance.numa_nodes = nodes.to_vec();
            create.instance.memory_bytes = memory_bytes;
        }
        kernel.apply(&overlay, None).unwrap();
        kernel.instance(name).unwrap()
    };
    let chunks = kernel.state(None).unwrap().system.resources.chunks;
    let [first, second] = chunks.as_slice() else {
        panic!("{chunks:?}");
    };
    let near = made("near", &[1], 256 * MIB);
    assert_eq!(near.memory_base, Some(second.base));
    let large = made("large", &[], first.size + 256 * MIB);
    assert_eq!(large.memory_bytes, first.size + 256 * MIB);
}

#[test]
fn all_of_one_instance_goes_to_another() {
    let Some(Ground {
        kernel,
        emulator: _mounted,
    }) = ground()
    else {
        return;
    };
    kernel.apply(&create("old", &[8, 10]), None).unwrap();
    kernel.apply(&create("new", &[12]), None).unwrap();
    kernel
        .apply(
            &give("old", vec![Operation::DeviceAdd(vec![nic().into()])]),
            None,
        )
        .unwrap();
    let exchange = Exchange {
        from: "old".to_owned(),
        to: "new".to_owned(),
        handover: Handover::Everything,
        memory: 0,
    };
    let overlay = allocate::plan(&kernel.state(None).unwrap(), &exchange).unwrap();
    kernel.apply(&overlay, None).unwrap();
    let new = kernel.instance("new").unwrap();
    assert_eq!(new.cpus, [12, 8, 10]);
    assert_eq!(new.devices, [nic().node_name()]);
    assert_eq!(kernel.instance_names().unwrap(), ["new"]);
}

#[test]
fn what_ran_of_a_refused_overlay_is_undone() {
    let Some(Ground { emulator, kernel }) = ground() else {
        return;
    };
    kernel.apply(&create("web", &[8]), None).unwrap();
    let before = kernel.state(None).unwrap();
    let overlay = give(
        "web",
        vec![
            Operation::CpuAdd(vec![CpuMove::from(10)]),
            Operation::DeviceAdd(vec![DeviceMove::from(nic())]),
        ],
    );
    emulator.mk.lock().unwrap().trap = Trap::DevicesBusy;
    let refused = kernel.apply(&overlay, None).unwrap_err();
    assert!(
        matches!(refused, ApplyError::RolledBack { transaction: 3, .. }),
        "{refused}"
    );
    assert!(refused.to_string().contains("dmesg"), "{refused}");
    assert_eq!(
        kernel.state(None).unwrap().system.instances,
        before.system.instances
    );
    assert_eq!(kernel.transactions().unwrap().len(), 1);

    emulator.mk.lock().unwrap().trap = Trap::NoUndo;
    let refused = kernel.apply(&overlay, None).unwrap_err();
    assert!(
        matches!(refused, ApplyError::Stuck { transaction: 4, .. }),
        "{refused}"
    );
    assert!(
        kernel.transactions().unwrap().contains(&4),
        "it is left to be looked at"
    );
}

#[test]
fn the_kernels_word_alone_does_not_count() {
    let Some(Ground { emulator, kernel }) = ground() else {
        return;
    };
    emulator.mk.lock().unwrap().trap = Trap::Lie;
    let refused = kernel.apply(&create("web", &[8]), None).unwrap_err();
    assert!(
        matches!(refused, ApplyError::NotAsPlanned { .. }),
        "{refused}"
    );
    assert!(
        refused.to_string().contains("there is no instance \"web\""),
        "{refused}"
    );
}

#[test]
fn somebody_elses_transaction_is_not_taken_for_ours() {
    let Some(Ground { emulator, kernel }) = ground() else {
        return;
    };
    emulator.mk.lock().unwrap().trap = Trap::Other;
    let applied = kernel.apply(&create("web", &[8]), None).unwrap();
    assert_eq!(applied.transaction, 2);
    assert_eq!(kernel.transactions().unwrap().len(), 2);
}

#[test]
fn what_breaks_rules_is_never_written() {
    let Some(Ground { emulator, kernel }) = ground() else {
        return;
    };
    let refused = kernel.apply(&create("web", &[9]), None).unwrap_err();
    assert!(
        matches!(&refused, ApplyError::Invalid(report) if report.breaks(Rule::CpuNotFree)),
        "{refused}"
    );
    let mut large = create("web", &[8]);
    large.note = Some("x".repeat(5000));
    assert!(matches!(
        kernel.apply(&large, None),
        Err(ApplyError::Unwritable(_))
    ));
    assert!(kernel.transactions().unwrap().is_empty());
    std::fs::write(emulator.beside("run/kerf.lock"), "").unwrap();
    let kernel = kernel.with_patience(Duration::from_millis(300));
    let start = std::time::Instant::now();
    let locked = kernel.apply(&create("web", &[8]), None).unwrap_err();
    assert!(
        matches!(locked, ApplyError::Locked(LockError::Kerf { .. })),
        "{locked}"
    );
    assert!(
        start.elapsed() >= Duration::from_millis(300),
        "it was waited for"
    );
}

/// Returns an overlay that the kernel would truncate: instances with long names, and a device for the last of them.
fn large() -> Overlay {
    let names: Vec<String> = (0..20).map(|n| format!("{n:0200}")).collect();
    let creates = names
        .iter()
        .flat_map(|name| create(name, &[]).fragments)
        .map(|fragment| {
            let Operation::Create(mut create) = fragment.operations[0].clone() else {
                panic!("{fragment:?}");
            };
            create.instance.memory_bytes = MIB;
            (Target::Instances, vec![Operation::Create(create)])
        });
    let device = vec![Operation::DeviceAdd(vec![DeviceMove::from(nic())])];
    let device = (Target::Instance(names[19].clone()), device);
    Overlay::new(creates.chain([device]))
}

#[test]
fn what_the_kernel_would_cut_goes_in_several_transactions() {
    let Some(Ground { emulator, kernel }) = ground() else {
        return;
    };
    let blob = large().to_blob().unwrap();
    assert!(blob.len() > 4096);
    // A single write is truncated, and the only symptom is the missing part.
    std::fs::write(emulator.root().join("overlays/new"), &blob).unwrap_err();
    assert!(kernel.instance_names().unwrap().is_empty());

    let applied = kernel.apply(&large(), None).unwrap();
    assert_eq!(kernel.instance_names().unwrap().len(), 20);
    assert_eq!(applied.earlier, [2]);
    assert_eq!(applied.transaction, 3);
    for transaction in [3, 2] {
        kernel.rollback(transaction).unwrap();
    }
    assert!(kernel.instance_names().unwrap().is_empty());
}

#[test]
fn the_parts_before_one_that_fails_are_undone_or_named() {
    let Some(Ground { emulator, kernel }) = ground() else {
        return;
    };
    emulator.mk.lock().unwrap().trap = Trap::DevicesBusy;
    let refused = kernel.apply(&large(), None).unwrap_err();
    assert!(
        matches!(&refused, ApplyError::PartsUndone { part: 2, parts: 2, error }
            if matches!(**error, ApplyError::RolledBack { transaction: 3, .. })),
        "{refused}"
    );
    assert!(kernel.instance_names().unwrap().is_empty());
    assert!(kernel.transactions().unwrap().is_empty());

    emulator.mk.lock().unwrap().trap = Trap::NoUndo;
    let refused = kernel.apply(&large(), None).unwrap_err();
    assert!(
        matches!(&refused, ApplyError::PartsInPlace { transactions, .. } if *transactions == [4]),
        "{refused}"
    );
    assert_eq!(kernel.transactions().unwrap().len(), 2);
}

#[test]
fn parts_that_cannot_be_undone_are_left_in_place() {
    let Some(Ground { emulator, kernel }) = ground() else {
        return;
    };
    kernel.apply(&create("web", &[8]), None).unwrap();
    let mut overlay = large();
    let remove = Overlay::new([(Target::Instances, vec![Operation::Remove("web".to_owned())])]);
    overlay.fragments.splice(0..0, remove.fragments);
    emulator.mk.lock().unwrap().trap = Trap::DevicesBusy;
    let refused = kernel.apply(&overlay, None).unwrap_err();
    assert!(
        matches!(&refused, ApplyError::PartsInPlace { transactions, .. } if *transactions == [3]),
        "{refused}"
    );
    assert!(refused.to_string().contains("end an instance"), "{refused}");
}

#[test]
fn a_state_is_waited_for() {
    let Some(Ground { emulator, kernel }) = ground() else {
        return;
    };
    kernel.apply(&create("web", &[8]), None).unwrap();
    let late = kernel
        .wait_for("web", Status::Loaded, Duration::from_millis(50))
        .unwrap_err();
    assert!(late.to_string().contains("is ready after"), "{late}");
    let mk = std::sync::Arc::clone(&emulator.mk);
    let loads = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        mk.lock().unwrap().instances[0].state = "loaded";
    });
    kernel
        .wait_for("web", Status::Loaded, Duration::from_secs(60))
        .unwrap();
    loads.join().unwrap();
    let remove = Overlay::new([(Target::Instances, vec![Operation::Remove("web".to_owned())])]);
    let refused = kernel.apply(&remove, None).unwrap_err();
    assert!(
        matches!(&refused, ApplyError::Invalid(report) if report.breaks(Rule::InstanceRunning))
    );
}

/// Runs the real kerf in a mount namespace in which the emulated files replace the kernel's, and the lock of the test
/// replaces kerf's.
fn run_kerf(emulator: &Emulator, arguments: &str) -> Output {
    let program = kerf::home().join("bin/kerf");
    let script = format!(
        "mount -t tmpfs none /sys/fs && mkdir /sys/fs/multikernel && \
         mount --bind {} /sys/fs/multikernel && mount --bind {} /run && \
         mount -t tmpfs none /var/lib && exec {} {arguments}",
        emulator.root().display(),
        emulator.beside("run").display(),
        program.display(),
    );
    Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .output()
        .unwrap()
}

fn kerf_does(emulator: &Emulator, arguments: &str) -> String {
    let output = run_kerf(emulator, arguments);
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "kerf {arguments}: {said}");
    said
}

#[test]
fn kerf_and_libkerf_work_on_one_kernel() {
    let Some(Ground { emulator, kernel }) = ground() else {
        return;
    };
    // kerf creates an instance, libkerf reads and changes it.
    kerf_does(
        &emulator,
        "create db --cpus=8,10 --memory=512MB --devices=0000:09:00.0 --id=7",
    );
    let db = kernel.instance("db").unwrap();
    assert_eq!(
        (db.id, db.cpus, db.memory_bytes),
        (Some(7), vec![8, 10], 512 * MIB)
    );
    assert_eq!(db.devices, [nic().node_name()]);
    kernel
        .apply(
            &give("db", vec![Operation::CpuAdd(vec![CpuMove::from(12)])]),
            None,
        )
        .unwrap();
    // libkerf creates an instance, kerf shows, updates and deletes it.
    kernel.apply(&create("web", &[14, 16]), None).unwrap();
    let shown = kerf_does(&emulator, "show web");
    assert!(
        shown.contains("Instance: web") && shown.contains("ready"),
        "{shown}"
    );
    kerf_does(&emulator, "update web --cpus=14,18");
    assert_eq!(kernel.instance("web").unwrap().cpus, [14, 18]);
    kerf_does(&emulator, "delete web");
    kerf_does(&emulator, "delete db");
    let state = kernel.state(None).unwrap();
    assert!(state.system.instances.is_empty());
    assert_eq!(state.system.free_cpus().len(), 6);
    // libkerf writes a file, and kerf creates the instance in the file.
    let web = libkerf::model::Instance {
        name: "web".to_owned(),
        id: Some(9),
        cpus: vec![8, 10],
        memory_base: Some(0x8_4000_0000),
        memory_bytes: 64 * MIB,
        ..Default::default()
    };
    let file = emulator.beside("run/web.dtb");
    std::fs::write(&file, libkerf::dtb::write(&web.to_tree()).unwrap()).unwrap();
    kerf_does(&emulator, "create web --input=/run/web.dtb");
    let made = kernel.instance("web").unwrap();
    assert_eq!(
        (made.id, made.cpus, made.memory_bytes),
        (web.id, web.cpus, web.memory_bytes)
    );
    kerf_does(&emulator, "delete web");
    // Each waits for the other's lock.
    let lock = Lock::take(&emulator.beside("run/kerf.lock"), Duration::from_secs(5)).unwrap();
    let waited = run_kerf(&emulator, "create web --cpus=8 --memory=64MB");
    let said = String::from_utf8_lossy(&waited.stderr).into_owned();
    assert!(!waited.status.success() && said.contains("lock"), "{said}");
    drop(lock);
    kerf_does(&emulator, "create web --cpus=8 --memory=64MB");
    assert_eq!(kernel.instance_names().unwrap(), ["web"]);
    assert!(!emulator.beside("run/kerf.lock").exists());
    // Both refuse the same request.
    let refused = run_kerf(&emulator, "create bad --cpus=9 --memory=64MB");
    assert!(!refused.status.success());
    assert!(kernel.apply(&create("bad", &[9]), None).is_err());
}

#[test]
fn the_transaction_that_made_an_instance_is_told_from_those_that_made_others_of_its_name() {
    let Some(ground) = ground() else { return };
    let kernel = &ground.kernel;
    let noted = |note: &str| Overlay {
        note: Some(note.to_owned()),
        ..create("web", &[8])
    };
    let remove = || {
        let remove = vec![Operation::Remove("web".to_owned())];
        kernel
            .apply(&Overlay::new([(Target::Instances, remove)]), None)
            .unwrap()
    };
    let made_as = || kernel.creation("web").unwrap().and_then(|made| made.note);
    assert_eq!(kernel.creation("web").unwrap(), None);
    let first = kernel.apply(&noted("ours"), None).unwrap();
    kernel.apply(&create("db", &[10]), None).unwrap();
    let made = kernel.creation("web").unwrap().unwrap();
    assert_eq!(made.transaction, first.transaction);
    assert_eq!(made_as().as_deref(), Some("ours"));
    // Like kerf: a creation that fails, because the instance exists, stays as a transaction.
    let new = ground.emulator.root().join("overlays/new");
    std::fs::write(&new, noted("late").to_blob().unwrap()).unwrap();
    assert_eq!(made_as().as_deref(), Some("ours"));
    // Removed and created again, with the same name and ID.
    let id = kernel.id("web").unwrap();
    remove();
    kernel.apply(&create("web", &[8]), None).unwrap();
    assert_eq!(kernel.id("web").unwrap(), id);
    assert_eq!(made_as(), None);
    // Created by a transaction that failed later and was not undone.
    remove();
    ground.emulator.mk.lock().unwrap().trap = Trap::DevicesBusy;
    let mut half = noted("half");
    let nic = PciAddress::parse("0000:09:00.0").unwrap();
    let give = vec![Operation::DeviceAdd(vec![nic.into()])];
    half.fragments
        .extend(Overlay::new([(Target::Instance("web".to_owned()), give)]).fragments);
    std::fs::write(&new, half.to_blob().unwrap()).unwrap();
    assert!(kernel.id("web").is_ok());
    assert_eq!(made_as().as_deref(), Some("half"));
    remove();
    assert_eq!(made_as(), None);
}
