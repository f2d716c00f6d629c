//! Initramfs images for test guests, packed from a tree of files.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Mount points, and directories that programs expect.
const DIRECTORIES: [&str; 9] = [
    "bin", "dev", "etc", "modules", "proc", "run", "sys", "tmp", "usr/bin",
];

/// The tree of files of an image.
#[derive(Debug)]
pub struct Initramfs {
    root: PathBuf,
}

impl Initramfs {
    /// Creates a tree in `root`, with busybox under the names of these applets.
    pub fn new(root: PathBuf, applets: &[&str]) -> Self {
        let tree = Self { root };
        for name in DIRECTORIES {
            fs::create_dir_all(tree.root.join(name)).expect("a directory can be made");
        }
        tree.add(Path::new("/bin/busybox"), "bin/busybox");
        for applet in applets {
            symlink("busybox", tree.root.join("bin").join(applet)).expect("a link can be made");
        }
        tree
    }

    /// Copies the file `from` of the host.
    pub fn add(&self, from: &Path, to: impl AsRef<Path>) {
        let to = self.place(to);
        fs::copy(from, &to).unwrap_or_else(|error| panic!("copying {from:?}: {error}"));
    }

    /// Copies a program of this workspace into `/usr/bin`, stripped of its symbols, and the libraries that it needs.
    pub fn add_program(&self, path: &Path) {
        for library in libraries(path) {
            let place = library.strip_prefix("/");
            self.add(&library, place.expect("ldd prints absolute paths"));
        }
        let name = path.file_name().expect("a program has a name");
        let to = self.place(Path::new("usr/bin").join(name));
        let mut strip = Command::new("strip");
        let stripped = strip.arg("-o").arg(&to).arg(path).status();
        assert!(stripped.expect("strip runs").success(), "{path:?}");
    }

    /// Sets the script that the kernel starts as init.
    pub fn set_init(&self, script: &str) {
        let init = self.place("init");
        fs::write(&init, script).expect("a file can be written");
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(init, executable).expect("it is ours");
    }

    /// Writes the image to `to`.
    pub fn pack(&self, to: &Path) {
        let image = fs::File::create(to).expect("a file can be made");
        let packed = Command::new("sh")
            .args(["-c", "find . | cpio --create --format=newc --quiet"])
            .current_dir(&self.root)
            .stdout(Stdio::from(image))
            .status();
        assert!(packed.expect("cpio runs").success());
    }

    fn place(&self, to: impl AsRef<Path>) -> PathBuf {
        let to = self.root.join(to);
        fs::create_dir_all(to.parent().expect("it is below the root")).expect("it can be made");
        to
    }
}

fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd runs");
    let text = String::from_utf8(output.stdout).expect("paths are text");
    let words = text.split_whitespace();
    words
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}
