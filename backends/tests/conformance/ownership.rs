//! Ownership of a kernel instance: its record alone does not prove it.

use std::path::PathBuf;

use kmorph_backends::contract::{Observation, Placement};
use kmp_proto::fence::{Confirmation, FenceMethod};
use libkerf::overlay::{Create, Operation, Overlay, Status, Target};
use serde_json::json;

use super::beside::{MIB, configure, end, ground, kernel, records};
use super::ground::{Ground, kernel_instance};

const NOTE: &str = "kmorph web generation 7 0123456789abcdef";

fn boot_id() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    text.trim().to_owned()
}

/// Saves the record of a generation for which a daemon was about to create a kernel instance; returns its run
/// directory.
fn about_to_be_made(ground: &Ground, generation: u64) -> PathBuf {
    let run_dir = ground.run_dir().join(generation.to_string());
    let record = json!({ "kmorph": {
        "instance": "web", "generation": generation, "run_dir": run_dir,
        "host_boot_id": boot_id(), "origin": { "ours": NOTE },
    }});
    let record = serde_json::from_value(record).unwrap();
    records(ground).save("web", &record).unwrap();
    run_dir
}

/// Leaves the state of a daemon that was killed before it loaded a kernel; returns the run directory.
fn half_begun(ground: &Ground, generation: u64) -> PathBuf {
    let run_dir = about_to_be_made(ground, generation);
    let instance = libkerf::model::Instance {
        name: "web".to_owned(),
        cpus: vec![10],
        memory_bytes: 512 * MIB,
        ..Default::default()
    };
    let create = Operation::Create(Box::new(Create {
        instance,
        host_tree: None,
        ..Create::default()
    }));
    let mut overlay = Overlay::new([(Target::Instances, vec![create])]);
    overlay.note = Some(NOTE.to_owned());
    kernel(ground).apply(&overlay, None).unwrap();
    run_dir
}

#[tokio::test]
async fn what_kerf_made_is_not_taken_for_ours_by_a_record_that_outlived_its_kernel_instance() {
    let Some(ground) = ground() else { return };
    let kernel = kernel(&ground);
    // Each with the name and with the ID that our kernel instance would have had.
    let of_an_earlier_version = || {
        let record = include_str!("../data/record-of-a-kernel-instance-not-made.json");
        let record = record.replace("BOOT", &boot_id());
        let place = ground.emulated.as_ref().unwrap().beside("records");
        std::fs::create_dir_all(&place).unwrap();
        std::fs::write(place.join("web.json"), record).unwrap();
    };
    let outlived = || drop(about_to_be_made(&ground, 7));
    let gone = || {
        half_begun(&ground, 7);
        let remove = vec![Operation::Remove("web".to_owned())];
        let remove = Overlay::new([(Target::Instances, remove)]);
        kernel.apply(&remove, None).unwrap();
    };
    let stale: [(&str, &dyn Fn()); 3] = [
        ("an earlier version's", &of_an_earlier_version),
        ("killed while it waited for the lock", &outlived),
        ("taken away without its record", &gone),
    ];
    for (case, leave) in stale {
        leave();
        configure(&ground, "web", &[12, 14], true);
        let made = kernel.creation("web").unwrap();
        let placement = ground.spawn(ground.spec()).await;
        ground.answers(&placement).await;
        assert_eq!(placement.cpus, [12, 14], "{case}: kerf's was replaced");
        assert_eq!(kernel.creation("web").unwrap(), made, "{case}");
        end(&ground, &placement).await;
        assert_eq!(kernel.status("web").unwrap(), Status::Ready, "{case}");
        assert_eq!(kernel.creation("web").unwrap(), made, "{case}");
        assert!(records(&ground).load("web").unwrap().is_none(), "{case}");
        let remove = vec![Operation::Remove("web".to_owned())];
        let remove = Overlay::new([(Target::Instances, remove)]);
        kernel.apply(&remove, None).unwrap();
    }
}

#[tokio::test]
async fn a_generation_whose_kernel_instance_kerf_has_made_anew_is_gone_and_nothing_is_stopped() {
    let Some(ground) = ground() else { return };
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    let record = records(&ground).load("web").unwrap().unwrap();
    end(&ground, &placement).await;
    // A program that keeps no records also loads a kernel there.
    configure(&ground, "web", &[12], false);
    records(&ground).save("web", &record).unwrap();
    let image = ground.spec().kernel.path().with_file_name("vmlinux");
    std::fs::write(&image, b"\x7fELF").unwrap();
    let emulated = ground.emulated.as_ref().unwrap();
    emulated
        .ask(&format!("load 1 {} - x", image.display()))
        .unwrap();
    let run_dir = &placement.run_dir;
    let found = ground
        .backend
        .find(&placement.name, placement.generation, run_dir);
    assert_eq!(found.await.unwrap(), None);
    let proof = ground.fence(&placement).await;
    assert_eq!(proof.confirmation(), Confirmation::NothingFound);
    ground.backend.release(&placement, &proof).await.unwrap();
    assert_eq!(kernel(&ground).status("web").unwrap(), Status::Loaded);
}

#[tokio::test]
async fn records_that_outlived_their_kernel_instances_are_removed_and_no_others() {
    let Some(ground) = ground() else { return };
    let placement = ground.spawn(ground.spec()).await;
    let records = records(&ground);
    let record = |run_dir: PathBuf, boot_id: &str| {
        let record = json!({ "kmorph": {
            "instance": "web", "generation": 1, "run_dir": run_dir,
            "host_boot_id": boot_id, "origin": { "ours": NOTE },
        }});
        serde_json::from_value(record).unwrap()
    };
    let (own, boot) = (ground.run_dir().join("1"), boot_id());
    let another = PathBuf::from("/run/another/instances/x/1");
    for (name, record) in [
        ("gone", record(own.clone(), &boot)),
        ("earlier-boot", record(another.clone(), "earlier")),
        // That daemon may be about to create the kernel instance.
        ("another-daemons", record(another, &boot)),
        ("kerfs", Default::default()),
    ] {
        records.save(name, &record).unwrap();
    }
    let place = ground.emulated.as_ref().unwrap().beside("records");
    std::fs::write(place.join("broken.json"), "{").unwrap();
    let said = ground.backend.tidy(ground.run_dir()).await.unwrap();
    assert_eq!(said.len(), 3, "{said:?}");
    assert!(said[0].contains("broken.json"), "{said:?}");
    assert_eq!(
        records.names().unwrap(),
        ["another-daemons", "broken", "kerfs", "web"]
    );
    end(&ground, &placement).await;
}

#[tokio::test]
async fn what_was_begun_and_not_loaded_is_found_and_taken_away() {
    let Some(ground) = ground() else { return };
    let run_dir = half_begun(&ground, 7);
    assert_eq!(
        ground.backend.tidy(ground.run_dir()).await.unwrap(),
        [""; 0]
    );
    let name = "web".parse().unwrap();
    let found = ground.another_daemon().find(&name, 7, &run_dir).await;
    let placement = found.unwrap().unwrap();
    let seen = ground.backend.observe(&placement).await.unwrap();
    assert!(matches!(seen, Observation::Ended(_)), "{seen:?}");
    let proof = ground.fence(&placement).await;
    assert_eq!(proof.method(), FenceMethod::NeverStarted);
    ground.backend.release(&placement, &proof).await.unwrap();
    assert!(kernel(&ground).instance_names().unwrap().is_empty());
    assert!(records(&ground).load("web").unwrap().is_none());
    // The next spawn cleans up as well, without an earlier search.
    half_begun(&ground, 8);
    let next = ground.spawn(ground.spec()).await;
    assert_eq!(kernel_instance(&next), "web");
    assert_eq!(next.memory_bytes, 192 * MIB, "it was made anew");
}

#[tokio::test]
async fn a_mark_of_an_earlier_boot_or_of_another_daemon_is_not_ours() {
    let Some(ground) = ground() else { return };
    let placement = ground.spawn(ground.spec()).await;
    let another = Placement {
        run_dir: ground.run_dir().join("another"),
        ..placement.clone()
    };
    let found = ground
        .backend
        .find(&another.name, another.generation, &another.run_dir)
        .await;
    assert_eq!(found.unwrap(), None);
    let proof = ground.fence(&another).await;
    assert_eq!(proof.method(), FenceMethod::AlreadyEnded);
    assert!(ground.lives(&placement), "another daemon's was stopped");
    end(&ground, &placement).await;

    // The host was rebooted, kerf has created the instance again, and its record is unchanged.
    configure(&ground, "web", &[10], false);
    let stale = json!({
        "kernel": null, "loaded_at": "2026-01-02T03:04:05+00:00",
        "kmorph": {
            "instance": "web", "generation": placement.generation, "run_dir": placement.run_dir,
            "host_boot_id": "earlier", "made": true,
        },
    });
    let records = records(&ground);
    records
        .save("web", &serde_json::from_value(stale).unwrap())
        .unwrap();
    let next = ground.spawn(ground.spec()).await;
    assert_eq!(
        (kernel_instance(&next), next.cpus.as_slice()),
        ("web", &[10][..])
    );
    end(&ground, &next).await;
    assert_eq!(kernel(&ground).instance_names().unwrap(), ["web"]);
}
