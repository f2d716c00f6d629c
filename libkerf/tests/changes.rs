//! The state after a valid overlay is valid as well.

#![allow(clippy::unwrap_used, reason = "tests")]

use libkerf::check::{self, Context};
use libkerf::dts;
use libkerf::overlay::{State, Status};

const GIB: u64 = 1 << 30;

/// Returns the state of `system.dts`: web does not run, db runs; each has 256 MiB of the pool's 3 GiB.
fn state() -> State {
    let tree = dts::read(include_str!("trees/system.dts")).unwrap();
    let (system, report) = check::system(&tree, Context::default());
    assert!(report.is_valid(), "{report}");
    State::new(system).with_status("db", Status::Active)
}

fn after(fragments: &str) -> State {
    let state = state();
    let source =
        format!("/dts-v1/; / {{ compatible = \"linux,multikernel-overlay\"; {fragments} }};");
    let (overlay, report) = check::overlay(&dts::read(&source).unwrap(), Some(&state));
    assert!(report.is_valid(), "{report}");
    state.apply(&overlay).unwrap()
}

fn pool_gets(bytes: u64) -> String {
    format!(
        "fragment@0 {{ target-path = \"/resources\"; __overlay__ {{ memory-add {{ memory@0 {{ size = /bits/ 64 <{bytes:#x}>; }}; }}; }}; }};"
    )
}

/// Adds memory to an instance. If the instance does not run, the kernel chooses the place and ignores the base.
fn instance_gets(name: &str, base: u64, bytes: u64) -> String {
    format!(
        "fragment@1 {{ target-path = \"/instances/{name}\"; __overlay__ {{ memory-add {{ memory@0 {{ reg = /bits/ 64 <{base:#x} {bytes:#x}>; }}; }}; }}; }};"
    )
}

#[test]
fn memory_that_the_pool_is_to_get_can_be_given_on_in_the_same_overlay() {
    let grown = after(&(pool_gets(16 * GIB) + &instance_gets("web", 0, 15 * GIB)));
    let report = grown.check();
    assert!(report.is_valid(), "{report}");
    assert_eq!(
        grown.system.resources.expected_bytes(),
        u128::from(19 * GIB)
    );
}

#[test]
fn memory_that_an_instance_gets_elsewhere_is_not_taken_for_more_of_its_first() {
    // The chunk of web's memory has no room for 2 GiB more; the kernel allocates them elsewhere.
    let grown = after(&instance_gets("web", 0, 2 * GIB));
    let report = grown.check();
    assert!(report.is_valid(), "{report}");
    let web = grown.system.instance("web").unwrap();
    assert_eq!(web.unplaced_bytes(), 2 * GIB);
    assert_eq!(
        libkerf::allocate::free_ranges(&grown),
        None,
        "not all is placed"
    );
}

#[test]
fn a_running_instance_has_the_very_range_that_it_was_given() {
    let grown = after(&instance_gets("db", 0x18_4000_0000, GIB / 2));
    let report = grown.check();
    assert!(report.is_valid(), "{report}");
    let db = grown.system.instance("db").unwrap();
    let expected = [(0x8_5000_0000, GIB / 4), (0x18_4000_0000, GIB / 2)];
    assert_eq!(db.regions, expected);
    assert_eq!(db.unplaced_bytes(), 0);
}
