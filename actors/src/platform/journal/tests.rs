use crate::model::{Event, EventKind};

use super::*;
use crate::model::rows::{InstanceRow, InstanceSpec, KernelChoice, WorkloadRestarts};

fn event(id: u64, message: &str) -> Change {
    let event = Event {
        id,
        at: String::new(),
        kind: EventKind::Daemon,
        instance: None,
        generation: None,
        message: message.to_owned(),
        detail: serde_json::json!({}),
    };
    Change::Event(id, serde_json::to_string(&event).unwrap().into())
}

/// Messages on the disk, as another process reads them.
fn on_disk(dir: &Path) -> Vec<String> {
    let db = rusqlite::Connection::open(dir.join("journal.sqlite")).unwrap();
    let mut rows = db.prepare("SELECT row FROM event ORDER BY id").unwrap();
    let texts = rows.query_map([], |row| row.get::<_, String>(0)).unwrap();
    texts
        .map(|text| {
            serde_json::from_str::<Event>(&text.unwrap())
                .unwrap()
                .message
        })
        .collect()
}

#[actix::test]
async fn a_note_is_written_with_the_next_record_and_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
    journal.send(Note(event(1, "note"))).await.unwrap();
    journal.send(Note(event(2, "older"))).await.unwrap();
    record(&journal, vec![event(2, "newer")]).await.unwrap();
    assert_eq!(on_disk(dir.path()), ["note", "newer"]);
    arbiter.stop();
    arbiter.join().unwrap();
}

#[actix::test]
async fn a_note_alone_is_written_soon_and_one_more_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
    journal.send(Note(event(1, "alone"))).await.unwrap();
    let written = async {
        while on_disk(dir.path()).is_empty() {
            tokio::time::sleep(NOTES_DELAY).await;
        }
    };
    let deadline = Duration::from_secs(60);
    tokio::time::timeout(deadline, written).await.unwrap();
    journal.send(Note(event(2, "last"))).await.unwrap();
    arbiter.stop();
    arbiter.join().unwrap();
    assert_eq!(on_disk(dir.path()), ["alone", "last"]);
}

#[actix::test]
async fn one_of_many_records_that_is_refused_takes_none_of_the_others_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
    let other = rusqlite::Connection::open(dir.path().join("journal.sqlite")).unwrap();
    other
        .execute_batch(
            "CREATE TRIGGER refuse BEFORE INSERT ON event WHEN NEW.row LIKE '%refused%'
             BEGIN SELECT RAISE(ABORT, 'as the test wants it'); END;",
        )
        .unwrap();
    // Blocks the journal's thread; messages sent meanwhile are written together.
    #[expect(clippy::disallowed_methods, reason = "the journal's own thread")]
    let busy = || std::thread::sleep(Duration::from_millis(200));
    arbiter.spawn_fn(busy);
    let texts = ["first", "second", "refused", "third"];
    let sent = (1..)
        .zip(texts)
        .map(|(id, text)| journal.send(Record(vec![event(id, text)])));
    let sent: Vec<_> = sent.collect();
    let answers = futures_util::future::join_all(sent).await;
    let written: Vec<bool> = answers
        .iter()
        .map(|a| a.as_ref().unwrap().is_ok())
        .collect();
    assert_eq!(written, [true, true, false, true]);
    assert_eq!(on_disk(dir.path()), ["first", "second", "third"]);
    arbiter.stop();
    arbiter.join().unwrap();
}

fn instance(morphs: u64) -> InstanceRow {
    InstanceRow {
        name: "web".to_owned(),
        spec: InstanceSpec {
            kernel: KernelChoice {
                path: "/boot/vmlinuz".into(),
                release: "6.1.0".to_owned(),
                sha256: "ab".repeat(32),
                cmdline: "quiet \"x\"".to_owned(),
                initramfs: None,
            },
            cpus: 1,
            memory_bytes: u64::MAX,
            workload: None,
            publish: Vec::new(),
            monitor: true,
            backend: kmorph_backends::contract::BackendKind::Embedded,
            throw_away: false,
        },
        policy: crate::model::Policy {
            heartbeat_timeout_s: 0.1,
            auto_heal: true,
            morph_timeout_s: 60.0,
            stuck_cpu: crate::model::StuckCpuPolicy::Degraded,
            vmcore: crate::model::VmcorePolicy::Off,
        },
        desired: kmp_proto::instance::Desired::Running,
        reason: None,
        created_at: String::new(),
        active_generation: u64::MAX,
        recoveries: 0,
        morphs,
        workload_failures: 0,
        workload_restarts: WorkloadRestarts::default(),
    }
}

const SECRET: &str = "correct-horse-battery-staple";

/// Returns the files in `dir` that contain the secret anywhere, in use or not.
fn files_with_the_secret(dir: &Path) -> Vec<std::path::PathBuf> {
    let paths = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let holds = |path: &std::path::PathBuf| {
        let bytes = std::fs::read(path).unwrap_or_default();
        bytes.windows(SECRET.len()).any(|w| w == SECRET.as_bytes())
    };
    paths.filter(holds).collect()
}

#[actix::test]
async fn the_environment_of_an_instance_that_is_gone_is_on_the_disk_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
    let mut row = instance(0);
    row.spec.workload = Some(crate::model::Workload {
        program: "/bin/db".to_owned(),
        args: Vec::new(),
        // Long enough to fill pages of its own.
        env: [("PASSWORD".to_owned(), SECRET.repeat(1000))].into(),
        env_file: None,
    });
    for morphs in 0..3 {
        row.morphs = morphs;
        let change = Change::Instance(Box::new(row.clone()));
        record(&journal, vec![change]).await.unwrap();
    }
    assert!(!files_with_the_secret(dir.path()).is_empty());
    let gone = Change::InstanceGone(row.name.clone());
    record(&journal, vec![gone]).await.unwrap();
    let scrubbed = async {
        while !files_with_the_secret(dir.path()).is_empty() {
            tokio::time::sleep(NOTES_DELAY).await;
        }
    };
    let deadline = Duration::from_secs(60);
    let waited = tokio::time::timeout(deadline, scrubbed).await;
    assert!(waited.is_ok(), "{:?}", files_with_the_secret(dir.path()));
    arbiter.stop();
    arbiter.join().unwrap();
}

#[actix::test]
async fn the_journal_is_for_its_owner_only_also_one_that_was_not() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let set = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    for earlier in [false, true] {
        if earlier {
            for entry in std::fs::read_dir(&state).unwrap() {
                set(&entry.unwrap().path(), 0o644);
            }
            set(&state, 0o755);
        }
        let (journal, _, arbiter) = Journal::open(&state).unwrap();
        record(&journal, vec![event(1, "written")]).await.unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&state), 0o700);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&state).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(mode(&path), 0o600, "{path:?}");
            names.push(path.file_name().unwrap().to_owned());
        }
        assert!(names.contains(&"journal.sqlite-wal".into()), "{names:?}");
        arbiter.stop();
        arbiter.join().unwrap();
    }
}

#[actix::test]
async fn a_planted_database_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&state, private).unwrap();
    let target = dir.path().join("precious");
    std::os::unix::fs::symlink(&target, state.join("journal.sqlite-wal")).unwrap();
    let refused = Journal::open(&state).map(|_| ()).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("symbolic link") && text.contains("remove"),
        "{text}"
    );
    assert!(!target.exists());
}

#[actix::test]
async fn a_policy_is_changed_by_its_own_change_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
    let written = instance(0);
    let new = Change::Instance(Box::new(written.clone()));
    record(&journal, vec![new]).await.unwrap();
    let mut policy = written.policy.clone();
    policy.heartbeat_timeout_s = 7.25;
    let changed = Change::Policy("web".to_owned(), Box::new(policy.clone()));
    let gone = Change::Policy("gone".to_owned(), Box::new(policy.clone()));
    record(&journal, vec![changed, gone]).await.unwrap();
    // The writer of this change knows the older policy.
    let later = Change::Instance(Box::new(instance(1)));
    record(&journal, vec![later]).await.unwrap();
    let found = journal.send(Load).await.unwrap().unwrap().instances;
    assert_eq!(
        found,
        [InstanceRow {
            policy,
            ..instance(1)
        }]
    );
    arbiter.stop();
    arbiter.join().unwrap();
}
