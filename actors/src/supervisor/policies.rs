//! Changes the policies of one or several instances: either all changes take effect or none.
//!
//! ```text
//! every name and value checked ─▶ one transaction in the journal ─▶ each instance told
//!       └▶ refused                        └▶ refused: nothing has changed
//! ```
//!
//! Changes run one at a time, so that the journal and the instances agree on the last one.

use std::collections::BTreeMap;

use crate::model::{Failure, FailureKind, Policy, PolicyPatch};
use actix::prelude::*;
use kmorph_backends::contract::BackendKind;

use super::Supervisor;
use crate::generation::journal_failure;
use crate::instance::{ApplyPolicy, GetPolicy, Instance};
use crate::model::capability::check_policy;
use crate::platform::journal::{Change, record};

/// Changes the policies of these instances. Returns the policies that are now in force.
#[derive(Debug, Message)]
#[rtype(result = "Result<BTreeMap<String, Policy>, Failure>")]
pub struct ChangePolicies(pub BTreeMap<String, PolicyPatch>);

impl Handler<ChangePolicies> for Supervisor {
    type Result = ResponseActFuture<Self, Result<BTreeMap<String, Policy>, Failure>>;

    fn handle(&mut self, change: ChangePolicies, _: &mut Self::Context) -> Self::Result {
        let found = change.0.into_iter().map(|(name, patch)| {
            let instance = self.find(&name)?;
            Ok((name, instance, patch))
        });
        let found: Result<Vec<_>, Failure> = found.collect();
        let (turn, journal) = (
            self.policy_turn.clone(),
            self.services.platform.journal.clone(),
        );
        let kind = self.services.backend().kind();
        let work = async move {
            let turn = turn.lock_owned().await;
            let planned = plan(kind, found?).await?;
            let row = |(name, policy): (&String, &Policy)| {
                Change::Policy(name.clone(), Box::new(policy.clone()))
            };
            let rows = planned.iter().map(row).collect();
            let written = record(&journal, rows).await;
            written.map_err(|e| journal_failure(&e))?;
            Ok((planned, turn))
        };
        // The actor spawns this: the change completes even if the caller no longer waits.
        Box::pin(work.into_actor(self).map(|written, act, _| {
            let (planned, _turn) = written?;
            for (name, policy) in &planned {
                // An instance whose actor is gone is restored from the journal, if at all.
                if let Ok(instance) = act.find(name) {
                    instance.do_send(ApplyPolicy(policy.clone()));
                }
            }
            Ok(planned)
        }))
    }
}

/// Computes the new policies.
async fn plan(
    kind: BackendKind,
    found: Vec<(String, Addr<Instance>, PolicyPatch)>,
) -> Result<BTreeMap<String, Policy>, Failure> {
    let mut planned = BTreeMap::new();
    for (name, instance, patch) in found {
        let replaced = |_| {
            let text = format!("the actor of {name} is being replaced");
            Failure::new(FailureKind::Busy, text).hint("try again in a moment")
        };
        let policy = instance.send(GetPolicy).await.map_err(replaced)?;
        let policy = policy.patched(&patch);
        check_policy(kind, &format!("{name}: "), &policy)?;
        planned.insert(name, policy);
    }
    Ok(planned)
}
