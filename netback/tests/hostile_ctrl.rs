//! What a hostile guest can do with the control ring. Single requests are tried in src/ctrl/tests.rs.
//!
//! Rows of the checklist:
//!
//! | row | test |
//! |---|---|
//! | 1, 2 producer too far ahead, or backwards | `a_producer_that_cannot_be_ends_the_device` |
//! | 3 request or table changed after the check | `keys_and_tables_change_while_they_are_read` |
//! | 4, 5 indices and responses overwritten | `the_guest_scribbles_over_responses` |
//! | 6, 7, 10 ring or channel that cannot be had | `control_rings_that_cannot_be_had` |
//! | 11 event storm | `xsa_332_a_storm_on_the_control_channel` |
//! | 12 ring grant revoked | `the_grant_of_the_ring_is_revoked` |
//! | 58 offset and length that overflow, keys of any length, foreign pages | `xsa_270_offsets_and_lengths_that_overflow`, `keys_and_tables_in_pages_of_others` |
//!
//! Advisories: 270, 332 by name.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::frames::{V6, tcp4, tcp6, udp4};
use common::{PATIENCE, QUEUES, Scene, Vif, during, receive, until};
use hypervisor::emu::RawEntry;
use hypervisor::{DomId, GrantAccess, PAGE_SIZE};
use netback::abi::{CtrlRequest, Extra, ctrl_status, ctrl_type, hash_type};
use netback::front::{ControlRing, Options};
use netback::hash::{ALL_TYPES, Addresses, Algorithm, Flow, HashSettings};
use ring::layout::{HEADER, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use xenstore_client::Store;
use xenstore_client::xenbus::State;

use ctrl_type::*;

const OK: u32 = ctrl_status::SUCCESS;
const INVALID: u32 = ctrl_status::INVALID_PARAMETER;
const OVERFLOW: u32 = ctrl_status::BUFFER_OVERFLOW;

fn options() -> Options {
    Options { control: true, queues: QUEUES, ..Options::default() }
}

fn control(vif: &mut Vif) -> &mut ControlRing {
    vif.control.as_mut().expect("a control ring")
}

fn status(vif: &mut Vif, kind: u16, data: [u32; 3]) -> u32 {
    control(vif).ask(kind, data).unwrap().status
}

/// Sets hashing up as an honest guest does, with a key of `key`.
fn hashing(vif: &mut Vif, key: &[u8]) -> HashSettings {
    assert_eq!(status(vif, SET_HASH_ALGORITHM, [1, 0, 0]), OK);
    assert_eq!(status(vif, SET_HASH_FLAGS, [ALL_TYPES, 0, 0]), OK);
    assert_eq!(control(vif).set_key(key).unwrap().status, OK);
    let mut settings = HashSettings::default();
    settings.set_algorithm(Algorithm::Toeplitz);
    assert!(settings.set_types(ALL_TYPES));
    settings.set_key(key);
    settings
}

fn flow4(tcp_ports: Option<(u16, u16)>) -> Flow {
    let addresses = Addresses::V4 { source: Ipv4Addr::new(10, 0, 0, 2), destination: Ipv4Addr::new(10, 0, 0, 1) };
    Flow { addresses, tcp_ports }
}

/// The control ring answers, and frames go both ways: on every queue, which is the kernel's choice while nothing is
/// hashed.
fn works(vif: &mut Vif) {
    assert_eq!(control(vif).ask(GET_HASH_MAPPING_SIZE, [0; 3]).unwrap().data, 128);
    assert_eq!(status(vif, SET_HASH_ALGORITHM, [0; 3]), OK);
    vif.works();
}

/// Waits for a frame on whatever queue.
fn receive_anywhere(vif: &mut Vif) -> Vec<u8> {
    let mut frame = Vec::new();
    until("a frame on some queue", || {
        vif.queues.iter_mut().any(|queue| {
            queue.pump().unwrap();
            queue.rx.receive_bytes(&mut frame).unwrap().is_some()
        })
    });
    frame
}

#[test]
fn frames_come_with_the_hash_that_was_asked_for() {
    let (scene, mut vif) = Scene::connected(&options());
    let key: Vec<u8> = (1..=40).collect();
    let settings = hashing(&mut vif, &key);
    let ports = Some((0x1234, 80));
    let v6 = Addresses::V6 { source: Ipv6Addr::from(V6[0]), destination: Ipv6Addr::from(V6[1]) };
    for (frame, flow) in
        [(tcp4(100), flow4(ports)), (udp4(100), flow4(None)), (tcp6(100), Flow { addresses: v6, tcp_ports: ports })]
    {
        let expected = settings.hash(&flow).unwrap();
        vif.end().send(&frame);
        let queue = settings.queue(expected.value, QUEUES);
        let (bytes, meta) = receive(&mut vif.queues[queue as usize]);
        assert_eq!(bytes, frame);
        let hash = Extra::Hash { kind: expected.kind, algorithm: 1, value: expected.value };
        assert_eq!(meta.hash, Some(hash), "{flow:?}");
    }
    // Only what was asked for; and nothing once it is off, or after the guest has come back.
    assert_eq!(status(&mut vif, SET_HASH_FLAGS, [hash_type::IPV6, 0, 0]), OK);
    vif.end().send(&tcp4(100));
    assert_eq!(receive(vif.queue()).1.hash, None);
    assert_eq!(status(&mut vif, SET_HASH_FLAGS, [ALL_TYPES, 0, 0]), OK);
    vif.close();
    let mut vif = scene.connect(&options());
    assert_eq!(control(&mut vif).ask(GET_HASH_FLAGS, [0; 3]).unwrap().status, ctrl_status::NOT_SUPPORTED);
    vif.end().send(&tcp4(100));
    assert_eq!(receive(vif.queue()).1.hash, None);
    scene.close(vif);
}

#[test]
fn a_producer_that_cannot_be_ends_the_device() {
    for prod in [4 + 129, 1 << 31, u32::MAX, 0] {
        let (mut scene, mut vif) = Scene::connected(&options());
        (0..4).for_each(|_| assert_eq!(status(&mut vif, GET_HASH_MAPPING_SIZE, [0; 3]), OK));
        let control = control(&mut vif);
        control.ring_memory().atomic_u32(REQ_PROD).store(prod, Ordering::SeqCst);
        control.channel().notify().unwrap();
        scene.gave_up("control ring");
        scene.neighbour_works();
        until("unmapping", || scene.mapped() == 0);
        vif.close();
        let mut vif = scene.connect(&options());
        works(&mut vif);
        scene.close(vif);
    }
}

#[test]
fn the_guest_scribbles_over_responses() {
    let (scene, mut vif) = Scene::connected(&options());
    let control = control(&mut vif);
    for round in 0..300u32 {
        for slot in 0..128 {
            control.ring_memory().write_record(HEADER + slot * 16, &[0xff; 16]);
        }
        let set = |index, value| control.ring_memory().atomic_u32(index).store(value, Ordering::SeqCst);
        set(RSP_PROD, 0x7777_7777);
        set(REQ_EVENT, round.wrapping_mul(0x0101_0101));
        set(RSP_EVENT, round);
        control.raw_request(&CtrlRequest { id: round as u16, kind: 99, data: [round; 3] }.encode());
        control.publish().unwrap();
        control.channel().notify().unwrap();
        let came = || control.ring_memory().atomic_u32(RSP_PROD).load(Ordering::SeqCst) == round + 1;
        until("an answer", came);
        let response = control.response(PATIENCE).unwrap();
        assert_eq!((response.id, response.kind, response.status), (round as u16, 99, ctrl_status::NOT_SUPPORTED));
    }
    works(&mut vif);
    scene.close(vif);
}

#[test]
fn xsa_270_offsets_and_lengths_that_overflow() {
    let (mut scene, mut vif) = Scene::connected(&options());
    let gref = control(&mut vif).page().refs[0].0;
    let settings = hashing(&mut vif, &[7; 40]);
    // As a table: queue 0 everywhere.
    control(&mut vif).page().memory.zero(0, PAGE_SIZE);
    assert_eq!(status(&mut vif, SET_HASH_MAPPING_SIZE, [128, 0, 0]), OK);
    let mut edges = vec![0, 1, 2, 40, 41, 127, 128, 129, 1023, 1024, 1025, 4096];
    edges.extend((2..32).flat_map(|bit| [1u32 << bit, (1 << bit) - 1]));
    edges.extend([u32::MAX, u32::MAX - 1, u32::MAX - 127, u32::MAX / 4, u32::MAX / 4 + 1]);
    for &len in &edges {
        for &offset in &edges {
            let expected = match (len, u64::from(len) + u64::from(offset)) {
                (129.., _) => OVERFLOW,
                (_, 129..) => INVALID,
                _ => OK,
            };
            assert_eq!(status(&mut vif, SET_HASH_MAPPING, [gref, len, offset]), expected, "{len} at {offset}");
        }
        let expected = if len <= 128 { OK } else { INVALID };
        assert_eq!(status(&mut vif, SET_HASH_MAPPING_SIZE, [len, 0, 0]), expected);
        assert_eq!(status(&mut vif, SET_HASH_MAPPING_SIZE, [128, 0, 0]), OK);
        if len > 40 {
            // One of 40 bytes or less would be taken.
            assert_eq!(status(&mut vif, SET_HASH_KEY, [gref, len, 0]), OVERFLOW, "a key of {len} bytes");
        }
    }
    // Queues that there are not.
    for queue in [QUEUES, QUEUES + 1, 1 << 31, u32::MAX] {
        assert_eq!(control(&mut vif).set_mapping(0, &[0, 1, queue]).unwrap().status, INVALID);
    }
    // The key is what it was.
    vif.end().send(&tcp4(100));
    let value = settings.hash(&flow4(Some((0x1234, 80)))).unwrap().value;
    assert_eq!(receive(vif.queue()).1.hash, Some(Extra::Hash { kind: 1, algorithm: 1, value }));
    works(&mut vif);
    scene.neighbour_works();
    scene.close(vif);
}

#[test]
fn keys_and_tables_in_pages_of_others() {
    let (scene, mut vif) = Scene::connected(&options());
    assert_eq!(status(&mut vif, SET_HASH_MAPPING_SIZE, [4, 0, 0]), OK);
    let frame = scene.hostile.alloc_pages(1).unwrap();
    let good = RawEntry::granting(frame, DomId(0), GrantAccess::ReadWrite);
    let grant = |entry| {
        let gref = scene.hostile.grant(frame, DomId(0), GrantAccess::ReadWrite).unwrap();
        scene.hostile.write_entry(gref, entry);
        gref.0
    };
    for gref in [
        0,
        u32::MAX,
        scene.hostile.entries(),
        grant(RawEntry::default()),
        grant(RawEntry { domid: 77, ..good }),
        grant(RawEntry { frame: u32::MAX, ..good }),
        grant(RawEntry { flags: 2, ..good }),
    ] {
        assert_eq!(status(&mut vif, SET_HASH_KEY, [gref, 40, 0]), INVALID, "{gref}");
        assert_eq!(status(&mut vif, SET_HASH_MAPPING, [gref, 4, 0]), INVALID, "{gref}");
    }
    works(&mut vif);
    scene.close(vif);
}

/// A table changes while it is being read, and the queues change hands as fast as the guest can ask: whatever was
/// checked is used, no frame is lost, and nobody panics.
#[test]
fn keys_and_tables_change_while_they_are_read() {
    let (mut scene, mut vif) = Scene::connected(&options());
    let gref = control(&mut vif).page().refs[0];
    let place = scene.hostile.read_entry(gref).unwrap().frame as usize * PAGE_SIZE;
    let memory = scene.hostile.memory().clone();
    hashing(&mut vif, &[1; 40]);
    let mut round = 0u32;
    let scribble = || {
        round = round.wrapping_add(1);
        let entry = if round.is_multiple_of(3) { u32::MAX } else { round % QUEUES };
        memory.write_record(place + (round as usize % 128) * 4, &entry.to_le_bytes());
    };
    during(scribble, || {
        for step in 0..2000u32 {
            assert_eq!(status(&mut vif, SET_HASH_MAPPING_SIZE, [step % 129, 0, 0]), OK);
            let mapped = status(&mut vif, SET_HASH_MAPPING, [gref.0, step % 129, 0]);
            assert!([OK, INVALID].contains(&mapped));
            assert_eq!(status(&mut vif, SET_HASH_KEY, [gref.0, step % 41, 0]), OK);
            if step % 20 == 0 {
                vif.end().send(&tcp4(100));
                assert_eq!(receive_anywhere(&mut vif), tcp4(100));
            }
        }
    });
    works(&mut vif);
    scene.neighbour_works();
    scene.close(vif);
}

#[test]
fn the_grant_of_the_ring_is_revoked() {
    let (scene, mut vif) = Scene::connected(&options());
    let gref = scene.store().read_str(&format!("{}/ctrl-ring-ref", scene.front_path())).unwrap();
    let gref = hypervisor::GrantRef(gref.parse().unwrap());
    let good = scene.hostile.read_entry(gref).unwrap();
    for entry in [RawEntry::default(), RawEntry { frame: u32::MAX, ..good }, RawEntry { domid: 9, ..good }] {
        scene.hostile.write_entry(gref, entry);
        works(&mut vif);
    }
    scene.hostile.write_entry(gref, good);
    scene.close(vif);
}

#[test]
fn control_rings_that_cannot_be_had() {
    let scene = Scene::new();
    scene.attach();
    let (rings, first) = scene.rings(3);
    let (_, second) = scene.rings(1);
    let keys = |gref: String, port: String| {
        vec![
            ("request-rx-copy", "1".to_owned()),
            ("tx-ring-ref", rings.refs[0].to_string()),
            ("rx-ring-ref", rings.refs[1].to_string()),
            ("event-channel", first.port().to_string()),
            ("ctrl-ring-ref", gref),
            ("event-channel-ctrl", port),
        ]
    };
    let (good_ref, good_port) = (rings.refs[2].to_string(), second.port().to_string());
    for gref in ["0", "4294967295", "4000"] {
        scene.refused(&keys(gref.to_owned(), good_port.clone()), "mapping the control ring");
    }
    for gref in ["", "-1", "4294967296", "abc"] {
        scene.refused(&keys(gref.to_owned(), good_port.clone()), "ctrl-ring-ref");
    }
    for gref in &rings.refs[..2] {
        scene.refused(&keys(gref.to_string(), good_port.clone()), "named for two rings");
    }
    for port in ["0", "1000", "4294967295"] {
        scene.refused(&keys(good_ref.clone(), port.to_owned()), "binding the event channel");
    }
    scene.refused(&keys(good_ref.clone(), first.port().to_string()), "named twice");
    scene.refused(&keys(good_ref, String::new()), "event-channel-ctrl");
    let mut vif = scene.connect(&options());
    works(&mut vif);
    scene.close(vif);
}

/// A guest that rings the control channel without pause, and one that asks without pause: its other queues work, its
/// neighbour works, and its interface can be taken away.
#[test]
fn xsa_332_a_storm_on_the_control_channel() {
    let (mut scene, mut vif) = Scene::connected(&options());
    let mut control = vif.control.take().unwrap();
    let bell = &mut control;
    during(
        move || bell.channel().notify().unwrap(),
        || {
            for _ in 0..30 {
                vif.works();
                scene.neighbour_works();
            }
        },
    );
    // Now with requests behind each event. The ring belongs to the flood; the test looks from outside.
    let asked = std::sync::atomic::AtomicU64::new(0);
    let flood = || {
        control.raw_request(&CtrlRequest { id: 1, kind: 99, data: [0; 3] }.encode());
        control.publish().unwrap();
        control.channel().notify().unwrap();
        // Every answer that has come by now frees a slot.
        for left in (0..120).rev() {
            if control.response(Duration::ZERO).is_ok() {
                asked.fetch_add(1, Ordering::Relaxed);
                control.raw_request(&CtrlRequest { id: left, kind: 99, data: [0; 3] }.encode());
                control.publish().unwrap();
            }
        }
        // The last of them.
        while control.response(Duration::from_millis(1)).is_ok() {}
    };
    during(flood, || {
        for _ in 0..30 {
            vif.works();
            scene.neighbour_works();
        }
    });
    assert!(asked.load(Ordering::Relaxed) > 0);
    vif.control = Some(control);
    works(&mut vif);
    scene.close(vif);
}

/// The control ring is never empty: the guest looks which requests are being answered, and has made new ones before the
/// last of them is. Frames go both ways all the same, and the device can be taken away.
#[test]
fn a_control_ring_that_is_never_empty() {
    let (mut scene, mut vif) = Scene::connected(&Options { queues: 1, ..options() });
    let gref = scene.store().read_str(&format!("{}/ctrl-ring-ref", scene.front_path())).unwrap();
    let ring =
        scene.hostile.read_entry(hypervisor::GrantRef(gref.parse().unwrap())).unwrap().frame as usize * PAGE_SIZE;
    let memory = scene.hostile.memory().clone();
    let mut control = vif.control.take().unwrap();
    let bell = &mut control;
    // The second word of a request of zeros, where the answer has its status.
    let word = |index: u32| ring + HEADER + (index % 128) as usize * 16 + 4;
    let mut answered = 0u32;
    memory.atomic_u32(ring + REQ_PROD).store(128, Ordering::SeqCst);
    bell.channel().notify().unwrap();
    let flood = move || {
        if memory.atomic_u32(word(answered + 63)).load(Ordering::SeqCst) != 0 {
            (0..64).for_each(|at| memory.atomic_u32(word(answered + at)).store(0, Ordering::SeqCst));
            answered += 64;
            memory.atomic_u32(ring + REQ_PROD).store(answered + 128, Ordering::SeqCst);
        }
        // Should the backend have been faster, and sleep, it is woken.
        if memory.atomic_u32(ring + RSP_PROD).load(Ordering::SeqCst) == answered + 128 {
            bell.channel().notify().unwrap();
        }
    };
    during(flood, || {
        for _ in 0..20 {
            vif.works();
            scene.neighbour_works();
        }
        scene.say("5");
        scene.wait_state(&[State::Closing, State::Closed]);
        scene.say("6");
        until("unmapping", || scene.mapped() == 0);
        scene.neighbour_works();
    });
    vif.control = Some(control);
    vif.close();
    let mut vif = scene.connect(&options());
    works(&mut vif);
    scene.close(vif);
}
