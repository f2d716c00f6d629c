//! Neither the order to write a commit record nor the note that a record should exist allows SERVE.
use kmp_proto::morph::{Action, CommitOrder, Engine, Event, Morph, Serving};
use kmp_proto::time::Instant;

fn serve(order: CommitOrder) -> Action {
    Action::Serve(order)
}

fn resume(committed: bool) -> Engine {
    Engine::resume_committed(committed, Instant::default())
}

fn phase(order: CommitOrder) -> Morph<Serving> {
    Morph::<Serving>::committed(order)
}

fn event() -> Event {
    Event::RecordDurable(())
}

fn main() {}
