//! Properties of kernels beside the host's: pitfalls of the kernel's interface, slots, and kerf's part.

use std::path::PathBuf;
use std::time::Duration;

use kmorph_backends::contract::Backend as _;
use kmorph_backends::contract::{Observation, Placement, SpawnError, SpawnSpec};
use kmorph_backends::multikernel::{Layout, Vsock, kcore};
use kmorph_emulated_kernel::Generation;
use kmorph_launch::StartMode;
use kmp_proto::fence::{Confirmation, FenceMethod, FenceOrder};
use libkerf::kernel::Kernel;
use libkerf::model::PciAddress;
use libkerf::overlay::{Create, Operation, Overlay, Status, Target};
use libkerf::record::Records;

use rustix::mount::{UnmountFlags, mount_bind, unmount};

use super::ground::{Ground, holds, kernel_instance};

pub(super) const MIB: u64 = 1 << 20;

pub(super) fn ground() -> Option<Ground> {
    Ground::multikernel(Generation::Confirms)
}

pub(super) fn kernel(ground: &Ground) -> Kernel {
    let emulated = ground.emulated.as_ref().unwrap();
    Kernel::at(emulated.root(), emulated.beside("run/kerf.lock"))
}

fn kernel_root(ground: &Ground) -> PathBuf {
    ground.emulated.as_ref().unwrap().root()
}

pub(super) fn records(ground: &Ground) -> Records {
    Records::in_directory(ground.emulated.as_ref().unwrap().beside("records"))
}

fn strike(ground: &Ground, what: &str, placement: &Placement) -> String {
    let emulated = ground.emulated.as_ref().unwrap();
    emulated.strike(what, kernel_instance(placement))
}

fn nic() -> PciAddress {
    PciAddress::parse("0000:09:00.0").unwrap()
}

/// Creates a kernel instance like kerf, without a loaded kernel.
pub(super) fn configure(ground: &Ground, name: &str, cpus: &[u64], devices: bool) {
    let instance = libkerf::model::Instance {
        name: name.to_owned(),
        cpus: cpus.to_vec(),
        memory_bytes: 512 * MIB,
        ..Default::default()
    };
    let create = Operation::Create(Box::new(Create {
        instance,
        ..Create::default()
    }));
    let mut fragments = vec![(Target::Instances, vec![create])];
    if devices {
        let give = vec![Operation::DeviceAdd(vec![nic().into()])];
        fragments.push((Target::Instance(name.to_owned()), give));
    }
    kernel(ground)
        .apply(&Overlay::new(fragments), None)
        .unwrap();
}

/// Returns a spec for the target of a morph.
fn successor(ground: &Ground) -> SpawnSpec {
    SpawnSpec {
        start: StartMode::AwaitState { session: 1 },
        ..ground.spec()
    }
}

pub(super) async fn end(ground: &Ground, placement: &Placement) {
    let proof = ground.fence(placement).await;
    ground.backend.release(placement, &proof).await.unwrap();
}

#[tokio::test]
async fn a_kernel_gets_cpus_and_memory_beside_the_others_and_gives_them_back() {
    let Some(ground) = ground() else { return };
    let spec = SpawnSpec {
        cpus: vec![0, 1],
        ..ground.spec()
    };
    let placement = ground.spawn(spec).await;
    ground.answers(&placement).await;
    let web = kernel(&ground).instance("web").unwrap();
    assert_eq!(
        (web.cpus.len(), web.memory_bytes),
        (2, placement.memory_bytes)
    );
    assert_eq!(placement.cpus.len(), 2);
    // kerf's record shows the running kernel and its owner.
    let record = records(&ground).load("web").unwrap().unwrap();
    assert!(
        record
            .kernel
            .unwrap()
            .version
            .unwrap()
            .starts_with("6.1.0-test")
    );
    assert_eq!(record.other["kmorph"]["generation"], placement.generation);
    assert_eq!(strike(&ground, "release", &placement), "6.1.0-test");
    let cmdline = strike(&ground, "cmdline", &placement);
    assert!(cmdline.contains("panic=-1"), "{cmdline}");
    end(&ground, &placement).await;
    let state = kernel(&ground).state(None).unwrap();
    assert!(state.system.instances.is_empty());
    assert_eq!(state.system.free_cpus().len(), 6);
    assert!(records(&ground).load("web").unwrap().is_none());
}

#[tokio::test]
async fn memory_that_no_piece_of_the_pool_holds_comes_in_several() {
    let Some(ground) = ground() else { return };
    let chunks = kernel(&ground).state(None).unwrap().system.resources.chunks;
    let largest = chunks.iter().map(|chunk| chunk.size).max().unwrap();
    let spec = SpawnSpec {
        memory_bytes: largest + 512 * MIB,
        ..ground.spec()
    };
    let wanted = spec.memory_bytes;
    let placement = ground.spawn(spec).await;
    ground.answers(&placement).await;
    assert_eq!(placement.memory_bytes, wanted);
    let web = kernel(&ground).instance("web").unwrap();
    assert_eq!(web.memory_bytes, wanted);
    end(&ground, &placement).await;
    let left = kernel(&ground).state(None).unwrap();
    assert_eq!(left.free_bytes(None), left.system.resources.memory_bytes());
}

#[tokio::test]
async fn what_the_kernels_bookkeeping_needs_is_left_before_anything_is_written() {
    let Some(ground) = ground() else { return };
    let kernel = kernel(&ground);
    // Enough instances that the kernel's own memory for them, which no file shows, exceeds the rest for one instance.
    let others = 10;
    let create = |n: u32| {
        let instance = libkerf::model::Instance {
            name: format!("other{n}"),
            memory_bytes: 4 * MIB,
            ..Default::default()
        };
        Operation::Create(Box::new(Create {
            instance,
            ..Create::default()
        }))
    };
    for n in 0..others {
        let overlay = Overlay::new([(Target::Instances, vec![create(n)])]);
        kernel.apply(&overlay, None).unwrap();
    }
    let state = kernel.state(None).unwrap();
    let free = u64::try_from(state.free_bytes(None)).unwrap();
    let written = kernel.transactions().unwrap().len();
    let asks_for = |memory_bytes: u64| SpawnSpec {
        memory_bytes,
        ..ground.spec()
    };
    let error = ground.backend.spawn(asks_for(free - 2 * MIB)).await;
    let error = error.unwrap_err();
    assert!(matches!(error, SpawnError::Unavailable(_)), "{error}");
    assert!(error.to_string().contains("bookkeeping"), "{error}");
    assert_eq!(kernel.transactions().unwrap().len(), written);
    let most = free - u64::from(others + 1) * 2 * MIB;
    ground.spawn(asks_for(most)).await;
}

#[tokio::test]
async fn both_generations_of_a_morph_run_and_the_later_one_is_not_taken_for_the_earlier() {
    let Some(ground) = ground() else { return };
    let old = ground.spawn(ground.spec()).await;
    let new = ground.spawn(successor(&ground)).await;
    assert_eq!(kernel_instance(&old), "web");
    assert_eq!(kernel_instance(&new), "web+b");
    ground.answers(&old).await;
    ground.answers(&new).await;
    end(&ground, &old).await;
    // The next spawn gets the freed kernel instance, with the same ID: the old placement owns nothing.
    let next = ground.spawn(successor(&ground)).await;
    assert_eq!(next.kernel_instance, old.kernel_instance);
    let seen = ground.backend.observe(&old).await.unwrap();
    assert!(matches!(seen, Observation::Ended(_)), "{seen:?}");
    let again = ground.fence(&old).await;
    assert_eq!(again.method(), FenceMethod::AlreadyEnded);
    ground.backend.release(&old, &again).await.unwrap();
    ground.backend.request_shutdown(&old).await.unwrap();
    assert!(ground.lives(&next), "a stranger was stopped");
    assert!(ground.lives(&new));
    // A third kernel instance does not exist.
    let error = ground.backend.spawn(ground.spec()).await.unwrap_err();
    assert!(
        error.to_string().contains("both kernel instances"),
        "{error}"
    );
}

#[tokio::test]
async fn what_kerf_made_is_run_as_it_is_and_stays() {
    let Some(ground) = ground() else { return };
    configure(&ground, "web", &[10, 12, 14], true);
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    assert_eq!(placement.cpus, [10, 12, 14]);
    assert_eq!(placement.memory_bytes, 512 * MIB);

    // A morph's target has the same size, and takes over the devices after the morph.
    let new = ground.spawn(successor(&ground)).await;
    assert_eq!((new.cpus.len(), new.memory_bytes), (3, 512 * MIB));
    end(&ground, &placement).await;
    let kernel = kernel(&ground);
    assert_eq!(kernel.status("web").unwrap(), Status::Ready);
    assert!(kernel.instance("web").unwrap().devices.is_empty());
    assert_eq!(
        kernel.instance("web+b").unwrap().devices,
        [nic().node_name()]
    );
    assert!(records(&ground).load("web").unwrap().is_none());
    // And back: the overlay that hands over the devices also removes the kernel instance that the backend created.
    let back = ground.spawn(successor(&ground)).await;
    let before = kernel.transactions().unwrap().len();
    end(&ground, &new).await;
    assert_eq!(kernel.transactions().unwrap().len(), before + 1);
    assert_eq!(kernel.instance_names().unwrap(), ["web"]);
    assert_eq!(kernel.instance("web").unwrap().devices, [nic().node_name()]);
    assert!(ground.lives(&back));
}

#[tokio::test]
async fn a_kernel_that_does_not_say_whether_cpus_stopped_confirms_no_fence() {
    let Some(ground) = Ground::multikernel(Generation::Silent) else {
        return;
    };
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    let order = FenceOrder::new(placement.generation);
    let refused = ground.backend.fence(&placement, order).await.unwrap_err();
    assert!(
        refused.reason.contains("does not say"),
        "{}",
        refused.reason
    );
    // A repeated fence, now that the status is `loaded`.
    let refused = ground
        .backend
        .fence(&placement, refused.order)
        .await
        .unwrap_err();
    assert!(refused.reason.contains("kerf kill"), "{}", refused.reason);
    assert_eq!(kernel(&ground).status("web").unwrap(), Status::Loaded);
    // The unfenced generation can be found again, and its kernel instance is not given to another one.
    let (other_daemon, run_dir) = (ground.another_daemon(), &placement.run_dir);
    let found = other_daemon.find(&placement.name, placement.generation, run_dir);
    assert_eq!(found.await.unwrap(), Some(placement.clone()));
    let other = ground.spawn(ground.spec()).await;
    assert_eq!(kernel_instance(&other), "web+b");

    // An operator removes the kernel instance.
    let emulated = ground.emulated.as_ref().unwrap();
    emulated.ask("unload 1").unwrap();
    let remove = vec![Operation::Remove("web".to_owned())];
    let remove = Overlay::new([(Target::Instances, remove)]);
    kernel(&ground).apply(&remove, None).unwrap();
    let proof = ground
        .backend
        .fence(&placement, refused.order)
        .await
        .unwrap();
    assert_eq!(proof.certificate.confirmation(), Confirmation::NothingFound);
}

#[tokio::test]
async fn a_halt_that_does_not_reach_the_cpus_is_no_fence_and_is_tried_again() {
    let Some(ground) = ground() else { return };
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    strike(&ground, "deaf", &placement);
    let order = FenceOrder::new(placement.generation);
    let refused = ground.backend.fence(&placement, order).await.unwrap_err();
    assert!(ground.lives(&placement));
    let proof = ground
        .backend
        .fence(&placement, refused.order)
        .await
        .unwrap();
    assert_eq!(proof.certificate.confirmation(), Confirmation::CpusParked);
    assert!(!ground.lives(&placement));
}

#[tokio::test]
async fn files_that_are_not_mounted_do_not_say_that_nothing_runs() {
    let Some(ground) = ground() else { return };
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    let (root, empty) = (kernel_root(&ground), ground.run_dir().join("empty"));
    std::fs::create_dir(&empty).unwrap();
    mount_bind(&empty, &root).unwrap();
    let seen = ground.backend.observe(&placement).await;
    let order = FenceOrder::new(placement.generation);
    let fenced = ground.backend.fence(&placement, order).await;
    unmount(&root, UnmountFlags::DETACH).unwrap();
    let error = seen.unwrap_err().to_string();
    assert!(error.contains("instances"), "{error}");
    let refused = fenced.unwrap_err();
    assert!(ground.lives(&placement));
    let proof = ground.backend.fence(&placement, refused.order).await;
    let proof = proof.unwrap();
    assert_eq!(proof.certificate.confirmation(), Confirmation::CpusParked);
}

#[tokio::test]
async fn a_status_that_lags_is_waited_for() {
    let Some(ground) = ground() else { return };
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    // An hour, until the lag is removed, so that the status lags however busy the machine is.
    let emulated = ground.emulated.as_ref().unwrap();
    emulated.lag("web", Duration::from_secs(3600));
    let cause = ground.kill(&placement);
    let seen = ground.backend.observe(&placement).await.unwrap();
    assert_eq!(seen, Observation::Running, "the file says so still");
    let watch = ground.in_time(ground.backend.ended(&placement), "the panic");
    let change = async { emulated.lag("web", Duration::ZERO) };
    let (ended, ()) = tokio::join!(watch, change);
    assert_eq!(ended, cause);
    end(&ground, &placement).await;
    assert!(kernel(&ground).instance_names().unwrap().is_empty());
}

#[tokio::test]
async fn a_panic_that_stands_still_looks_as_if_it_ran_and_can_be_fenced() {
    let Some(ground) = ground() else { return };
    let spec = SpawnSpec {
        cmdline: "panic=0".to_owned(),
        ..ground.spec()
    };
    let placement = ground.spawn(spec).await;
    ground.answers(&placement).await;
    ground.kill(&placement);
    let seen = ground.backend.observe(&placement).await.unwrap();
    assert_eq!(seen, Observation::Running);
    let proof = ground.fence(&placement).await;
    assert_eq!(proof.method(), FenceMethod::HaltedByForce);
}

#[tokio::test]
async fn memory_that_cannot_be_read_is_said_to_be_so_and_gone_after_the_release() {
    let Some(ground) = ground() else { return };
    let placement = ground.spawn(ground.spec()).await;
    // The machine that runs this test has no such regions.
    let error = ground.backend.memory_map(&placement).await.unwrap_err();
    assert!(error.source.to_string().contains("/proc/iomem"), "{error}");
    assert!(error.what.contains("web"), "{error}");
    // A host with such regions.
    let (iomem, file) = (
        ground.run_dir().join("iomem"),
        ground.run_dir().join("kcore"),
    );
    let shown =
        "100000-1fffff : Multikernel Memory Pool\n  100000-17ffff : mk-instance-1-web-region-0\n";
    std::fs::write(&iomem, shown).unwrap();
    let mut bytes = kcore::synthetic(0x10_0000, 0x10_0000);
    bytes.resize(
        usize::try_from(kcore::SYNTHETIC_OFFSET).unwrap() + 0x10_0000,
        0,
    );
    let start = usize::try_from(kcore::SYNTHETIC_OFFSET).unwrap();
    bytes[start..start + 4].copy_from_slice(b"here");
    std::fs::write(&file, bytes).unwrap();
    let shows = ground.backend_with(|config| {
        config.memory.iomem = iomem.clone();
        config.memory.kcore = file.clone();
    });
    let ranges = shows.memory_map(&placement).await.unwrap();
    assert_eq!(
        (ranges[0].guest_address, ranges[0].length),
        (0x10_0000, 0x8_0000)
    );
    assert!(holds(&ranges, b"here"));
    end(&ground, &placement).await;
    assert!(shows.memory_map(&placement).await.unwrap().is_empty());
    let ranges = ground.backend.memory_map(&placement).await.unwrap();
    assert!(ranges.is_empty(), "{ranges:?}");
}

#[tokio::test]
async fn a_spawn_without_vsock_between_kernels_says_so_at_once_and_what_works() {
    let Some(ground) = ground() else { return };
    let none = ground.backend_with(|config| {
        config.vsock = Vsock::Kernel {
            cid_offset: 0,
            // A socket option that no kernel has.
            option: Some(9999),
        };
    });
    let error = none.spawn(ground.spec()).await.unwrap_err();
    assert!(matches!(error, SpawnError::Unavailable(_)), "{error}");
    let said = error.to_string();
    assert!(said.contains("What works: kerf create"), "{said}");
    assert!(kernel(&ground).instance_names().unwrap().is_empty());
    assert!(!ground.spec().run_dir.exists());
}

#[tokio::test]
async fn a_kernel_that_does_not_say_how_it_shares_memory_is_refused_before_anything_is_made() {
    let Some(ground) = ground() else { return };
    let compared = ground.backend_with(|config| config.layout = Layout::compared());
    let spec = ground.spec();
    let (run_dir, name) = (spec.run_dir.clone(), spec.name.to_string());
    let error = compared.spawn(spec).await.unwrap_err();
    assert!(matches!(error, SpawnError::Refused(_)), "{error}");
    let said = error.to_string();
    assert!(said.contains("does not describe the layout"), "{said}");
    assert!(said.contains("multikernel.layout"), "{said}");
    assert!(kernel(&ground).instance_names().unwrap().is_empty());
    assert!(records(&ground).load(&name).unwrap().is_none());
    assert!(!run_dir.exists());
}

/// Creates a kernel instance like `kerf create NAME --virtio=net`.
fn configure_with_network(ground: &Ground, name: &str, cpus: &[u64]) {
    let instance = libkerf::model::Instance {
        name: name.to_owned(),
        cpus: cpus.to_vec(),
        memory_bytes: 512 * MIB,
        virtio: vec![libkerf::model::Virtio {
            name: "net@0".to_owned(),
            device_id: 1,
            queues: 2,
            queue_size: None,
        }],
        ..Default::default()
    };
    let create = Operation::Create(Box::new(Create {
        instance,
        ..Create::default()
    }));
    let overlay = Overlay::new([(Target::Instances, vec![create])]);
    kernel(ground).apply(&overlay, None).unwrap();
}

#[tokio::test]
async fn a_morph_never_takes_a_guests_netdev_or_its_route() {
    let Some(ground) = ground() else { return };
    configure_with_network(&ground, "web", &[8]);
    let source = ground.spawn(ground.spec()).await;
    ground.answers(&source).await;
    let next = || SpawnSpec {
        start: StartMode::AwaitState { session: 1 },
        ..ground.spec()
    };
    let error = ground.backend.spawn(next()).await.unwrap_err();
    assert!(matches!(error, SpawnError::Refused(_)), "{error}");
    assert!(
        error.to_string().contains("kerf create web+b --virtio"),
        "{error}"
    );
    assert_eq!(kernel(&ground).instance_names().unwrap(), ["web"]);

    // kerf has routed the netdev of `web`, but not that of `web+b`.
    configure_with_network(&ground, "web+b", &[10]);
    let pins = ground.emulated.as_ref().unwrap().beside("xdp/vnet");
    std::fs::create_dir_all(pins.join("mk-web-0/enp9s0")).unwrap();
    let error = ground.backend.spawn(next()).await.unwrap_err();
    assert!(error.to_string().contains("mk-web+b-0, is not"), "{error}");
    assert_eq!(kernel(&ground).status("web+b").unwrap(), Status::Ready);
    assert!(records(&ground).load("web+b").unwrap().is_none());

    std::fs::create_dir_all(pins.join("mk-web+b-0/enp9s0")).unwrap();
    let target = ground.spawn(next()).await;
    assert_eq!(kernel_instance(&target), "web+b");
    for placement in [&source, &target] {
        end(&ground, placement).await;
    }
}

#[tokio::test]
async fn a_spawn_that_fails_half_way_leaves_nothing() {
    let Some(ground) = ground() else { return };
    let kernel = kernel(&ground);
    let nothing = || {
        assert!(kernel.instance_names().unwrap().is_empty());
        assert!(records(&ground).load("web").unwrap().is_none());
    };
    // More CPUs than the pool has.
    let spec = SpawnSpec {
        cpus: (0..7).collect(),
        ..ground.spec()
    };
    let error = ground.backend.spawn(spec).await.unwrap_err();
    assert!(error.to_string().contains("7 CPUs are wanted"), "{error}");
    assert!(matches!(error, SpawnError::Unavailable(_)));
    nothing();
    // An initramfs without an agent: the kernel panics before the backend sees it run.
    let initramfs = ground.run_dir().join("own.img");
    std::fs::write(&initramfs, b"no archive").unwrap();
    let spec = SpawnSpec {
        initramfs: Some(initramfs),
        ..ground.spec()
    };
    let error = ground.backend.spawn(spec).await.unwrap_err();
    let said = error.to_string();
    assert!(said.contains("ended while it booted"), "{said}");
    assert!(said.contains("kerf start --console"), "{said}");
    nothing();
    // An image that is not a kernel any more.
    let spec = ground.spec();
    let run_dir = spec.run_dir.clone();
    std::fs::write(spec.kernel.path(), b"no kernel").unwrap();
    let error = ground.backend.spawn(spec).await.unwrap_err();
    assert!(error.to_string().contains("loading a kernel"), "{error}");
    assert!(!run_dir.join("initramfs.img").exists());
    nothing();
}

#[tokio::test]
async fn what_another_loaded_there_is_not_ours_to_stop() {
    let Some(ground) = ground() else { return };
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    // The record as written by `kerf load`.
    let records = records(&ground);
    let mut record = records.load("web").unwrap().unwrap();
    record.other.clear();
    records.save("web", &record).unwrap();
    let order = FenceOrder::new(placement.generation);
    let refused = ground.backend.fence(&placement, order).await.unwrap_err();
    assert!(
        refused.reason.contains("somebody else"),
        "{}",
        refused.reason
    );
    assert!(ground.lives(&placement));
}

#[tokio::test]
async fn what_somebody_else_has_loaded_is_left_alone() {
    let Some(ground) = ground() else { return };
    configure(&ground, "web", &[10], false);
    let image = ground.spec().kernel.path().with_file_name("vmlinux");
    std::fs::write(&image, b"\x7fELF").unwrap();
    let emulated = ground.emulated.as_ref().unwrap();
    emulated
        .ask(&format!("load 1 {} - x", image.display()))
        .unwrap();
    let error = ground.backend.spawn(ground.spec()).await.unwrap_err();
    assert!(error.to_string().contains("kerf unload"), "{error}");
    assert_eq!(kernel(&ground).status("web").unwrap(), Status::Loaded);
}

#[tokio::test]
async fn preflight_says_what_was_found_and_what_is_missing() {
    let Some(ground) = ground() else { return };
    let found = ground.backend.probe().await.unwrap();
    assert!(found.contains("a pool of 6 CPUs and "), "{found}");
    let none = Ground::without_pool(Generation::Confirms)
        .backend
        .probe()
        .await
        .unwrap_err();
    assert!(none.to_string().contains("kerf init"), "{none}");
}
