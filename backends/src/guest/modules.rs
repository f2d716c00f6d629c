//! The kernel modules that a guest needs, from the module tree of its kernel's package.
//!
//! Dependencies come from the modules themselves (`depends=` in `.modinfo`), because an unpacked package has no
//! `modules.dep` until depmod(8) has run. Modules that are built into the kernel (`modules.builtin`) need no loading.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kmorph_files::read_named;

/// Maximum size of a list of modules, bytes.
const LIST_MAX_BYTES: u64 = 4 * 1024 * 1024;
/// Maximum size of an uncompressed module, bytes.
const MODULE_MAX_BYTES: u64 = 64 * 1024 * 1024;
/// Suffixes of compressed modules, with the programs that decompress them to standard output.
const PACKINGS: [(&str, &[&str]); 4] = [
    ("", &[]),
    (".xz", &["xz", "-dc"]),
    (".zst", &["zstd", "-dcq"]),
    (".gz", &["gzip", "-dc"]),
];

/// One uncompressed module.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Module {
    /// Name with underscores.
    pub(super) name: String,
    /// The ELF object.
    pub(super) object: Vec<u8>,
}

/// Why the modules are unavailable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModuleError {
    #[error("reading {path:?}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the kernel has no module {name} (looked in {tree:?})")]
    Missing { name: String, tree: PathBuf },
    #[error("unpacking {path:?} with {program}: {reason}")]
    Unpack {
        path: PathBuf,
        program: &'static str,
        reason: String,
    },
}

/// The modules of one kernel.
#[derive(Debug)]
pub(super) struct ModuleTree {
    root: PathBuf,
    /// Name to path below the root, without the compression suffix.
    files: HashMap<String, PathBuf>,
    builtin: HashSet<String>,
}

impl ModuleTree {
    /// Returns the tree at `root`, a `lib/modules/<release>`.
    pub(super) fn open(root: &Path) -> Result<Self, ModuleError> {
        let mut files = HashMap::new();
        for line in list(&root.join("modules.order"))?.lines() {
            if let Some(name) = name_of(line) {
                files.insert(name, unpacked(line).into());
            }
        }
        let builtin = list(&root.join("modules.builtin"))?;
        Ok(Self {
            root: root.to_owned(),
            files,
            builtin: builtin.lines().filter_map(name_of).collect(),
        })
    }

    /// Returns the modules in `wanted` and their dependencies, except built-in ones, in an order in
    /// which they can be loaded.
    pub(super) fn closure(&self, wanted: &[&str]) -> Result<Vec<Module>, ModuleError> {
        let mut done = HashSet::new();
        let mut order = Vec::new();
        for name in wanted {
            self.visit(name, &mut done, &mut order)?;
        }
        Ok(order)
    }

    /// Returns whether the kernel has the module, built in or loadable.
    pub(super) fn has(&self, name: &str) -> bool {
        self.builtin.contains(name) || self.files.contains_key(name)
    }

    fn visit(
        &self,
        name: &str,
        done: &mut HashSet<String>,
        order: &mut Vec<Module>,
    ) -> Result<(), ModuleError> {
        // Marked before its dependencies are visited, so that a cycle of dependencies, which no kernel has, ends too.
        if self.builtin.contains(name) || !done.insert(name.to_owned()) {
            return Ok(());
        }
        let object = self.read(name)?;
        for dependency in depends(&object) {
            self.visit(&dependency, done, order)?;
        }
        let name = name.to_owned();
        order.push(Module { name, object });
        Ok(())
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, ModuleError> {
        let missing = || ModuleError::Missing {
            name: name.to_owned(),
            tree: self.root.clone(),
        };
        let below = self.files.get(name).ok_or_else(missing)?;
        for (ending, program) in PACKINGS {
            let mut path = self.root.join(below).into_os_string();
            path.push(ending);
            let path = PathBuf::from(path);
            if path.is_file() {
                return unpack(&path, program);
            }
        }
        Err(missing())
    }
}

fn list(path: &Path) -> Result<String, ModuleError> {
    let failed = |source| ModuleError::Read {
        path: path.to_owned(),
        source,
    };
    let bytes = read_named(path, LIST_MAX_BYTES).map_err(|error| failed(error.into()))?;
    String::from_utf8(bytes).map_err(|_| failed(std::io::ErrorKind::InvalidData.into()))
}

fn unpack(path: &Path, program: &'static [&'static str]) -> Result<Vec<u8>, ModuleError> {
    let Some((command, arguments)) = program.split_first() else {
        return read_named(path, MODULE_MAX_BYTES).map_err(|error| ModuleError::Read {
            path: path.to_owned(),
            source: error.into(),
        });
    };
    let failed = |reason: String| ModuleError::Unpack {
        path: path.to_owned(),
        program: command,
        reason,
    };
    let mut child = Command::new(command)
        .args(arguments)
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let mut object = Vec::new();
    if let Some(output) = child.stdout.take() {
        output
            .take(MODULE_MAX_BYTES)
            .read_to_end(&mut object)
            .map_err(|error| failed(error.to_string()))?;
    }
    match child.wait() {
        Ok(status) if status.success() => Ok(object),
        Ok(status) => Err(failed(status.to_string())),
        Err(error) => Err(failed(error.to_string())),
    }
}

/// Returns the path without a compression suffix.
fn unpacked(path: &str) -> &str {
    let endings = PACKINGS.iter().map(|(ending, _)| *ending);
    endings
        .filter(|ending| !ending.is_empty())
        .find_map(|ending| path.strip_suffix(ending))
        .unwrap_or(path)
}

/// Returns a module's name: its file name with underscores.
fn name_of(path: &str) -> Option<String> {
    let file = unpacked(path.trim()).rsplit('/').next()?;
    Some(file.strip_suffix(".ko")?.replace('-', "_"))
}

/// Returns the dependencies in `depends=` of a module's `.modinfo` section, a list of NUL-terminated `key=value`.
fn depends(object: &[u8]) -> Vec<String> {
    let text = object
        .split(|b| *b == 0)
        .find_map(|entry| entry.strip_prefix(b"depends="));
    let text = text
        .and_then(|t| core::str::from_utf8(t).ok())
        .unwrap_or("");
    let names = text.split(',').filter(|name| !name.is_empty());
    names.map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(modules: &[(&str, &str)], builtin: &str) -> (tempfile::TempDir, ModuleTree) {
        let dir = tempfile::tempdir().unwrap();
        let mut order = String::new();
        for (name, depends) in modules {
            let path = format!("kernel/drivers/{name}.ko");
            std::fs::create_dir_all(dir.path().join("kernel/drivers")).unwrap();
            let object = format!("\x7fELF\0license=GPL\0depends={depends}\0name={name}\0");
            std::fs::write(dir.path().join(&path), object).unwrap();
            order.push_str(&path);
            order.push('\n');
        }
        std::fs::write(dir.path().join("modules.order"), order).unwrap();
        std::fs::write(dir.path().join("modules.builtin"), builtin).unwrap();
        let tree = ModuleTree::open(dir.path()).unwrap();
        (dir, tree)
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|m| m.name.as_str()).collect()
    }

    #[test]
    fn modules_come_after_what_they_depend_on_and_once() {
        let (_dir, tree) = tree(
            &[
                ("vsock", ""),
                ("virtio-pci", "virtio,virtio_ring"),
                ("virtio", ""),
                ("virtio_ring", "virtio"),
                ("transport", "vsock,virtio_ring"),
            ],
            "",
        );
        let found = tree.closure(&["virtio_pci", "transport"]).unwrap();
        assert_eq!(
            names(&found),
            ["virtio", "virtio_ring", "virtio_pci", "vsock", "transport"]
        );
    }

    #[test]
    fn what_is_built_in_is_not_loaded_and_what_is_absent_is_named() {
        let (_dir, tree) = tree(
            &[("transport", "virtio")],
            "kernel/drivers/virtio/virtio.ko\n",
        );
        assert_eq!(names(&tree.closure(&["transport"]).unwrap()), ["transport"]);
        assert!(tree.has("virtio") && !tree.has("vsock"));
        let error = tree.closure(&["vsock"]).unwrap_err().to_string();
        assert!(error.contains("no module vsock"), "{error}");
    }

    #[test]
    fn a_damaged_packed_module_is_refused() {
        let (dir, tree) = tree(&[("a", "")], "");
        let path = dir.path().join("kernel/drivers/a.ko");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(path.with_extension("ko.gz"), b"no gzip").unwrap();
        let error = tree.closure(&["a"]).unwrap_err().to_string();
        assert!(error.contains("unpacking"), "{error}");
    }
}
