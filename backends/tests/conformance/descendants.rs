//! All descendants of an embedded instance's processes end with the instance, however they detach: in a cgroup, and
//! without one.

use std::path::PathBuf;
use std::time::Duration;

use kmorph_backends::cgroup::Cgroups;
use kmorph_backends::contract::{ExitCause, Placement, Proof};
use kmorph_launch::WorkloadSpec;
use kmp_proto::fence::FenceOrder;
use rustix::process::{Pid, Signal, kill_process};

use super::ground::Ground;

/// Interval between two checks.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// A process whose PID is in this file.
struct Descendant(PathBuf);

impl Descendant {
    /// Returns true if the process runs, and false for an unreaped zombie.
    fn runs(&self) -> bool {
        let pid = std::fs::read_to_string(&self.0).unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }
}

/// Spawns an instance with a descendant that has a session of its own, an empty environment, and no parent in the
/// instance. The descendant writes its PID into a file, whose path is in its command line, so that the ground can kill
/// it as a last resort. Its output goes to /dev/null: `tail` exits when the reader of its output does.
async fn with_a_descendant(ground: &Ground) -> (Placement, Descendant) {
    let mut spec = ground.spec();
    let marker = ground.run_dir().join(format!("{}.pid", spec.generation));
    let script = format!(
        "(setsid env -i /bin/sh -c 'echo $$ >{0}.part && mv {0}.part {0}; exec tail -f {0} >/dev/null' &) ; \
         exec sleep 600",
        marker.display()
    );
    spec.workload = Some(WorkloadSpec {
        program: "/bin/sh".into(),
        args: vec!["-c".to_owned(), script],
        ..ground.kv()
    });
    let placement = ground.spawn(spec).await;
    let written = async {
        while !marker.exists() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    ground.in_time(written, "the descendant").await;
    (placement, Descendant(marker))
}

async fn kill_the_agent(ground: &Ground, placement: &Placement) {
    let agent = Pid::from_raw(placement.processes[0].pid).unwrap();
    kill_process(agent, Signal::KILL).unwrap();
    let seen = ground
        .in_time(ground.backend.ended(placement), "the end")
        .await;
    assert_eq!(seen, ExitCause::Signal { signal: 9 });
}

/// Returns the expected proof. On a machine without usable cgroups, it is the proof of an uncontained instance.
fn expected(ground: &Ground, contained: bool) -> Proof {
    match Cgroups::find(&ground.run_dir().join("asked")) {
        Ok(_) if contained => Proof::CgroupEmpty,
        _ => Proof::ScansEmpty,
    }
}

async fn ends_with_a_living_agent(ground: &Ground, contained: bool) {
    let (placement, descendant) = with_a_descendant(ground).await;
    assert!(descendant.runs());
    let order = FenceOrder::new(placement.generation);
    let fenced = ground.backend.fence(&placement, order).await.unwrap();
    assert!(!descendant.runs(), "it runs behind a certificate");
    assert_eq!(fenced.proof, expected(ground, contained));
    let cgroup = placement.containment.cgroup.clone();
    assert_eq!(cgroup.is_some(), fenced.proof == Proof::CgroupEmpty);
    let proof = &fenced.certificate;
    ground.backend.release(&placement, proof).await.unwrap();
    assert!(cgroup.is_none_or(|cgroup| !cgroup.path.exists()));
    let order = FenceOrder::new(placement.generation);
    let again = ground.backend.fence(&placement, order).await.unwrap();
    assert_eq!(again.proof, fenced.proof);
}

async fn ends_when_the_agent_has_died(ground: &Ground) {
    let (placement, descendant) = with_a_descendant(ground).await;
    kill_the_agent(ground, &placement).await;
    assert!(descendant.runs());
    ground.fence(&placement).await;
    assert!(!descendant.runs(), "it runs behind a certificate");
}

/// Rule 3: a backend also finds a process that outlives its agent in a spawn that was never recorded.
async fn is_found_when_nothing_was_recorded(ground: &Ground) {
    let (placement, descendant) = with_a_descendant(ground).await;
    kill_the_agent(ground, &placement).await;
    let other = ground.another_daemon();
    let (name, generation) = (&placement.name, placement.generation);
    let find = async || {
        other
            .find(name, generation, &placement.run_dir)
            .await
            .unwrap()
    };
    let found = find().await.unwrap();
    assert_eq!(found, placement);
    let order = FenceOrder::new(generation);
    let fenced = other.fence(&found, order).await.unwrap();
    assert!(!descendant.runs(), "it runs behind a certificate");
    assert_eq!(find().await, None);
    other.release(&found, &fenced.certificate).await.unwrap();
}

/// The fence does not touch another generation's cgroup at the same path: the inode differs.
#[tokio::test]
async fn a_cgroup_that_took_the_place_of_another_is_left_alone() {
    let ground = Ground::embedded();
    let (placement, descendant) = with_a_descendant(&ground).await;
    let mut earlier = placement.clone();
    let Some(cgroup) = &mut earlier.containment.cgroup else {
        return eprintln!("SKIPPED: no cgroup can be had");
    };
    cgroup.id += 1;
    earlier.processes[0].start_ticks -= 1;
    earlier.containment.tag = None;
    earlier.run_dir = ground.run_dir().join("earlier");
    let order = FenceOrder::new(earlier.generation);
    let fenced = ground.backend.fence(&earlier, order).await.unwrap();
    let proof = &fenced.certificate;
    ground.backend.release(&earlier, proof).await.unwrap();
    assert!(descendant.runs(), "another generation was ended");
    assert_eq!(fenced.proof, Proof::CgroupEmpty);
    ground.fence(&placement).await;
    assert!(!descendant.runs());
}

macro_rules! on {
    ($($place:ident = $ground:expr, $contained:expr;)*) => {
        $(mod $place {
            use super::Ground;

            #[tokio::test]
            async fn a_descendant_ends_with_a_living_agent() {
                super::ends_with_a_living_agent(&$ground, $contained).await;
            }

            #[tokio::test]
            async fn a_descendant_ends_when_the_agent_has_died() {
                super::ends_when_the_agent_has_died(&$ground).await;
            }

            #[tokio::test]
            async fn a_descendant_is_found_when_nothing_was_recorded() {
                super::is_found_when_nothing_was_recorded(&$ground).await;
            }
        })*
    };
}

on! {
    contained = Ground::embedded(), true;
    uncontained = Ground::embedded_uncontained(), false;
}
