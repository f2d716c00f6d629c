//! Kernel images: any bytes are refused or yield a release that can be shown.

#![no_main]

use std::path::Path;

use kmorph_backends::kernel_image::KernelImage;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(image) = KernelImage::parse(Path::new("vmlinuz"), data) {
        let release = image.release();
        assert!(release.starts_with(|first: char| first.is_ascii_digit()));
        assert!(release.bytes().all(|byte| byte.is_ascii_graphic()));
        assert!(release.len() < 256);
        assert_eq!(image.sha256().len(), 64);
    }
    let _ = libkerf::image::kind(data);
    if let Some(version) = libkerf::image::version(data) {
        assert!(!version.is_empty() && !version.contains('\0'));
    }
});
