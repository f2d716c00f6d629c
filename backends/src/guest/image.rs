//! The guest image: an initramfs with the agent as its init.
//!
//! ```text
//! /init                        the agent            \
//! /lib/…, /lib64/…             its shared libraries  | built once for a kernel and kept in the
//! /lib/modules/<name>.ko       required modules      | cache: <cache>/guest-images/<key>.cpio
//! <the workload's own path>    its program          /
//! /etc/kmorph/agent.json       the agent's configuration: a separate archive after the other
//! ```
//!
//! The archives are not compressed, because software emulation decompresses more slowly than it reads. For the same
//! reason, modules are decompressed here.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use kmorph_files::{OwnDir, PRIVATE_DIR, open_named, read_named};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cpio::Archive;
use super::modules::{ModuleError, ModuleTree};

/// Path of the agent's configuration in the guest.
pub(crate) const AGENT_CONFIG: &str = "/etc/kmorph/agent.json";
/// Version of the layout: a part of every key.
const LAYOUT: &str = "3";
/// Maximum number of cached images; the oldest are removed.
const IMAGES_MAX: usize = 8;
/// Number of images built by this process: gives each image under construction a unique name.
static BUILDS: AtomicU64 = AtomicU64::new(0);
/// Maximum size of a program or library in an image, bytes.
const FILE_MAX_BYTES: u64 = 512 * 1024 * 1024;
/// Directories for the agent's mounts, or expected by programs.
const DIRECTORIES: [&str; 8] = [
    "dev",
    "etc",
    "etc/kmorph",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
];

/// The contents of an image.
#[derive(Debug)]
pub(crate) struct Recipe {
    /// The kernel's release.
    pub(crate) release: String,
    /// Its `lib/modules/<release>`; `None` if it has none, so that everything is built in.
    pub(crate) modules: Option<PathBuf>,
    /// Modules without which the daemon cannot reach the guest.
    pub(crate) needed: &'static [&'static str],
    /// Modules that are loaded first, if the kernel has them.
    pub(crate) welcome: &'static [&'static str],
    /// `kerf-vsock.ko` for this kernel, if it carries vsock instead of virtio.
    pub(crate) kerf: Option<PathBuf>,
    /// The agent's program on the host.
    pub(crate) agent: PathBuf,
    /// Programs on the host that the guest gets at the same path.
    pub(crate) programs: Vec<PathBuf>,
}

/// An open image: others may prune the cache, or build the same image, at any time.
#[derive(Debug)]
pub(crate) struct GuestImage {
    pub(crate) archive: File,
    /// Modules in the order of loading, as paths in the guest.
    pub(crate) modules: Vec<PathBuf>,
}

impl GuestImage {
    /// Returns a user's own image, which loads its modules itself.
    pub(crate) fn own(path: &Path) -> Result<Self, ImageError> {
        let archive = open_named(path, OWN_IMAGE_MAX_BYTES);
        let archive = archive.map_err(|error| file("opening", path)(error.into()))?;
        Ok(Self {
            archive,
            modules: Vec::new(),
        })
    }
}

/// Data stored next to an image.
#[derive(Serialize, Deserialize)]
struct Contents {
    modules: Vec<PathBuf>,
}

/// Maximum size of a user's own initramfs, bytes.
const OWN_IMAGE_MAX_BYTES: u64 = 2 << 30;

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    #[error("{what} {path:?}: {source}")]
    File {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{program:?} needs the shared library {library}, which this host does not have")]
    LibraryMissing { program: PathBuf, library: String },
    #[error(transparent)]
    Module(#[from] ModuleError),
    #[error("invalid path for a guest image: {0:?}; it must be absolute and UTF-8")]
    Path(PathBuf),
}

impl Recipe {
    /// Returns the image for this recipe, from the cache or built now. Blocking: a build takes about 50 ms.
    pub(crate) fn image(&self, cache: &Path) -> Result<GuestImage, ImageError> {
        let directory = cache.join("guest-images");
        // Guests boot the images in this directory: no other user may write to it.
        let owned = OwnDir::make(&directory, PRIVATE_DIR);
        owned.map_err(|refusal| file("making", &directory)(refusal.into()))?;
        let mut files = BTreeSet::new();
        for program in self.programs.iter().chain([&self.agent]) {
            files.extend(shared_libraries(program)?);
        }
        files.extend(self.programs.iter().cloned());
        let key = self.key(&files)?;
        let path = directory.join(format!("{key}.cpio"));
        let contents = directory.join(format!("{key}.json"));
        if let Ok(archive) = File::open(&path)
            && let Ok(text) = std::fs::read(&contents)
            && let Ok(Contents { modules }) = serde_json::from_slice(&text)
        {
            return Ok(GuestImage { archive, modules });
        }
        let (archive, modules) = self.build(&files, &path)?;
        let text = serde_json::to_vec(&Contents {
            modules: modules.clone(),
        });
        let text = text.map_err(|e| file("writing", &contents)(e.into()))?;
        std::fs::write(&contents, text).map_err(file("writing", &contents))?;
        prune(&directory).map_err(file("tidying", &directory))?;
        Ok(GuestImage { archive, modules })
    }

    /// Returns the name of the image, derived from its inputs: a file's identity, size and time represent its contents.
    fn key(&self, files: &BTreeSet<PathBuf>) -> Result<String, ImageError> {
        let mut hash = Sha256::new();
        hash.update(LAYOUT);
        hash.update(&self.release);
        for module in self.welcome.iter().chain(self.needed) {
            hash.update(module);
            hash.update([0]);
        }
        let order = self.modules.as_ref().map(|m| m.join("modules.order"));
        let parts = files.iter().chain([&self.agent]);
        for path in parts.chain(order.as_ref()).chain(self.kerf.as_ref()) {
            let meta = std::fs::metadata(path).map_err(file("looking at", path))?;
            hash.update(path.as_os_str().as_encoded_bytes());
            hash.update([0]);
            for number in [meta.dev(), meta.ino(), meta.size()] {
                hash.update(number.to_le_bytes());
            }
            for number in [meta.mtime(), meta.mtime_nsec()] {
                hash.update(number.to_le_bytes());
            }
        }
        let mut key = String::with_capacity(64);
        for byte in hash.finalize() {
            let _ = write!(key, "{byte:02x}");
        }
        Ok(key)
    }

    fn build(
        &self,
        files: &BTreeSet<PathBuf>,
        to: &Path,
    ) -> Result<(File, Vec<PathBuf>), ImageError> {
        // Others may build the same image at this time, in this process too.
        let own = BUILDS.fetch_add(1, Ordering::Relaxed);
        let partial = to.with_extension(format!("{}-{own}.partial", std::process::id()));
        let result = self.write(files, &partial).and_then(|modules| {
            let archive = File::open(&partial).map_err(file("opening", &partial))?;
            std::fs::rename(&partial, to).map_err(file("renaming", &partial))?;
            Ok((archive, modules))
        });
        if result.is_err() {
            let _ = std::fs::remove_file(&partial);
        }
        result
    }

    fn write(&self, files: &BTreeSet<PathBuf>, to: &Path) -> Result<Vec<PathBuf>, ImageError> {
        let write = file("writing", to);
        let modules = match &self.modules {
            Some(root) => {
                let tree = ModuleTree::open(root)?;
                let welcome = self.welcome.iter().filter(|name| tree.has(name));
                tree.closure(&welcome.chain(self.needed).copied().collect::<Vec<_>>())?
            }
            None => Vec::new(),
        };
        let mut image = Image {
            archive: Archive::new(BufWriter::new(File::create(to).map_err(&write)?)),
            directories: BTreeSet::new(),
        };
        for directory in DIRECTORIES {
            image.directory(Path::new(directory)).map_err(&write)?;
        }
        image.archive.device("dev/console", 5, 1).map_err(&write)?;
        image.copy(&self.agent, Path::new("/init"))?;
        for path in files {
            image.copy(path, path)?;
        }
        let mut loaded = Vec::new();
        for module in modules {
            let path = PathBuf::from(format!("/lib/modules/{}.ko", module.name));
            image.add(&path, 0o644, &module.object)?;
            loaded.push(path);
        }
        if let Some(module) = &self.kerf {
            let path = PathBuf::from("/lib/modules/kerf_vsock.ko");
            image.copy(module, &path)?;
            loaded.push(path);
        }
        let file = image.archive.finish().map_err(&write)?;
        file.into_inner()
            .map_err(|error| write(error.into_error()))?;
        Ok(loaded)
    }
}

struct Image {
    archive: Archive<BufWriter<File>>,
    directories: BTreeSet<PathBuf>,
}

impl Image {
    /// Adds the host's file `from` as `to`, with its parent directories.
    fn copy(&mut self, from: &Path, to: &Path) -> Result<(), ImageError> {
        let data = read_named(from, FILE_MAX_BYTES);
        let data = data.map_err(|error| file("reading", from)(error.into()))?;
        self.add(to, 0o755, &data)
    }

    fn add(&mut self, to: &Path, permissions: u32, data: &[u8]) -> Result<(), ImageError> {
        let name = to
            .strip_prefix("/")
            .ok()
            .and_then(Path::to_str)
            .ok_or_else(|| ImageError::Path(to.to_owned()))?;
        let parent = Path::new(name).parent().unwrap_or(Path::new(""));
        self.directory(parent)
            .and_then(|()| self.archive.file(name, permissions, data))
            .map_err(file("adding to the guest image", to))
    }

    /// Adds a directory and its parents, once.
    fn directory(&mut self, path: &Path) -> io::Result<()> {
        let mut above: Vec<&Path> = path.ancestors().collect();
        above.reverse();
        for path in above {
            let name = path.to_str().ok_or(io::ErrorKind::InvalidFilename)?;
            if !name.is_empty() && self.directories.insert(path.to_owned()) {
                self.archive.directory(name)?;
            }
        }
        Ok(())
    }
}

/// Writes the initramfs of a generation: the image, followed by an archive with the agent's configuration.
pub(crate) fn with_configuration(
    image: &mut File,
    config: &[u8],
    mut file: File,
) -> io::Result<()> {
    // A user's own image may have any length; archives must begin at multiples of four bytes.
    let length = io::copy(&mut image.take(OWN_IMAGE_MAX_BYTES), &mut file)?;
    let gap = usize::try_from(length.next_multiple_of(4) - length).unwrap_or(0);
    file.write_all(&[0; 4][..gap])?;
    let mut archive = Archive::new(BufWriter::new(file));
    archive.directory("etc")?;
    archive.directory("etc/kmorph")?;
    archive.file(AGENT_CONFIG.trim_start_matches('/'), 0o600, config)?;
    archive.finish()?;
    Ok(())
}

/// Returns the shared libraries of a program, from ldd(1); none for a static program.
fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let output = Command::new("ldd")
        .arg(program)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .map_err(file("running ldd on", program))?;
    // "not a dynamic executable" is exit status 1: a static program, or a script.
    let text = String::from_utf8_lossy(&output.stdout);
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(library) = line.strip_suffix("=> not found") {
            return Err(ImageError::LibraryMissing {
                program: program.to_owned(),
                library: library.trim().to_owned(),
            });
        }
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        found.extend(path.map(PathBuf::from).filter(|path| path.is_file()));
    }
    Ok(found)
}

/// Removes all but the newest images.
fn prune(directory: &Path) -> io::Result<()> {
    let mut images = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        // Other processes prune too, so a missing file is not an error.
        if entry.path().extension().is_some_and(|e| e == "cpio")
            && let Ok(modified) = entry.metadata().and_then(|meta| meta.modified())
        {
            images.push((modified, entry.path()));
        }
    }
    images.sort();
    let old = images.len().saturating_sub(IMAGES_MAX);
    for (_, path) in &images[..old] {
        let _ = std::fs::remove_file(path.with_extension("json"));
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

fn file(what: &'static str, path: &Path) -> impl Fn(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::File {
        what,
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Seek;

    fn recipe() -> Recipe {
        Recipe {
            release: "6.1.0".into(),
            modules: None,
            needed: &[],
            welcome: &[],
            kerf: None,
            agent: "/bin/sh".into(),
            programs: vec!["/bin/true".into()],
        }
    }

    fn contains(archive: &mut File, text: &str) -> bool {
        let mut bytes = Vec::new();
        archive.rewind().unwrap();
        archive.read_to_end(&mut bytes).unwrap();
        bytes.windows(text.len()).any(|w| w == text.as_bytes())
    }

    fn inode(image: &GuestImage) -> u64 {
        image.archive.metadata().unwrap().ino()
    }

    #[test]
    fn one_that_is_built_and_tidied_away_by_others_meanwhile_is_whole() {
        let cache = tempfile::tempdir().unwrap();
        let build = |number: usize| {
            let release = format!("6.1.{}", number % (IMAGES_MAX + 2));
            let recipe = Recipe {
                release,
                ..recipe()
            };
            recipe.image(cache.path()).unwrap()
        };
        let images: Vec<GuestImage> = std::thread::scope(|scope| {
            let builds: Vec<_> = (0..4 * IMAGES_MAX)
                .map(|number| scope.spawn(move || build(number)))
                .collect();
            builds.into_iter().map(|b| b.join().unwrap()).collect()
        });
        for mut image in images {
            let end = image.archive.seek(std::io::SeekFrom::End(0)).unwrap();
            assert_eq!(end % 4, 0);
            assert!(contains(&mut image.archive, "TRAILER!!!"));
        }
        for left in std::fs::read_dir(cache.path().join("guest-images")).unwrap() {
            let path = left.unwrap().path();
            assert!(path.extension().unwrap() != "partial", "{path:?}");
        }
    }

    #[test]
    fn an_image_has_the_agent_as_init_and_programs_with_their_libraries() {
        let cache = tempfile::tempdir().unwrap();
        let mut image = recipe().image(cache.path()).unwrap();
        for name in ["init\0", "bin/true\0", "libc.so.6\0", "dev/console\0"] {
            assert!(contains(&mut image.archive, name), "{name}");
        }
        assert!(image.modules.is_empty());
    }

    #[test]
    fn the_same_recipe_is_built_once_and_another_kernel_gets_its_own() {
        let cache = tempfile::tempdir().unwrap();
        let first = recipe().image(cache.path()).unwrap();
        let again = recipe().image(cache.path()).unwrap();
        assert_eq!(inode(&first), inode(&again));
        let release = "6.12.0".to_owned();
        let other = Recipe {
            release,
            ..recipe()
        };
        let other = other.image(cache.path()).unwrap();
        assert_ne!(inode(&other), inode(&first));
    }

    #[test]
    fn the_module_of_kerf_vsock_is_loaded_last_and_makes_another_image() {
        let cache = tempfile::tempdir().unwrap();
        let module = cache.path().join("kerf-vsock.ko");
        std::fs::write(&module, b"the module").unwrap();
        let with = |kerf| Recipe { kerf, ..recipe() }.image(cache.path()).unwrap();
        let mut image = with(Some(module.clone()));
        let place = PathBuf::from("/lib/modules/kerf_vsock.ko");
        assert_eq!(image.modules.last(), Some(&place));
        assert!(contains(&mut image.archive, "the module"));
        assert_ne!(inode(&with(None)), inode(&image));
        std::fs::write(&module, b"a newer module").unwrap();
        assert_ne!(inode(&with(Some(module.clone()))), inode(&image));
        std::fs::remove_file(&module).unwrap();
        let missing = Recipe {
            kerf: Some(module),
            ..recipe()
        };
        assert!(missing.image(cache.path()).is_err());
    }

    #[test]
    fn the_configuration_follows_at_an_aligned_place() {
        let dir = tempfile::tempdir().unwrap();
        let (base, boot) = (dir.path().join("base"), dir.path().join("boot"));
        std::fs::write(&base, b"12345").unwrap();
        let mut base = File::open(&base).unwrap();
        let out = File::create(&boot).unwrap();
        with_configuration(&mut base, b"{\"generation\": 7}", out).unwrap();
        let bytes = std::fs::read(&boot).unwrap();
        assert_eq!(&bytes[..8], b"12345\0\0\0");
        assert_eq!(&bytes[8..14], b"070701");
        let mut boot = File::open(&boot).unwrap();
        assert!(contains(&mut boot, "etc/kmorph/agent.json\0"));
        assert!(contains(&mut boot, "{\"generation\": 7}"));
    }
}
