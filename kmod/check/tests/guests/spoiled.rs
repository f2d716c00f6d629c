//! A pair of guests whose words a third peer writes over: this process, which can write all of the memory.

use crate::guest::{Machine, Series};
use crate::{KERF, commands};

/// Both guests lose their link each time and come together again, with the generations that they have.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn a_pair_that_a_third_peer_spoiled_recovers() {
    for (a, b) in Series::pairs() {
        let machine = Machine::new(3);
        let serve = [KERF, "services", "say=serving", "forever"];
        let mut server = machine.guest(1, a, &commands(&serve));
        server.wait_for("KERF said serving");
        let mut client = machine.guest(
            2,
            b,
            &commands(&[
                KERF,
                "link=1",
                "talk=3",
                "say=linked",
                "until=1.lost.1",
                "link=1",
                "talk=3",
                "say=again",
                "until=1.lost.2",
                "link=1",
                "talk=3",
                "peers",
                "complaints",
            ]),
        );
        client.wait_for("KERF said linked");
        let generations = [1, 2].map(|peer| machine.region().peer(peer).generation);
        // The server is stopped in the meantime: a word that it writes itself repairs what was spoiled before its peer
        // has looked.
        server.stop();
        machine.spoil_ring(1, 2);
        machine.ring(2);
        client.wait_for("KERF ok until=1.lost.1");
        server.resume();
        client.wait_for("KERF said again");
        server.stop();
        machine.spoil_entry(1);
        machine.ring(2);
        client.wait_for("KERF ok until=1.lost.2");
        server.resume();
        client.wait_for("KERF done");
        assert_eq!(client.failures(), Vec::<String>::new(), "{b} to {a}");
        assert_eq!(server.failures(), Vec::<String>::new(), "{a}");
        let now = [1, 2].map(|peer| machine.region().peer(peer).generation);
        assert_eq!(now, generations, "{b} to {a}");
    }
}
