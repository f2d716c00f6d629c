//! The conformance suite: tests the promises of the contract on every backend with real processes and real kernels.
//!
//! Each rule is one function in [`rules`]; each backend has a [`Ground`] on which the rules run. The tests for kernels
//! only (panic, memory to map) are below, and the tests for kernels beside the host's in [`beside`] and [`ownership`].
//!
//! The qemu backend requires the packages and kernels of `scripts/setup-tests`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod beside;
mod descendants;
mod ground;
mod lending;
mod ownership;
mod rules;

use kmorph_backends::contract::{ExitCause, Observation, REGISTERS};

use ground::Ground;
use kmorph_emulated_kernel::Generation;

/// Defines one test for each rule and ground. After the semicolon are rules about processes, for backends whose
/// instances are processes.
macro_rules! conformance {
    ($($rule:ident),* $(,)?; $($of_processes:ident),* $(,)?) => {
        conformance! { @on embedded = Ground::embedded(); $($rule)* $($of_processes)* }
        conformance! { @on embedded_uncontained = Ground::embedded_uncontained(); $($rule)* $($of_processes)* }
        conformance! { @on qemu = Ground::qemu(); $($rule)* $($of_processes)* }
        // Real kernels, reached over `kerf-vsock.ko`.
        conformance! { @on kerf_6_1 = Ground::kerf("6.1"); $($rule)* $($of_processes)* }
        conformance! { @on kerf_6_12 = Ground::kerf("6.12"); $($rule)* $($of_processes)* }
        // Kernels beside an emulated one; skipped if this machine cannot emulate a kernel.
        conformance! { @maybe multikernel = Ground::multikernel(Generation::Confirms); $($rule)* }
    };
    (@maybe $name:ident = $ground:expr; $($rule:ident)*) => {
        mod $name {
            use super::{Generation, Ground};
            $(#[tokio::test]
            async fn $rule() {
                if let Some(ground) = $ground {
                    super::rules::$rule(&ground).await;
                }
            })*
        }
    };
    (@on $name:ident = $ground:expr; $($rule:ident)*) => {
        mod $name {
            use super::Ground;
            $(#[tokio::test]
            async fn $rule() {
                super::rules::$rule(&$ground).await;
            })*
        }
    };
}

conformance!(
    a_spawned_instance_is_reached_and_outlives_its_daemon,
    a_placement_is_all_that_another_daemon_needs,
    an_end_is_seen_with_its_cause,
    a_stopped_instance_is_seen_and_can_be_fenced,
    a_frozen_instance_stands_still_until_it_is_resumed,
    it_ends_by_itself_when_it_is_asked_to,
    a_fence_is_confirmed_and_can_be_repeated,
    a_refused_spawn_leaves_nothing,
    a_published_port_reaches_the_workload,
    connections_that_are_given_up_do_no_harm,
    nothing_that_was_lent_is_nothing_to_take_back,
    a_placement_of_another_backend_is_refused_and_left_alone;
    threads_that_outlive_their_first_one_are_fenced,
    a_reused_pid_is_never_mistaken_for_the_instance,
    a_mark_behind_a_large_environment_is_found,
);

#[tokio::test]
async fn a_panic_is_told_as_one_and_leaves_the_memory_to_be_read() {
    let ground = Ground::qemu();
    let mut spec = ground.spec();
    spec.cmdline = "unknown_nmi_panic=1".to_owned();
    let placement = ground.spawn(spec).await;
    ground.answers(&placement).await;
    ground::inject_nmi(&placement);
    let cause = ground
        .in_time(ground.backend.ended(&placement), "the panic")
        .await;
    assert_eq!(cause, ExitCause::KernelPanicked);
    let seen = ground.backend.observe(&placement).await.unwrap();
    assert_eq!(seen, Observation::Ended(ExitCause::KernelPanicked));
    let ranges = ground.backend.memory_map(&placement).await.unwrap();
    let bytes: u64 = ranges.iter().map(|range| range.length).sum();
    assert_eq!(bytes, placement.memory_bytes);
    assert!(ground::holds(&ranges, b"Linux version 6."), "{ranges:?}");
    let registers = placement.run_dir.join(REGISTERS);
    assert!(ground.backend.save_registers(&placement).await.unwrap());
    assert!(std::fs::metadata(&registers).unwrap().len() > 4096);
    let proof = ground.fence(&placement).await;
    // The process that held the registers has ended.
    assert!(!ground.backend.save_registers(&placement).await.unwrap());
    let ranges = ground.backend.memory_map(&placement).await.unwrap();
    assert!(ground::holds(&ranges, b"Linux version 6."), "{ranges:?}");
    ground.backend.release(&placement, &proof).await.unwrap();
    let ranges = ground.backend.memory_map(&placement).await.unwrap();
    assert!(ranges.is_empty(), "{ranges:?}");
    assert!(!registers.exists());
}
