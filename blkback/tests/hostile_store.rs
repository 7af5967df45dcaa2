//! What a hostile guest can do in XenStore.
//!
//! Rows of the checklist of what a hostile frontend can do:
//!
//! | row | test |
//! |---|---|
//! | 6 ring-ref bogus, foreign, self | `ring_refs_that_cannot_be_mapped` |
//! | 7 one ring-ref for two pages or queues | `one_page_named_twice` |
//! | 8 ring-page-order | `ring_page_orders_that_were_not_offered` |
//! | 9 multi-queue-num-queues | `numbers_of_queues_that_were_not_offered` |
//! | 10 event channel | `event_channels_that_cannot_be_bound` |
//! | 15 states flip fast | `xsa_350_states_flip_faster_than_anybody_looks` |
//! | 16 state is no state | `states_that_do_not_exist` |
//! | 17 floods, huge values | `xsa_349_a_flood_of_keys_and_states`, `values_that_are_no_values` |
//! | 18 frontend directory deleted | `the_frontend_directory_is_deleted` |
//! | 19 `frontend`, `backend` point elsewhere | `links_that_point_elsewhere` |
//! | 20 keys rewritten after connect | `keys_rewritten_after_connecting` |
//! | 21 Reconfiguring | netback's; here 7 and 8 only count as serving: `xsa_350_states_flip_faster_than_anybody_looks` |
//! | 22 protocol unknown | `protocols_that_do_not_exist` |

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use blkback::abi::op;
use blkback::front::{Frontend, Options};
use common::scene::{Scene, direct, during, whole, works};
use common::{XVDA, until};
use hypervisor::{DomId, GrantAccess, GrantRef, Guest};
use xenstore_client::Store;
use xenstore_client::xenbus::{State, toolstack};

type Keys<'a> = Vec<(&'a str, String)>;

/// A scene with an attached disk, and keys that would be accepted.
fn scene() -> (Scene, Keys<'static>) {
    let scene = Scene::new();
    scene.attach("w");
    let (ring, channel) = scene.rings(1);
    let keys = vec![
        ("ring-ref", ring.refs[0].to_string()),
        ("event-channel", channel.port().to_string()),
        ("protocol", "x86_64-abi".to_owned()),
    ];
    // The tests need only the numbers; both live as long as the domain.
    std::mem::forget((ring, channel));
    (scene, keys)
}

fn with<'a>(keys: &Keys<'a>, key: &'a str, value: impl ToString) -> Keys<'a> {
    let mut keys: Keys<'a> = keys.iter().filter(|(name, _)| *name != key).cloned().collect();
    keys.push((key, value.to_string()));
    keys
}

/// After all that was refused an honest driver connects.
fn recovers(scene: Scene) {
    let mut disk = scene.connect(&Options::default());
    works(disk.queue());
    scene.close(disk);
}

#[test]
fn ring_refs_that_cannot_be_mapped() {
    let (scene, keys) = scene();
    let frame = scene.hostile.alloc_pages(1).unwrap();
    let grant = |to, access| scene.hostile.grant(frame, to, access).unwrap();
    let revoked = grant(DomId(0), GrantAccess::ReadWrite);
    scene.hostile.revoke(revoked).unwrap();
    for gref in [
        GrantRef(0),
        GrantRef(u32::MAX),
        GrantRef(scene.hostile.entries()),
        revoked,
        grant(DomId(77), GrantAccess::ReadWrite),
        grant(scene.domid(), GrantAccess::ReadWrite),
        grant(DomId::SELF, GrantAccess::ReadWrite),
        grant(DomId(0), GrantAccess::ReadOnly),
    ] {
        scene.refused(&with(&keys, "ring-ref", gref), "mapping the ring");
    }
    for text in ["", "-1", "4294967296", "abc", "0x10", " 8"] {
        scene.refused(&with(&keys, "ring-ref", text), "ring-ref");
    }
    scene.refused(&keys[1..], "ring-ref is missing");
    recovers(scene);
}

/// One good page of several is not enough, and is not kept.
#[test]
fn half_a_ring() {
    let (scene, keys) = scene();
    let keys: Keys<'_> = vec![
        ("ring-page-order", "1".to_owned()),
        ("ring-ref0", keys[0].1.clone()),
        ("ring-ref1", "4000".to_owned()),
        keys[1].clone(),
    ];
    scene.refused(&keys, "mapping the ring");
    scene.refused(&[&keys[..2], &keys[3..]].concat(), "ring-ref1 is missing");
    recovers(scene);
}

#[test]
fn one_page_named_twice() {
    let (scene, keys) = scene();
    let (gref, port) = (keys[0].1.clone(), keys[1].1.clone());
    let two_pages: Keys<'_> = vec![
        ("ring-page-order", "1".to_owned()),
        ("ring-ref0", gref.clone()),
        ("ring-ref1", gref.clone()),
        ("event-channel", port.clone()),
    ];
    scene.refused(&two_pages, "two pages");
    let (_ring, other) = scene.rings(1);
    let two_queues: Keys<'_> = vec![
        ("multi-queue-num-queues", "2".to_owned()),
        ("queue-0/ring-ref", gref.clone()),
        ("queue-0/event-channel", port),
        ("queue-1/ring-ref", gref),
        ("queue-1/event-channel", other.port().to_string()),
    ];
    scene.refused(&two_queues, "two pages");
    recovers(scene);
}

#[test]
fn ring_page_orders_that_were_not_offered() {
    let (scene, keys) = scene();
    for order in ["5", "32", "31", "-1", "text", "", "4294967296", "4 "] {
        scene.refused(&with(&keys, "ring-page-order", order), "ring-page-order");
    }
    for pages in ["0", "3", "32", "-1"] {
        scene.refused(&with(&keys, "num-ring-pages", pages), "ring-pa");
    }
    recovers(scene);
}

#[test]
fn numbers_of_queues_that_were_not_offered() {
    let (scene, keys) = scene();
    for queues in ["0", "5", "4294967296", "18446744073709551616", "-1", "two"] {
        scene.refused(&with(&keys, "multi-queue-num-queues", queues), "multi-queue-num-queues");
    }
    // Two queues are announced, and only the keys of one are there.
    scene.refused(&with(&keys, "multi-queue-num-queues", 2), "queue-0/ring-ref is missing");
    let second_missing: Keys<'_> = vec![
        ("multi-queue-num-queues", "2".to_owned()),
        ("queue-0/ring-ref", keys[0].1.clone()),
        ("queue-0/event-channel", keys[1].1.clone()),
        ("queue-1/ring-ref", "4000".to_owned()),
        ("queue-1/event-channel", "99".to_owned()),
    ];
    // The first queue's ring was mapped by then, and must be let go of.
    scene.refused(&second_missing, "mapping the ring");
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
    // Offered to somebody else.
    let theirs = scene.hostile.alloc_unbound(DomId(77)).unwrap();
    scene.refused(&with(&keys, "event-channel", theirs.port()), "offered to domain 77");
    // In use by the guest's other disk, which does not notice.
    let image = scene.dom0.image("other.img", 1 << 20);
    scene.dom0.attach(&scene.hostile, &format!("{},raw,xvdb,w", image.display())).unwrap();
    let mut other = Frontend::connect(scene.hostile.clone(), XVDA + 16, &Options::default()).unwrap();
    let mut queues = other.take_queues();
    assert_eq!(scene.offer(&with(&keys, "event-channel", queues[0].channel().port())), State::Closing);
    scene.gave_up("bound already");
    works(&mut queues[0]);
    scene.store().rm(&format!("{}/event-channel", scene.front_path())).unwrap();
    scene.reset();
    // In use by two queues of one disk.
    let (ring, _) = scene.rings(1);
    let twice: Keys<'_> = vec![
        ("multi-queue-num-queues", "2".to_owned()),
        ("queue-0/ring-ref", keys[0].1.clone()),
        ("queue-0/event-channel", keys[1].1.clone()),
        ("queue-1/ring-ref", ring.refs[0].to_string()),
        ("queue-1/event-channel", keys[1].1.clone()),
    ];
    assert_eq!(scene.offer(&twice), State::Closing);
    scene.gave_up("named for two queues");
    for name in ["multi-queue-num-queues", "queue-0", "queue-1", "ring-ref"] {
        scene.store().rm_if_exists(&format!("{}/{name}", scene.front_path())).unwrap();
    }
    scene.reset();
    works(&mut queues[0]);
    other.close(queues).unwrap();
    recovers(scene);
}

#[test]
fn protocols_that_do_not_exist() {
    let (scene, keys) = scene();
    for protocol in ["", "vax-abi", "X86_64-ABI", "x86_64-abi "] {
        scene.refused(&with(&keys, "protocol", protocol), "unknown protocol");
    }
    recovers(scene);
}

#[test]
fn values_that_are_no_values() {
    let (scene, keys) = scene();
    scene.refused(&with(&keys, "ring-ref", "7".repeat(1500)), "longer than");
    scene.refused(&with(&keys, "feature-persistent", "yes"), "feature-persistent");
    // A zero byte, and bytes that are not text.
    scene.refused(&with(&keys, "event-channel", "1\0"), "event-channel");
    scene.store().write_bytes(&format!("{}/protocol", scene.front_path()), b"\xff\xfe").unwrap();
    assert_eq!(scene.offer(&keys[..2]), State::Closing);
    scene.gave_up("not text");
    scene.store().rm(&format!("{}/protocol", scene.front_path())).unwrap();
    scene.reset();
    recovers(scene);
}

#[test]
fn states_that_do_not_exist() {
    let scene = Scene::new();
    scene.attach("w");
    // Before there is anything to lose they are waited out.
    for state in ["0", "9", "abc", "99", "", " 4", "4294967300"] {
        scene.say(state);
    }
    scene.say("1");
    for state in ["0", "9", "abc", "99", "", "04"] {
        let mut disk = scene.connect(&Options::default());
        works(disk.queue());
        scene.say(state);
        scene.gave_up("a state that does not exist");
        until("unmapping", || scene.mapped() == 0);
        disk.close();
        scene.say("1");
    }
    // No node at all.
    let disk = scene.connect(&Options::default());
    scene.store().rm(&format!("{}/state", scene.front_path())).unwrap();
    scene.wait_state(&[State::Closed]);
    assert_eq!(scene.mapped(), 0);
    scene.close(disk);
}

#[test]
fn the_frontend_directory_is_deleted() {
    // While it is connected, and while it is waited for.
    let (mut scene, mut disk) = Scene::connected("w", &Options::default());
    works(disk.queue());
    scene.dom0.store.rm(&scene.front_path()).unwrap();
    scene.wait_state(&[State::Closed]);
    assert_eq!(scene.mapped(), 0);
    scene.neighbour_works();
    scene.dom0.detach(&scene.hostile, "xvda");
    scene.attach("w");
    scene.dom0.store.rm(&scene.front_path()).unwrap();
    scene.wait_state(&[State::Closed]);
    scene.dom0.detach(&scene.hostile, "xvda");
    scene.attach("w");
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
        kind: "vbd",
        frontend_kind: "vbd",
        backend: DomId(0),
        frontend: scene.domid(),
        devid: XVDA,
    };
    let image = scene.image().display().to_string();
    for wrong in
        ["/local/domain/1/device/vbd/51712", "/local/domain/0", "device/vbd/51712", &format!("{home}/../1"), ""]
    {
        let keys = [("params", image.as_str()), ("mode", "w"), ("frontend", wrong)];
        toolstack::add_device(&scene.dom0.store, &device, &keys, &[]).unwrap();
        scene.gave_up("does not lie below");
        let none = || Ok(());
        toolstack::remove_device(&scene.dom0.store, &device, toolstack::DESTROY_TIMEOUT, false, none).unwrap();
    }
    scene.attach("w");
    let mut disk = scene.connect(&Options::default());
    let (store, front) = (scene.store(), scene.front_path());
    for elsewhere in ["/local/domain/0/backend/vbd/1/51712", "", "/nowhere"] {
        store.write(&format!("{front}/backend"), elsewhere).unwrap();
        store.write(&format!("{front}/backend-id"), "77").unwrap();
        works(disk.queue());
    }
    assert!(
        store.write(&format!("{backend}/frontend"), "/local/domain/1").is_err(),
        "our directory is not the guest's"
    );
    assert!(store.write(&format!("{backend}/params"), "/etc/shadow").is_err());
    scene.close(disk);
}

#[test]
fn keys_rewritten_after_connecting() {
    let (scene, mut disk) = Scene::connected("w", &Options { queues: 2, ..Options::default() });
    let (store, front) = (scene.store(), scene.front_path());
    for (key, value) in [
        ("ring-ref", "0"),
        ("queue-0/ring-ref", "4000"),
        ("queue-1/event-channel", "4000"),
        ("multi-queue-num-queues", "0"),
        ("ring-page-order", "32"),
        ("protocol", "vax-abi"),
        ("feature-persistent", "no"),
        ("state", "4"),
    ] {
        store.write(&format!("{front}/{key}"), value).unwrap();
        disk.queues.iter_mut().for_each(works);
    }
    assert_eq!(scene.back_state(), Some(State::Connected));
    scene.close(disk);
}

/// As much as the store lets a guest write, as fast as it can; meanwhile blkback serves others, new disks included.
#[test]
fn xsa_349_a_flood_of_keys_and_states() {
    let (mut scene, mut disk) = Scene::connected("w", &Options::default());
    let (store, front) = (scene.store(), scene.front_path());
    let newcomer = scene.dom0.guest("newcomer");
    let image = scene.dom0.image("newcomer.img", 1 << 20);
    let (huge, mut round) = ("x".repeat(1900), 0u32);
    let flood = || {
        round += 1;
        store.write(&format!("{front}/state"), "4").unwrap();
        // The store's quota of nodes is what ends this.
        let _ = store.write(&format!("{front}/ring-ref{}", round % 2000), &huge);
        let _ = store.write(&format!("{front}/queue-{}/ring-ref", round % 2000), "1");
    };
    during(flood, || {
        for _ in 0..20 {
            scene.neighbour_works();
            scene.dom0.attach(&newcomer, &format!("{},raw,xvdc,w", image.display())).unwrap();
            let mut front = Frontend::connect(newcomer.clone(), XVDA + 32, &Options::default()).unwrap();
            let mut queues = front.take_queues();
            works(&mut queues[0]);
            front.close(queues).unwrap();
            scene.dom0.detach(&newcomer, "xvdc");
        }
    });
    works(disk.queue());
    scene.close(disk);
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
    let full = (0..2000).position(|number| store.write(&format!("{front}/queue-{number}/ring-ref"), &huge).is_err());
    assert!(full.is_some_and(|keys| keys > 100), "the store's quota was reached after {full:?} keys");
    assert_eq!(scene.offer(&[]), State::Closing);
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
        for state in ["1", "3", "4", "5", "6", "3", "7", "8", "2", "0", "6"] {
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
    // The same with requests in the ring, each time of a new connection.
    for last in ["6", "1", "3", "5", "0"] {
        let mut disk = scene.connect(&Options::default());
        for id in 0..32 {
            let gref = disk.queue().data_refs()[id];
            let slot = direct(op::WRITE, id as u64, id as u64 * 8, &[whole(gref)]);
            disk.queue().submit_raw(&slot);
        }
        disk.queue().publish().unwrap();
        for state in ["5", "6", "1", "3", "4", last] {
            scene.say(state);
        }
        settle(&scene);
        scene.neighbour_works();
        drop(disk);
    }
    recovers(scene);
}

/// Lets the backend come to rest: closed, and waiting anew.
fn settle(scene: &Scene) {
    scene.say("6");
    until("rest", || scene.mapped() == 0 && scene.back_state() == Some(State::Closed));
    scene.say("1");
    scene.wait_state(&[State::InitWait]);
}
