//! `[multikernel]`: where the kernel's files are, and how its instances are reached.

use std::path::PathBuf;

use kmorph_backends::multikernel::{self, HostMemory, Layout, Vsock};
use serde::{Deserialize, Serialize};

/// The multikernel backend. Read once, at the daemon's start.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Multikernel {
    pub(crate) root: PathBuf,
    pub(crate) lock: PathBuf,
    pub(crate) records: PathBuf,
    pub(crate) cid_offset: u32,
    pub(crate) vsock_option: u16,
    pub(crate) vsock_sockets: Option<PathBuf>,
    pub(crate) layout: LayoutSource,
    pub(crate) iomem: PathBuf,
    pub(crate) kcore: PathBuf,
    pub(crate) modules: Option<PathBuf>,
}

/// How kmorph ensures that a kernel image lays out shared memory like the host's kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LayoutSource {
    #[default]
    Compared,
    Assumed,
}

impl Default for Multikernel {
    fn default() -> Self {
        let HostMemory { iomem, kcore } = HostMemory::default();
        Self {
            root: multikernel::ROOT.into(),
            lock: multikernel::LOCK.into(),
            records: multikernel::RECORDS.into(),
            cid_offset: 0,
            vsock_option: multikernel::VSOCK_OPTION,
            vsock_sockets: None,
            layout: LayoutSource::default(),
            iomem,
            kcore,
            modules: None,
        }
    }
}

impl Multikernel {
    /// Its paths, each with its key.
    pub(super) fn paths(&self) -> [(&'static str, Option<&PathBuf>); 7] {
        [
            ("multikernel.root", Some(&self.root)),
            ("multikernel.lock", Some(&self.lock)),
            ("multikernel.records", Some(&self.records)),
            ("multikernel.vsock_sockets", self.vsock_sockets.as_ref()),
            ("multikernel.iomem", Some(&self.iomem)),
            ("multikernel.kcore", Some(&self.kcore)),
            ("multikernel.modules", self.modules.as_ref()),
        ]
    }

    /// The files through which an instance's memory is read.
    pub(crate) fn memory(&self) -> HostMemory {
        HostMemory {
            iomem: self.iomem.clone(),
            kcore: self.kcore.clone(),
        }
    }

    /// How kmorph ensures the layout of a kernel image.
    pub(crate) fn layout(&self) -> Layout {
        match self.layout {
            LayoutSource::Compared => Layout::compared(),
            LayoutSource::Assumed => Layout::Assumed,
        }
    }

    /// How instances are reached.
    pub(crate) fn vsock(&self) -> Vsock {
        match &self.vsock_sockets {
            Some(directory) => Vsock::Sockets {
                directory: directory.clone(),
            },
            None => Vsock::Kernel {
                cid_offset: self.cid_offset,
                option: (self.vsock_option > 0).then(|| i32::from(self.vsock_option)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::File;

    #[test]
    fn vsock_is_chosen_by_its_option_unless_that_is_zero() {
        let vsock = |text: &str| {
            let file: File = toml::from_str(&format!("[multikernel]\n{text}")).unwrap();
            file.multikernel.vsock()
        };
        let kernel = |cid_offset, option| Vsock::Kernel { cid_offset, option };
        assert_eq!(vsock(""), kernel(0, Some(9)));
        assert_eq!(vsock("vsock_option = 0\ncid_offset = 2"), kernel(2, None));
        let directory = "/run/x".into();
        assert_eq!(
            vsock("vsock_sockets = \"/run/x\""),
            Vsock::Sockets { directory }
        );
        let error = toml::from_str::<File>("[multikernel]\nvsock_option = -1").unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
