//! Device trees, overlays and resources of multikernel Linux, as `kerf` and its kernel read them.
//!
//! The crate reads, writes and checks trees, and plans changes. It starts no thread and is independent of kmorph's
//! daemon and protocol, so that any program for multikernel instances can use it.
//!
//! * [`tree`] is a device tree in memory, [`dtb`] its flattened form, [`dts`] its source form, [`kerf_text`] the text
//!   form of kerf 0.1.
//! * [`model`] is the meaning of trees, [`check`] finds their errors.
//! * [`overlay`] describes changes and their effect in the kernel; [`allocate`] chooses resources.
//! * [`kernel`] accesses the kernel's files, [`record`] kerf's records of loaded kernels, and [`image`] kernel images.
//!   [`btf`] checks that two kernels agree on the memory that they share. [`machine`] describes the hardware.

#![deny(unsafe_code)]

pub mod allocate;
pub mod btf;
pub mod check;
pub mod dtb;
pub mod dts;
pub mod image;
pub mod kerf_text;
pub mod kernel;
pub mod machine;
pub mod model;
pub mod overlay;
pub mod record;
pub mod tree;
