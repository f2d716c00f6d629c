//! The HELLO of both ends, for tests that do not depend on its contents.

use kmp_proto::message::{Channel, Hello, HelloFixed, PeerRole};
use kmp_proto::wire::VERSION;

pub(crate) fn hello(role: PeerRole) -> Hello {
    Hello {
        fixed: HelloFixed {
            version_min: VERSION,
            version_max: VERSION,
            role,
            channel: Channel::Control,
            flags: 0,
            generation: 1,
            boot_id: [7; 16],
            features: 0,
            session: 0,
            incarnation: 0,
        },
        instance: "web".to_owned(),
        kernel_release: "6.12.0".to_owned(),
        agent_version: "test".to_owned(),
        nonce: None,
        proof: None,
    }
}
