use super::*;
use crate::fence::{Confirmation, FenceMethod};

fn certificate(generation: u64) -> FenceCertificate {
    let order = FenceOrder::new(generation);
    order.confirm(FenceMethod::ProcessesKilled, Confirmation::ProcessesGone, 1)
}

fn tell(engine: &mut Engine, event: Event) {
    engine.handle(event, Instant::default());
}

fn drain(engine: &mut Engine) -> Vec<Action> {
    std::iter::from_fn(|| engine.poll_action()).collect()
}

#[test]
fn the_fence_comes_first_and_everything_else_after_its_certificate() {
    let mut engine = Engine::new(7, CapturePolicy::Off, Afterwards::Respawn);
    assert!(matches!(
        drain(&mut engine)[..],
        [Action::Fence(_), Action::NoticeSurvivors]
    ));
    tell(&mut engine, Event::Released);
    tell(&mut engine, Event::SuccessorHealthy { generation: 8 });
    tell(&mut engine, Event::Fenced(certificate(6)));
    assert!(
        drain(&mut engine).is_empty(),
        "nothing moves it but its own certificate"
    );
    tell(&mut engine, Event::Fenced(certificate(7)));
    assert!(matches!(drain(&mut engine)[..], [Action::Reclaim(_)]));
    tell(&mut engine, Event::Released);
    assert!(matches!(drain(&mut engine)[..], [Action::Respawn(_)]));
    tell(&mut engine, Event::SuccessorStarted);
    tell(&mut engine, Event::SuccessorHealthy { generation: 8 });
    let end = drain(&mut engine);
    assert_eq!(end[0], Action::Complete { new_generation: 8 });
    assert_eq!(end[1], Action::Finished(Outcome::Recovered));
    assert_eq!(engine.phase(), "done");
}

#[test]
fn an_unconfirmed_fence_is_tried_again_and_then_left_to_an_operator() {
    let mut engine = Engine::new(7, CapturePolicy::Off, Afterwards::Respawn);
    let mut orders = 0;
    loop {
        let actions = drain(&mut engine);
        orders += actions
            .iter()
            .filter(|a| matches!(a, Action::Fence(_)))
            .count();
        if let Some(Action::Finished(outcome)) = actions.last() {
            assert!(matches!(outcome, Outcome::OperatorActionNeeded(_)));
            break;
        }
        tell(&mut engine, Event::FenceUnconfirmed("still there".into()));
        if let Some(due) = engine.poll_timeout() {
            engine.handle(Event::Tick, due);
        }
    }
    assert_eq!(orders, FENCE_ATTEMPTS as usize);
}

#[test]
fn a_restarted_daemon_goes_on_with_the_certificate_it_finds() {
    let mut engine = Engine::resume_fenced(certificate(7), CapturePolicy::Off, Afterwards::Respawn);
    assert!(matches!(drain(&mut engine)[..], [Action::Reclaim(_)]));
    tell(&mut engine, Event::Released);
    tell(&mut engine, Event::NotStarted("no memory".into()));
    let end = drain(&mut engine);
    assert_eq!(end[1], Action::Complete { new_generation: 0 });
    let last = end.into_iter().next_back();
    assert!(matches!(
        last,
        Some(Action::Finished(Outcome::SuccessorFailed(_)))
    ));
}

#[test]
fn what_failed_too_often_is_fenced_and_rests() {
    let mut engine = Engine::new(7, CapturePolicy::Off, Afterwards::Quarantine);
    drain(&mut engine);
    tell(&mut engine, Event::Fenced(certificate(7)));
    assert!(matches!(drain(&mut engine)[..], [Action::Reclaim(_)]));
    tell(&mut engine, Event::Released);
    let end = drain(&mut engine);
    assert_eq!(end[0], Action::Complete { new_generation: 0 });
    assert_eq!(end[1], Action::Finished(Outcome::Quarantined));
}

#[test]
fn a_successor_that_is_not_wanted_any_more_is_started_to_its_end_and_then_given_up() {
    let mut engine = Engine::resume_fenced(certificate(7), CapturePolicy::Off, Afterwards::Respawn);
    tell(&mut engine, Event::Released);
    drain(&mut engine);
    tell(&mut engine, Event::SuccessorFailed("terminated".into()));
    assert!(drain(&mut engine).is_empty(), "its start is under way");
    tell(&mut engine, Event::SuccessorStarted);
    let end = drain(&mut engine);
    assert_eq!(end[0], Action::Complete { new_generation: 0 });
    let terminated = Outcome::SuccessorFailed("terminated".into());
    assert_eq!(end[1], Action::Finished(terminated));
}

#[test]
fn memory_is_captured_before_it_is_reclaimed() {
    let mut engine = Engine::new(7, CapturePolicy::On, Afterwards::Respawn);
    drain(&mut engine);
    tell(&mut engine, Event::Captured);
    tell(&mut engine, Event::Fenced(certificate(7)));
    assert!(matches!(drain(&mut engine)[..], [Action::Capture(_)]));
    tell(&mut engine, Event::Released);
    assert_eq!(engine.phase(), "capturing_vmcore");
    tell(&mut engine, Event::Captured);
    assert!(matches!(drain(&mut engine)[..], [Action::Reclaim(_)]));
}

#[test]
fn what_follows_without_a_vmcore_is_the_policys() {
    let failed = || Event::CaptureFailed("the disk is full".into());
    let mut engine = Engine::resume_fenced(certificate(7), CapturePolicy::On, Afterwards::Respawn);
    assert!(matches!(drain(&mut engine)[..], [Action::Capture(_)]));
    tell(&mut engine, failed());
    assert!(matches!(drain(&mut engine)[..], [Action::Reclaim(_)]));
    let mut engine =
        Engine::resume_fenced(certificate(7), CapturePolicy::Required, Afterwards::Respawn);
    drain(&mut engine);
    tell(&mut engine, failed());
    let end = drain(&mut engine);
    assert!(matches!(
        &end[..],
        [Action::Finished(Outcome::OperatorActionNeeded(why))] if why == "the disk is full"
    ));
}

#[test]
fn where_no_successor_is_wanted_any_more_none_is_started() {
    let mut engine = Engine::new(7, CapturePolicy::Off, Afterwards::Respawn);
    drain(&mut engine);
    tell(&mut engine, Event::SuccessorFailed("terminated".into()));
    tell(&mut engine, Event::Fenced(certificate(7)));
    tell(&mut engine, Event::Released);
    let end = drain(&mut engine);
    let terminated = Outcome::SuccessorFailed("terminated".into());
    assert!(matches!(end[0], Action::Reclaim(_)));
    assert_eq!(end[1], Action::Complete { new_generation: 0 });
    assert_eq!(end[2], Action::Finished(terminated));
}
