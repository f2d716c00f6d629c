//! Kernel images: any bytes are refused or yield a release that can be shown. One reader serves both ways to ask: what it
//! says of a sound image is the same.

#![no_main]

use std::path::Path;

use kmorph_backends::kernel_image::KernelImage;
use libkerf::image::Kind;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let parsed = KernelImage::parse(Path::new("vmlinuz"), data);
    if let Ok(image) = &parsed {
        let release = image.release();
        assert!(release.starts_with(|first: char| first.is_ascii_digit()));
        assert!(release.bytes().all(|byte| byte.is_ascii_graphic()));
        assert!(release.len() < 256);
        assert_eq!(image.sha256().len(), 64);
    }
    let version = libkerf::image::version(data);
    if let Ok(image) = &parsed {
        assert!(matches!(libkerf::image::kind(data), Kind::BzImage { .. }));
        assert!(
            version
                .as_ref()
                .is_some_and(|text| text.contains(image.release()))
        );
    }
    if let Some(version) = version {
        assert!(!version.is_empty() && !version.contains('\0'));
    }
});
