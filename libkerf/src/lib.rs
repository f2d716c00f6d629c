//! Device trees, overlays and resources of multikernel Linux, as `kerf` and its kernel read them.
//!
//! The crate may read and write trees, judge them, and plan changes. It starts no thread and knows
//! neither kmorph's daemon nor its protocol: anything that handles multikernel instances can use it.
//!
//! * [`tree`] is a device tree in memory, [`dtb`] its flattened form, [`dts`] its source form,
//!   [`kerf_text`] the text form of kerf 0.1.
//! * [`model`] is what trees mean, [`check`] what is wrong with them.
//! * [`overlay`] is changes, and what the kernel would make of them; [`allocate`] chooses resources.
//! * [`kernel`] is the kernel's files, [`record`] kerf's notes of what is loaded, [`image`] kernel
//!   images, [`btf`] whether two kernels agree on the memory that they share, [`machine`] what a
//!   machine has.

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
