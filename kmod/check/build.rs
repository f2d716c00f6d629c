//! Compiles the module's portable files for user space. Undefined behaviour that the compiler can see at
//! run time ends the program.

fn main() {
    let files = ["../ring.c", "../link.c", "../kmp.c", "shim.c"];
    cc::Build::new()
        .files(files)
        .include("..")
        .std("gnu11")
        .opt_level(1)
        .extra_warnings(true)
        .warnings_into_errors(true)
        .flag("-Wno-sign-compare")
        .flag("-fsanitize=undefined")
        .flag("-fsanitize-undefined-trap-on-error")
        .compile("kerf");
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    for header in ["kerf_port.h", "layout.h", "ring.h", "link.h", "kmp.h"] {
        println!("cargo::rerun-if-changed=../{header}");
    }
    println!("cargo::rerun-if-changed=../../kerf-ring/golden/layout.def");
}
