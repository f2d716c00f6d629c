//! Access control for changes.

use std::sync::{Arc, Mutex, PoisonError};

use kmorph_control_api::{ApiError, ErrorCode};
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};

/// The caller's ids, from the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// The access rule. Clones share the group, so that a reload changes it for all.
#[derive(Clone, Debug)]
pub struct Access {
    own_uid: u32,
    group: Arc<Mutex<Option<String>>>,
}

impl Access {
    /// Permits root, the user that this daemon runs as, and the members of `group`.
    pub fn new(group: Option<String>) -> Self {
        Self {
            own_uid: Uid::effective().as_raw(),
            group: Arc::new(Mutex::new(group)),
        }
    }

    /// Replaces the control group.
    pub fn set_group(&self, group: Option<String>) {
        *self.group.lock().unwrap_or_else(PoisonError::into_inner) = group;
    }

    fn group(&self) -> Option<String> {
        let group = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        group.clone()
    }

    /// Returns whether `caller` is root or the user this daemon runs as.
    pub(super) fn is_owner(&self, caller: &Caller) -> bool {
        caller.uid == 0 || caller.uid == self.own_uid
    }

    /// Checks whether `caller` may change things. Returns its uid.
    pub(super) fn check(&self, caller: Option<&Caller>) -> Result<u32, ApiError> {
        let Some(caller) = caller else {
            let text = "the kernel does not say who is calling";
            return Err(ApiError::new(ErrorCode::Forbidden, text));
        };
        if self.is_owner(caller) || self.is_member(caller) {
            return Ok(caller.uid);
        }
        let group = self.group();
        let group = group.as_deref().unwrap_or("(none configured)");
        let text = format!("uid {} may look, not change anything", caller.uid);
        Err(ApiError::new(ErrorCode::Forbidden, text)
            .hint(format!("call as root, or as a member of the group {group}")))
    }

    /// Returns whether `caller` is in the group. Reads the group each time, because membership may change while
    /// the daemon runs.
    pub(super) fn is_member(&self, caller: &Caller) -> bool {
        let Some(name) = self.group() else {
            return false;
        };
        let Ok(Some(group)) = Group::from_name(&name) else {
            return false;
        };
        if group.gid == Gid::from_raw(caller.gid) {
            return true;
        }
        let Ok(Some(user)) = User::from_uid(Uid::from_raw(caller.uid)) else {
            return false;
        };
        let Ok(user_name) = std::ffi::CString::new(user.name) else {
            return false;
        };
        getgrouplist(&user_name, user.gid).is_ok_and(|groups| groups.contains(&group.gid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(own_uid: u32, group: &str) -> Access {
        Access {
            own_uid,
            ..Access::new(Some(group.to_owned()))
        }
    }

    #[test]
    fn another_group_holds_for_all_who_share_the_rule() {
        let access = of(1234, "no-such-group");
        let shared = access.clone();
        let member = Caller {
            uid: 65_534,
            gid: 0,
        };
        assert!(shared.check(Some(&member)).is_err());
        access.set_group(Some("root".to_owned()));
        assert!(shared.check(Some(&member)).is_ok());
        access.set_group(None);
        assert!(shared.check(Some(&member)).is_err());
    }

    #[test]
    fn root_and_the_own_user_may_change_things_others_may_not() {
        let access = of(1234, "no-such-group");
        let caller = |uid| Caller { uid, gid: 99_999 };
        assert_eq!(access.check(Some(&caller(0))).unwrap(), 0);
        assert_eq!(access.check(Some(&caller(1234))).unwrap(), 1234);
        assert_eq!(
            access.check(Some(&caller(65_534))).unwrap_err().code,
            ErrorCode::Forbidden
        );
        assert_eq!(access.check(None).unwrap_err().code, ErrorCode::Forbidden);
    }

    #[test]
    fn members_of_the_control_group_may() {
        let access = of(1234, "root");
        assert!(
            access
                .check(Some(&Caller {
                    uid: 65_534,
                    gid: 0
                }))
                .is_ok()
        );
        assert!(
            access
                .check(Some(&Caller {
                    uid: 65_534,
                    gid: 65_534
                }))
                .is_err()
        );
    }
}
