//! What a hostile guest can do in XenStore.
//!
//! Rows of the checklist:
//!
//! | row | test |
//! |---|---|
//! | 6 ring-ref bogus, foreign, self | `ring_refs_that_cannot_be_mapped` |
//! | 7 one ring-ref for two rings | `one_page_named_twice` |
//! | 8 ring-page-order | does not exist for network interfaces: every ring has one page; the key is never read |
//! | 9 multi-queue-num-queues | `numbers_of_queues_that_were_not_offered` |
//! | 10 event channel | `event_channels_that_cannot_be_bound` |
//! | 15 states flip fast | `xsa_350_states_flip_faster_than_anybody_looks` |
//! | 16 state is no state | `states_that_do_not_exist` |
//! | 17 floods, huge values | `xsa_349_a_flood_of_keys_and_states`, `a_directory_full_of_keys`, `values_that_are_no_values` |
//! | 18 frontend directory deleted | `the_frontend_directory_is_deleted` |
//! | 19 `frontend`, `backend` point elsewhere | `links_that_point_elsewhere` |
//! | 20 keys rewritten after connect | `keys_rewritten_after_connecting` |
//! | 21 Reconfiguring | hostile_rx.rs, `headroom_is_left_and_may_change`; here without rings: `xsa_350_states_flip_faster_than_anybody_looks` |
//! | 22 protocol unknown | does not exist for network interfaces: `keys_rewritten_after_connecting` writes one, and nobody looks |
//! | 59 mac malformed, handle absent | `addresses_that_are_none` |
//!
//! Advisories: 349, 350, 374 by name.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::frames::plain;
use common::{Scene, during, until};
use hypervisor::{DomId, GrantAccess, GrantRef, Guest};
use netback::front::{Meta, Options};
use xenstore_client::Store;
use xenstore_client::xenbus::{State, toolstack};

type Keys<'a> = Vec<(&'a str, String)>;

/// A scene with an attached interface, and keys that would be accepted.
fn scene() -> (Scene, Keys<'static>) {
    let scene = Scene::new();
    scene.attach();
    let (rings, channel) = scene.rings(2);
    let keys = vec![
        ("tx-ring-ref", rings.refs[0].to_string()),
        ("rx-ring-ref", rings.refs[1].to_string()),
        ("event-channel", channel.port().to_string()),
        ("request-rx-copy", "1".to_owned()),
        ("feature-rx-notify", "1".to_owned()),
    ];
    // The tests need only the numbers; both live as long as the domain.
    std::mem::forget((rings, channel));
    (scene, keys)
}

fn with<'a>(keys: &Keys<'a>, key: &'a str, value: impl ToString) -> Keys<'a> {
    let mut keys = without(keys, key);
    keys.push((key, value.to_string()));
    keys
}

fn without<'a>(keys: &Keys<'a>, key: &str) -> Keys<'a> {
    keys.iter().filter(|(name, _)| *name != key).cloned().collect()
}

/// After all that was refused an honest driver connects.
fn recovers(scene: Scene) {
    let mut vif = scene.connect(&Options::default());
    vif.works();
    scene.close(vif);
}

#[test]
fn ring_refs_that_cannot_be_mapped() {
    let (scene, keys) = scene();
    let frame = scene.hostile.alloc_pages(1).unwrap();
    let grant = |to, access| scene.hostile.grant(frame, to, access).unwrap();
    let revoked = grant(DomId(0), GrantAccess::ReadWrite);
    scene.hostile.revoke(revoked).unwrap();
    let bad = [
        GrantRef(0),
        GrantRef(u32::MAX),
        GrantRef(scene.hostile.entries()),
        revoked,
        grant(DomId(77), GrantAccess::ReadWrite),
        grant(scene.domid(), GrantAccess::ReadWrite),
        grant(DomId::SELF, GrantAccess::ReadWrite),
        grant(DomId(0), GrantAccess::ReadOnly),
    ];
    for (key, ring) in [("tx-ring-ref", "transmit"), ("rx-ring-ref", "receive")] {
        for gref in bad {
            scene.refused(&with(&keys, key, gref), &format!("mapping the {ring} ring"));
        }
        for text in ["", "-1", "4294967296", "abc", "0x10", " 8"] {
            scene.refused(&with(&keys, key, text), key);
        }
        scene.refused(&without(&keys, key), &format!("{key} is missing"));
    }
    recovers(scene);
}

#[test]
fn one_page_named_twice() {
    let (scene, keys) = scene();
    let (gref, port) = (keys[0].1.clone(), keys[2].1.clone());
    scene.refused(&with(&keys, "rx-ring-ref", &gref), "named for two rings");
    let (more, other) = scene.rings(3);
    let two_queues = |refs: [String; 4], ports: [String; 2]| -> Keys<'static> {
        let [tx0, rx0, tx1, rx1] = refs;
        let [port0, port1] = ports;
        vec![
            ("request-rx-copy", "1".to_owned()),
            ("multi-queue-num-queues", "2".to_owned()),
            ("queue-0/tx-ring-ref", tx0),
            ("queue-0/rx-ring-ref", rx0),
            ("queue-0/event-channel", port0),
            ("queue-1/tx-ring-ref", tx1),
            ("queue-1/rx-ring-ref", rx1),
            ("queue-1/event-channel", port1),
        ]
    };
    let [a, b, c] = [0, 1, 2].map(|at: usize| more.refs[at].to_string());
    let ports = [port.clone(), other.port().to_string()];
    for refs in [[&gref, &a, &b, &gref], [&gref, &a, &gref, &b], [&a, &gref, &b, &gref], [&a, &b, &c, &c]] {
        scene.refused(&two_queues(refs.map(Clone::clone), ports.clone()), "named for two rings");
    }
    let good = [gref, a, b, c];
    scene.refused(&two_queues(good, [port.clone(), port]), "named twice");
    recovers(scene);
}

#[test]
fn numbers_of_queues_that_were_not_offered() {
    let (scene, keys) = scene();
    for queues in ["0", "5", "4294967296", "18446744073709551616", "-1", "two", ""] {
        scene.refused(&with(&keys, "multi-queue-num-queues", queues), "multi-queue-num-queues");
    }
    // Two queues are announced, and only the keys of one are there.
    scene.refused(&with(&keys, "multi-queue-num-queues", 2), "queue-0/");
    recovers(scene);
}

/// The second queue cannot be built when the first one's rings are mapped and its thread is there: both are let go of,
/// and it does not matter how often.
#[test]
fn xsa_374_connecting_fails_half_way() {
    let (mut scene, keys) = scene();
    let (more, other) = scene.rings(2);
    let half = |broken: (&'static str, &str)| {
        let good: Keys<'static> = vec![
            ("request-rx-copy", "1".to_owned()),
            ("multi-queue-num-queues", "2".to_owned()),
            ("queue-0/tx-ring-ref", keys[0].1.clone()),
            ("queue-0/rx-ring-ref", keys[1].1.clone()),
            ("queue-0/event-channel", keys[2].1.clone()),
            ("queue-1/tx-ring-ref", more.refs[0].to_string()),
            ("queue-1/rx-ring-ref", more.refs[1].to_string()),
            ("queue-1/event-channel", other.port().to_string()),
        ];
        with(&good, broken.0, broken.1)
    };
    for round in 0..30 {
        scene.refused(&half(("queue-1/tx-ring-ref", "4000")), "mapping the transmit ring");
        scene.refused(&half(("queue-1/rx-ring-ref", "4001")), "mapping the receive ring");
        scene.refused(&half(("queue-1/event-channel", "999")), "binding the event channel");
        if round % 10 == 0 {
            scene.neighbour_works();
        }
    }
    // Nothing of all that is bound any more: the same port can be used.
    let state = scene.offer(&keys);
    assert_eq!(state, State::Connected, "{:?}", scene.error());
    scene.reset();
    recovers(scene);
}

#[test]
fn event_channels_that_cannot_be_bound() {
    let (scene, keys) = scene();
    for port in ["0", "1000", "4294967295"] {
        scene.refused(&with(&keys, "event-channel", port), "binding the event channel");
    }
    for text in ["", "-1", "4294967296", "port"] {
        scene.refused(&with(&keys, "event-channel", text), "event-channel");
    }
    scene.refused(&without(&keys, "event-channel"), "event-channel is missing");
    let good = keys[2].1.clone();
    let split = |tx: &str, rx: &str| {
        with(&with(&without(&keys, "event-channel"), "event-channel-tx", tx), "event-channel-rx", rx)
    };
    scene.refused(&split(&good, "1000"), "binding the event channel (rx)");
    scene.refused(&split("1000", &good), "binding the event channel (tx)");
    scene.refused(&split(&good, &good), "named twice");
    scene.refused(&with(&without(&keys, "event-channel"), "event-channel-tx", &good), "only one of them");
    // Offered to somebody else.
    let theirs = scene.hostile.alloc_unbound(DomId(77)).unwrap();
    scene.refused(&with(&keys, "event-channel", theirs.port()), "offered to domain 77");
    // In use by the guest's other interface, which does not notice.
    scene.dom0.attach(&scene.hostile, 1, &[]);
    let mut other = scene.dom0.connect(&scene.hostile, 1, &Options::default());
    let port = other.queues[0].tx_channel().port();
    assert_ne!(scene.offer(&with(&keys, "event-channel", port)), State::Connected);
    scene.gave_up("bound already");
    other.works();
    scene.store().rm(&format!("{}/event-channel", scene.front_path())).unwrap();
    scene.reset();
    other.works();
    other.close();
    recovers(scene);
}

#[test]
fn values_that_are_no_values() {
    let (scene, keys) = scene();
    scene.refused(&with(&keys, "tx-ring-ref", "7".repeat(1500)), "longer than");
    for key in [
        "feature-sg",
        "feature-gso-tcpv4",
        "feature-gso-tcpv6",
        "feature-no-csum-offload",
        "feature-ipv6-csum-offload",
        "feature-rx-notify",
        "request-multicast-control",
        "request-rx-copy",
        "xdp-headroom",
    ] {
        scene.refused(&with(&keys, key, "yes"), key);
    }
    for value in ["0", "2", ""] {
        let keys = with(&keys, "request-rx-copy", value);
        if scene.offer(&keys) == State::Connected {
            // Linux takes any number but 0 for yes.
            assert_eq!(value, "2");
            scene.reset();
        } else {
            scene.gave_up("request-rx-copy");
            scene.reset();
        }
    }
    scene.store().rm(&format!("{}/request-rx-copy", scene.front_path())).unwrap();
    scene.refused(&without(&keys, "request-rx-copy"), "request-rx-copy");
    for headroom in ["32767", "32768", "65536", "4294967295", "4096"] {
        scene.refused(&with(&keys, "xdp-headroom", headroom), "xdp-headroom");
    }
    // A zero byte, and bytes that are not text.
    scene.refused(&with(&keys, "event-channel", "1\0"), "event-channel");
    scene.store().write_bytes(&format!("{}/feature-sg", scene.front_path()), b"\xff\xfe").unwrap();
    assert_ne!(scene.offer(&keys), State::Connected);
    scene.gave_up("not text");
    scene.store().rm(&format!("{}/feature-sg", scene.front_path())).unwrap();
    scene.reset();
    recovers(scene);
}

#[test]
fn states_that_do_not_exist() {
    let scene = Scene::new();
    scene.attach();
    // Before there is anything to lose they are waited out.
    for state in ["0", "9", "abc", "99", "", " 4", "4294967300"] {
        scene.say(state);
    }
    scene.say("1");
    for state in ["0", "9", "abc", "99", "", "04"] {
        let mut vif = scene.connect(&Options::default());
        vif.works();
        scene.say(state);
        scene.gave_up("a state that does not exist");
        until("unmapping", || scene.mapped() == 0);
        vif.close();
    }
    // No node at all.
    let vif = scene.connect(&Options::default());
    scene.store().rm(&format!("{}/state", scene.front_path())).unwrap();
    scene.wait_state(&[State::Closed]);
    until("unmapping", || scene.mapped() == 0);
    scene.close(vif);
}

#[test]
fn the_frontend_directory_is_deleted() {
    // While it is connected, and while it is waited for.
    let (mut scene, mut vif) = Scene::connected(&Options::default());
    vif.works();
    scene.dom0.store.rm(&scene.front_path()).unwrap();
    scene.wait_state(&[State::Closed]);
    until("unmapping", || scene.mapped() == 0);
    scene.neighbour_works();
    scene.detach();
    scene.attach();
    scene.wait_state(&[State::InitWait]);
    scene.dom0.store.rm(&scene.front_path()).unwrap();
    scene.wait_state(&[State::Closed]);
    scene.detach();
    scene.attach();
    recovers(scene);
}

/// The toolstack's `frontend` must lie in the home of the frontend's domain; the guest's own `backend` is nobody's
/// business but its own.
#[test]
fn links_that_point_elsewhere() {
    let scene = Scene::new();
    let backend = scene.back_path();
    let home = scene.domid().home();
    let device = toolstack::DeviceAddress {
        kind: "vif",
        frontend_kind: "vif",
        backend: DomId(0),
        frontend: scene.domid(),
        devid: 0,
    };
    for wrong in ["/local/domain/1/device/vif/0", "/local/domain/0", "device/vif/0", &format!("{home}/../1"), ""] {
        let keys = [("hotplug-status", "connected"), ("frontend", wrong)];
        toolstack::add_device(&scene.dom0.store, &device, &keys, &[]).unwrap();
        scene.gave_up("does not lie below");
        let none = || Ok(());
        toolstack::remove_device(&scene.dom0.store, &device, toolstack::DESTROY_TIMEOUT, false, none).unwrap();
    }
    scene.attach();
    let mut vif = scene.connect(&Options::default());
    let (store, front) = (scene.store(), scene.front_path());
    for elsewhere in ["/local/domain/0/backend/vif/1/0", "", "/nowhere"] {
        store.write(&format!("{front}/backend"), elsewhere).unwrap();
        store.write(&format!("{front}/backend-id"), "77").unwrap();
        vif.works();
    }
    for (key, value) in [("frontend", "/local/domain/1"), ("rate", "1000000000,1"), ("mac", "00:00:00:00:00:01")] {
        assert!(store.write(&format!("{backend}/{key}"), value).is_err(), "our directory is not the guest's");
    }
    scene.close(vif);
}

#[test]
fn keys_rewritten_after_connecting() {
    let (scene, mut vif) = Scene::connected(&Options { queues: 2, control: true, ..Options::default() });
    let (store, front) = (scene.store(), scene.front_path());
    for (key, value) in [
        ("tx-ring-ref", "0"),
        ("queue-0/tx-ring-ref", "4000"),
        ("queue-1/rx-ring-ref", "4000"),
        ("queue-1/event-channel", "4000"),
        ("multi-queue-num-queues", "0"),
        ("ring-page-order", "32"),
        ("protocol", "vax-abi"),
        ("ctrl-ring-ref", "0"),
        ("request-rx-copy", "0"),
        ("feature-sg", "no"),
        ("feature-rx-notify", "0"),
        ("mac", "nonsense"),
        ("mtu", "-1"),
        ("state", "4"),
    ] {
        store.write(&format!("{front}/{key}"), value).unwrap();
        vif.works();
    }
    assert_eq!(scene.back_state(), Some(State::Connected));
    scene.close(vif);
}

/// The toolstack's `mac` must be one, because filters are made from it; the frontend's is its own affair. A missing
/// `handle` means nothing.
#[test]
fn addresses_that_are_none() {
    let mut scene = Scene::new();
    let device = toolstack::DeviceAddress {
        kind: "vif",
        frontend_kind: "vif",
        backend: DomId(0),
        frontend: scene.domid(),
        devid: 0,
    };
    for wrong in ["", "nonsense", "00:16:3e:5f:77", "00:16:3e:5f:77:fd:00", "00:16:3e:5f:77:xx", "0:16:3e:5f:77:fd"] {
        scene.dom0.attach(&scene.hostile, 0, &[("mac", wrong)]);
        scene.gave_up("mac");
        let none = || Ok(());
        toolstack::remove_device(&scene.dom0.store, &device, toolstack::DESTROY_TIMEOUT, false, none).unwrap();
    }
    scene.neighbour_works();
    let keys = [("hotplug-status", "connected")];
    toolstack::add_device(&scene.dom0.store, &device, &keys, &[("mac", "garbage")]).unwrap();
    recovers(scene);
}

/// As much as the store lets a guest write, as fast as it can; meanwhile netback serves others, new interfaces included.
#[test]
fn xsa_349_a_flood_of_keys_and_states() {
    let (mut scene, mut vif) = Scene::connected(&Options::default());
    let (store, front) = (scene.store(), scene.front_path());
    let newcomer = scene.dom0.guest("newcomer");
    let (huge, mut round) = ("x".repeat(1900), 0u32);
    let flood = || {
        round += 1;
        store.write(&format!("{front}/state"), "4").unwrap();
        store.write(&format!("{front}/request-multicast-control"), &(round % 2).to_string()).unwrap();
        // The store's quota of nodes is what ends this.
        let _ = store.write(&format!("{front}/queue-{}/tx-ring-ref", round % 2000), "1");
        let _ = store.write(&format!("{front}/feature-{}", round % 2000), &huge);
    };
    during(flood, || {
        for _ in 0..20 {
            scene.neighbour_works();
            scene.dom0.attach(&newcomer, 3, &[]);
            let mut new = scene.dom0.connect(&newcomer, 3, &Options::default());
            new.works();
            new.close();
            scene.dom0.detach(&newcomer, 3);
        }
    });
    vif.works();
    scene.close(vif);
}

/// A directory as full as the store allows, at the moment of connecting.
#[test]
fn a_directory_full_of_keys() {
    let (scene, keys) = scene();
    let (store, front) = (scene.store(), scene.front_path());
    for (key, value) in &keys {
        store.write(&format!("{front}/{key}"), value).unwrap();
    }
    let huge = "x".repeat(1500);
    let full = (0..2000).position(|number| store.write(&format!("{front}/queue-{number}/tx-ring-ref"), &huge).is_err());
    assert!(full.is_some_and(|keys| keys > 100), "the store's quota was reached after {full:?} keys");
    assert_ne!(scene.offer(&[]), State::Connected);
    scene.gave_up("longer than");
    for number in 0..2000 {
        let _ = store.rm_if_exists(&format!("{front}/queue-{number}"));
    }
    scene.reset();
    recovers(scene);
}

#[test]
fn xsa_350_states_flip_faster_than_anybody_looks() {
    let (mut scene, keys) = scene();
    let (store, front) = (scene.store(), scene.front_path());
    for (key, value) in &keys {
        store.write(&format!("{front}/{key}"), value).unwrap();
    }
    for round in 0..150 {
        for state in ["1", "3", "4", "5", "6", "4", "7", "8", "2", "0", "6"] {
            scene.say(state);
            // Sometimes long enough for the backend to have come half of the way.
            if round % 3 == 0 {
                scene.back_state();
            }
        }
        if round % 50 == 0 {
            scene.neighbour_works();
        }
    }
    settle(&scene);
    // The same with packets both ways, each time of a new connection.
    for last in ["6", "1", "4", "5", "0"] {
        let mut vif = scene.connect(&Options { queues: 3, ..Options::default() });
        for at in 0..3 {
            let end = vif.end_of(at);
            let queue = &mut vif.queues[at as usize];
            for round in 0..20 {
                assert!(queue.tx.send_bytes(&[&plain(3000, round)], &Meta::default()));
                end.send(&plain(3000, round));
            }
            queue.publish().unwrap();
        }
        for state in ["5", "6", "1", "4", "7", "4", last] {
            scene.say(state);
        }
        settle(&scene);
        scene.neighbour_works();
        drop(vif);
    }
    let mut vif = scene.connect(&Options::default());
    while vif.end().next(std::time::Duration::ZERO).is_some() {}
    vif.works();
    scene.close(vif);
}

/// Lets the backend come to rest: closed, and waiting anew.
fn settle(scene: &Scene) {
    scene.say("6");
    until("rest", || scene.mapped() == 0 && scene.back_state() == Some(State::Closed));
    scene.say("1");
    scene.wait_state(&[State::InitWait]);
}
