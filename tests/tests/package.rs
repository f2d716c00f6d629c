//! The Debian package: built, installed in a root of its own and against the C project of the same name, used, and
//! removed.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kmorph_tests::{Host, program};

/// Files that `make install PREFIX=/usr` of multikernel/kmorph installs, and a file that it creates at run time.
const UPSTREAM: [&str; 13] = [
    "usr/bin/kmorph",
    "usr/bin/kmorphd",
    "etc/kmorph/kmorph.conf",
    "etc/kmorph/kmorph.conf.example",
    "etc/kernel/postinst.d/zz-kmorph",
    "usr/lib/dracut/modules.d/99kmorph/kmorphd-initrd.service",
    "usr/lib/dracut/modules.d/99kmorph/module-setup.sh",
    "usr/lib/kernel/install.d/60-kmorph.install",
    "usr/lib/kmorph/kmorph-mkimage",
    "usr/lib/systemd/system/kmorph.service",
    "usr/share/initramfs-tools/hooks/kmorph",
    "usr/share/initramfs-tools/scripts/init-premount/kmorph",
    "var/lib/kmorph/successor.img",
];

/// The directory of packages and their roots, which is removed after the test.
struct Place {
    host: Host,
    package: PathBuf,
}

/// Everything below `root` except dpkg's own files: the content of a file, or the mode of a directory.
type Tree = BTreeMap<PathBuf, Vec<u8>>;

impl Place {
    /// Builds the package of the programs beside this test; `None` without root.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("not tested: dpkg installs as root alone");
            return None;
        }
        let host = Host::prepare("");
        let binaries = program("kmorphd").parent().unwrap().to_owned();
        let build = |to: &str| {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/build-deb");
            let mut command = Command::new(script);
            command.arg(&binaries).arg(host.path(to));
            command.env("DEB_COMPRESSION", "none");
            let said = done(command.env("SOURCE_DATE_EPOCH", "1700000000"));
            PathBuf::from(said.trim())
        };
        let package = build("packages");
        Some(Self { host, package })
    }

    /// Creates a root without any package.
    fn root(&self, name: &str) -> PathBuf {
        let root = self.host.path(name);
        fs::create_dir_all(root.join("var/lib/dpkg/updates")).unwrap();
        fs::create_dir_all(root.join("var/lib/dpkg/info")).unwrap();
        fs::write(root.join("var/lib/dpkg/status"), "").unwrap();
        root
    }

    /// Returns a package named `kmorph` with some of upstream's files.
    fn upstreams(&self) -> PathBuf {
        let root = self.host.path("upstream");
        for file in UPSTREAM.iter().filter(|file| file.starts_with("usr")) {
            write(&root, file);
        }
        fs::create_dir(root.join("DEBIAN")).unwrap();
        let control = "Package: kmorph\nVersion: 0.1\nArchitecture: all\nMaintainer: a <b@c>\nDescription: d\n";
        fs::write(root.join("DEBIAN/control"), control).unwrap();
        let package = self.host.path("packages/kmorph.deb");
        let mut build = Command::new("dpkg-deb");
        done(build.arg("--build").arg(root).arg(&package));
        package
    }
}

fn write(root: &Path, file: &str) {
    let path = root.join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("upstream's {file}")).unwrap();
}

/// Runs dpkg on `root`. The package's scripts run outside of `root` and receive its path, because `root` has no shell.
fn dpkg(root: &Path, words: &[&str], package: &Path) -> Output {
    Command::new("dpkg")
        .arg(format!("--root={}", root.display()))
        .args([
            "--log=/dev/null",
            "--force-script-chrootless",
            "--force-depends",
        ])
        .args(words)
        .arg(package)
        .output()
        .unwrap()
}

/// Returns the output of a command that must succeed.
fn done(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn tree(root: &Path) -> Tree {
    let mut found = Tree::new();
    let mut open = vec![root.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap().map(Result::unwrap) {
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            if path.ends_with("var/lib/dpkg") {
                continue;
            }
            let content = match (kind.is_dir(), kind.is_symlink()) {
                (true, _) => {
                    open.push(path.clone());
                    Vec::new()
                }
                (_, true) => fs::read_link(&path)
                    .unwrap()
                    .into_os_string()
                    .into_encoded_bytes(),
                _ => fs::read(&path).unwrap_or_default(),
            };
            found.insert(path.strip_prefix(root).unwrap().to_owned(), content);
        }
    }
    found
}

/// Uses the installation in `root` like its operator: kmorphctl finds the daemon, and the daemon finds its agent and
/// the reference workload. Ends with a running instance.
fn use_it(place: &Place, root: &Path) -> impl Fn(&[&str]) -> Output {
    let config = place.host.path("package.conf");
    let text = format!(
        "[paths]\nstate_dir = \"{0}/var/lib/kmorph\"\nrun_dir = \"{0}/run/kmorph\"\ncache_dir = \"{0}/var/cache/kmorph\"\n",
        root.display()
    );
    fs::write(&config, text).unwrap();
    let (program, socket) = (
        root.join("usr/bin/kmorphctl"),
        root.join("run/kmorph/kmorphd.sock"),
    );
    let ctl = move |words: &[&str]| {
        let mut command = Command::new(&program);
        command
            .arg("--socket")
            .arg(&socket)
            .args(words)
            .env("PATH", "/nonexistent");
        command.output().unwrap()
    };
    let config = format!("--config={}", config.display());
    let started = ctl(&["daemon", "start", &config]);
    assert!(started.status.success(), "{started:?}");
    let kernel = format!("--kernel={}", place.host.kernel("6.1.0-a").display());
    let spawned = ctl(&["spawn", "web", &kernel, "--workload=kmorph-kv"]);
    assert!(spawned.status.success(), "{spawned:?}");
    ctl
}

#[test]
fn it_is_installed_used_and_removed_beside_the_c_project() {
    let Some(place) = Place::new() else { return };
    let root = place.root("root");
    for file in UPSTREAM.iter().filter(|file| !file.starts_with("var")) {
        write(&root, file);
    }
    let before = tree(&root);
    let installed = dpkg(&root, &["--install"], &place.package);
    assert!(installed.status.success(), "{}", said(&installed));
    let files = tree(&root);
    for (path, content) in &before {
        assert_eq!(files.get(path), Some(content), "{path:?} was upstream's");
    }
    for file in [
        "usr/share/man/man8/kmorphd.8.gz",
        "usr/share/man/man1/kmorphctl-spawn.1.gz",
    ] {
        assert!(
            files.contains_key(Path::new(file)),
            "{file}: {:?}",
            files.keys()
        );
    }
    unit_is_sound(&root);

    let ctl = use_it(&place, &root);
    let refused = dpkg(&root, &["--remove"], Path::new("kmorph-runtime"));
    assert!(!refused.status.success(), "{refused:?}");
    assert!(
        said(&refused).contains("there are instances: web"),
        "{refused:?}"
    );
    for words in [&["terminate", "web"][..], &["daemon", "stop"]] {
        let ended = ctl(words);
        assert!(ended.status.success(), "{ended:?}");
    }
    // Like upstream's kernel hook, once our state directory exists.
    write(&root, "var/lib/kmorph/successor.img");
    let purged = dpkg(&root, &["--purge"], Path::new("kmorph-runtime"));
    assert!(purged.status.success(), "{}", said(&purged));
    assert!(said(&purged).contains("successor.img"), "{purged:?}");
    let mut wanted = before;
    let image = "var/lib/kmorph/successor.img";
    wanted.insert(image.into(), format!("upstream's {image}").into_bytes());
    let made_by_use = ["var", "var/lib", "var/lib/kmorph", "var/cache", "run"];
    let shown = |tree: Tree| -> Vec<(PathBuf, String)> {
        let meant = |path: &Path| !made_by_use.iter().any(|dir| path == Path::new(dir));
        let kept = tree.into_iter().filter(|(path, _)| meant(path));
        kept.map(|(path, content)| (path, String::from_utf8_lossy(&content).into_owned()))
            .collect()
    };
    assert_eq!(shown(tree(&root)), shown(wanted));
}

/// Checks the unit with systemd, if systemd is installed.
fn unit_is_sound(root: &Path) {
    let mut verify = Command::new("systemd-analyze");
    verify.arg(format!("--root={}", root.display()));
    verify.args(["--man=no", "verify", "kmorphd.service"]);
    let Ok(output) = verify.output() else { return };
    let text = said(&output);
    // The targets that every unit needs are missing in this root.
    let ours: Vec<_> = text
        .lines()
        .filter(|line| line.contains("kmorphd.service:") && !line.ends_with(".target not found."))
        .collect();
    assert!(ours.is_empty(), "{text}");
}

#[test]
fn a_package_of_the_c_project_and_this_one_exclude_each_other() {
    let Some(place) = Place::new() else { return };
    let other = place.upstreams();
    for (first, second) in [(&other, &place.package), (&place.package, &other)] {
        let root = place.root(if first == &other { "one" } else { "two" });
        let installed = dpkg(&root, &["--install"], first);
        assert!(installed.status.success(), "{}", said(&installed));
        let before = tree(&root);
        let refused = dpkg(&root, &["--install"], second);
        assert!(!refused.status.success(), "{refused:?}");
        assert!(said(&refused).contains("conflict"), "{refused:?}");
        assert!(tree(&root) == before, "dpkg changed something");
    }
}

#[test]
fn two_builds_are_alike() {
    let Some(place) = Place::new() else { return };
    let again = Place::new().unwrap();
    let bytes = |package: &Path| fs::read(package).unwrap();
    assert!(bytes(&place.package) == bytes(&again.package));
    let link = place.host.path("link");
    symlink(&place.package, &link).unwrap();
    let lists = done(Command::new("dpkg-deb").arg("--contents").arg(&link));
    for file in UPSTREAM {
        assert!(
            !lists
                .lines()
                .any(|line| line.ends_with(&format!("./{file}"))),
            "{file}"
        );
    }
}
