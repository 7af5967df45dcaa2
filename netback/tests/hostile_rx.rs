//! What a hostile guest can do with what it receives: the receive ring, its pages, and how it says what it copes with.
//!
//! Rows of the checklist:
//!
//! | row | test |
//! |---|---|
//! | 1, 2, 55 producer too far ahead, or backwards | `a_producer_that_cannot_be_ends_the_device` |
//! | 4, 5 indices and responses overwritten | `the_guest_scribbles_over_responses` |
//! | 13 guest dies with frames on their way | `a_guest_is_destroyed_while_frames_flow` |
//! | 21 Reconfiguring | `headroom_is_left_and_may_change`, `a_headroom_that_comes_after_its_state` |
//! | 52 groups | `multicast_is_filtered_when_asked_for` |
//! | 53 one free slot | `xsa_392_one_free_slot_and_a_flood`, `xsa_392_a_real_tap_is_flooded` |
//! | 54 pages that cannot be written to | `pages_that_cannot_be_written_to` |
//!
//! Advisories: 392 by name.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use common::frames::{GUEST_MAC, PEER_MAC, TCP, ethernet, ipv4, pattern, plain, sum, tcp, tcp4, tcp6};
use common::taps::{ip, own_network};
use common::{Dom0, Scene, Vif, during, receive, until};
use hypervisor::emu::{READONLY, RawEntry};
use hypervisor::memory::Mapping;
use hypervisor::{DomId, GrantAccess, GrantRef, PAGE_SIZE};
use netback::abi::{Extra, GsoType, RxRequest, RxResponse};
use netback::device::Config;
use netback::front::{Checksum, Options};
use netback::vnet::{Offload, Partial};
use ring::layout::{HEADER, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use xenstore_client::Store;
use xenstore_client::xenbus::State;

fn set(ring: &Mapping, index: usize, value: u32) {
    ring.atomic_u32(index).store(value, Ordering::SeqCst);
}

fn get(ring: &Mapping, index: usize) -> u32 {
    ring.atomic_u32(index).load(Ordering::SeqCst)
}

/// Takes all pages out of the backend's hands: as many small frames as it has pages for.
fn exhaust(vif: &mut Vif) {
    let end = vif.end();
    let queue = vif.queue();
    let mut frame = Vec::new();
    while queue.rx.posted() > 0 {
        end.send(&plain(60, 0));
        until("a frame", || queue.rx.receive_bytes(&mut frame).unwrap().is_some());
    }
}

#[test]
fn a_producer_that_cannot_be_ends_the_device() {
    for prod in [256 + 2 + 2, 1 << 31, u32::MAX, 1] {
        let (mut scene, mut vif) = Scene::connected(&Options::default());
        vif.works();
        let queue = vif.queue();
        // 256 pages were posted, and a few again after what came.
        let honest = get(queue.rx.ring_memory(), REQ_PROD);
        assert!(honest >= 256);
        let prod = if prod == 260 { honest + 257 } else { prod };
        set(queue.rx.ring_memory(), REQ_PROD, prod);
        queue.rx_channel().notify().unwrap();
        // It is only looked at when something is to be received.
        vif.end().send(&plain(60, 1));
        scene.gave_up("receive ring");
        scene.neighbour_works();
        until("unmapping", || scene.mapped() == 0);
        vif.close();
        let mut vif = scene.connect(&Options::default());
        vif.works();
        scene.close(vif);
    }
}

#[test]
fn the_guest_scribbles_over_responses() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    exhaust(&mut vif);
    let queue = vif.queue();
    let mut frame = Vec::new();
    for round in 0..600u32 {
        let came = get(queue.rx.ring_memory(), RSP_PROD);
        // Everything that is the backend's to write: its producer, its wish, and all slots.
        for slot in 0..256 {
            queue.rx.ring_memory().write_record(HEADER + slot * 8, &[0xff; 8]);
        }
        queue.rx.refill(1);
        set(queue.rx.ring_memory(), RSP_PROD, 0x7777_7777);
        set(queue.rx.ring_memory(), REQ_EVENT, round.wrapping_mul(0x0101_0101));
        set(queue.rx.ring_memory(), RSP_EVENT, round);
        queue.publish().unwrap();
        queue.rx_channel().notify().unwrap();
        let sent = plain(100, round as u8);
        end.send(&sent);
        until("a frame", || get(queue.rx.ring_memory(), RSP_PROD) == came + 1);
        assert!(queue.rx.receive_bytes(&mut frame).unwrap().is_some());
        assert_eq!(frame, sent);
    }
    // Whether the backend sleeps now, and with what wish, is the guest's own fault.
    queue.pump().unwrap();
    queue.rx_channel().notify().unwrap();
    vif.works();
    scene.close(vif);
}

#[test]
fn a_guest_is_destroyed_while_frames_flow() {
    for queues in [1, 4] {
        let (scene, vif) = Scene::connected(&Options { queues, ..Options::default() });
        let ends: Vec<_> = (0..queues).map(|at| vif.end_of(at)).collect();
        let flood = move || {
            for end in &ends {
                // Gone with the device, in the end.
                end.send_if_there(&plain(9000, 1));
            }
        };
        during(flood, || scene.end());
        drop(vif);
    }
}

/// Every way in which a page cannot be written to: its response says so, its bytes stay as they were, and the frame
/// behind it arrives.
#[test]
fn pages_that_cannot_be_written_to() {
    let (mut scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    exhaust(&mut vif);
    let frame = scene.hostile.alloc_pages(1).unwrap();
    let place = frame as usize * PAGE_SIZE;
    scene.hostile.memory().copy_in(place, &[0xa5; PAGE_SIZE]);
    let good = RawEntry::granting(frame, DomId(0), GrantAccess::ReadWrite);
    let grant = |entry| {
        let gref = scene.hostile.grant(frame, DomId(0), GrantAccess::ReadWrite).unwrap();
        scene.hostile.write_entry(gref, entry);
        gref
    };
    let bad = [
        GrantRef(0),
        GrantRef(scene.hostile.entries()),
        GrantRef(u32::MAX),
        grant(RawEntry::default()),
        grant(RawEntry { flags: good.flags | READONLY, ..good }),
        grant(RawEntry { domid: 77, ..good }),
        grant(RawEntry { domid: scene.domid().0, ..good }),
        grant(RawEntry { frame: u32::MAX, ..good }),
        grant(RawEntry { flags: 2, ..good }),
    ];
    let fine = grant(good);
    let queue = vif.queue();
    let mut slot = [0; 8];
    let respond = |queue: &mut netback::front::Queue, slot: &mut [u8; 8]| {
        until("a response", || queue.rx.raw_slot(slot).unwrap());
        RxResponse::decode(slot)
    };
    for (id, &gref) in (0u16..).zip(&bad) {
        queue.rx.raw_request(&RxRequest { id, gref }.encode());
        queue.publish().unwrap();
        end.send(&plain(200, 1));
        let response = respond(queue, &mut slot);
        assert_eq!((response.id, response.status), (id, -1), "{gref:?}");
    }
    let mut bytes = [0; PAGE_SIZE];
    scene.hostile.memory().copy_out(place, &mut bytes);
    assert!(bytes == [0xa5; PAGE_SIZE], "a page that was not to be written to");
    // One bad page of three: the others of the same frame are as they should be.
    let sent = plain(9000, 7);
    for (id, gref) in [(100, fine), (101, bad[4]), (102, fine)] {
        queue.rx.raw_request(&RxRequest { id, gref }.encode());
    }
    queue.publish().unwrap();
    end.send(&sent);
    for (id, status) in [(100, 4096), (101, -1), (102, 9000 - 8192)] {
        let response = respond(queue, &mut slot);
        assert_eq!((response.id, response.status), (id, status));
    }
    let mut tail = vec![0; 9000 - 8192];
    scene.hostile.memory().copy_out(place, &mut tail);
    assert!(tail == sent[8192..]);
    // One page twice in one frame, and a page of the transmit pool, which is read-only.
    queue.rx.raw_request(&RxRequest { id: 1, gref: queue.tx.refs()[0] }.encode());
    queue.publish().unwrap();
    end.send(&plain(60, 1));
    assert_eq!(respond(queue, &mut slot).status, -1);
    // And then the honest pages again.
    queue.pump().unwrap();
    vif.works();
    scene.neighbour_works();
    scene.close(vif);
}

/// A guest that leaves one slot free makes every frame of two slots wait. Behind it half a mebibyte is gathered, and the
/// rest is lost.
#[test]
fn xsa_392_one_free_slot_and_a_flood() {
    for rx_notify in [true, false] {
        let (mut scene, mut vif) = Scene::connected(&Options { rx_notify, ..Options::default() });
        let end = vif.end();
        exhaust(&mut vif);
        let queue = vif.queue();
        assert_eq!(queue.rx.refill(1), 1);
        queue.publish().unwrap();
        let (resident, taken) = (resident(), std::cell::Cell::new(0u64));
        let large = plain(60_000, 1);
        let began = std::time::Instant::now();
        while began.elapsed() < Duration::from_millis(500) {
            if end.try_send(&Offload::NONE, &large) {
                taken.set(taken.get() + 1);
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let grown = self::resident().saturating_sub(resident);
        assert!(grown < 16 << 20, "{grown} bytes more are in use for {} frames of 60 kB", taken.get());
        scene.neighbour_works();
        // Once there are pages again, frames come again.
        let queue = vif.queue();
        queue.pump().unwrap();
        let mut frame = Vec::new();
        let last = plain(77, 9);
        let mut marked = false;
        until("the last frame", || {
            marked = marked || end.try_send(&Offload::NONE, &last);
            while queue.rx.receive_bytes(&mut frame).unwrap().is_some() {
                if frame == last {
                    return true;
                }
                assert!(frame == large || frame.len() == 60, "{} bytes", frame.len());
            }
            queue.pump().unwrap();
            false
        });
        vif.works();
        scene.close(vif);
    }
}

/// The same with a real tap, whose network sends without looking: the kernel keeps what the tap's queue holds, and drops
/// the rest.
#[test]
fn xsa_392_a_real_tap_is_flooded() {
    // A network of its own, which ends with this thread and those it starts.
    std::thread::spawn(|| {
        if !own_network("a flood through a real tap") {
            return;
        }
        let taps = common::taps::PairTaps::default();
        let dom0 = Dom0::with(Config { queues: 1, ..Config::default() }, taps, |serve| serve());
        let mut vif = dom0.connected("hostile", &Options::default());
        if ip(&format!("link set {} mtu 9000 up", vif.name)).is_none() {
            println!("NOT TESTED: a flood through a real tap: there is no program ip");
            return;
        }
        ip(&format!("addr add 10.0.0.1/24 dev {}", vif.name));
        ip(&format!("neigh add 10.0.0.2 lladdr 00:16:3e:5f:77:fd dev {}", vif.name));
        let socket = std::net::UdpSocket::bind("10.0.0.1:5000").unwrap();
        socket.set_nonblocking(true).unwrap();
        let send = |payload: &[u8]| socket.send_to(payload, "10.0.0.2:5001").is_ok();
        // All pages but one are used up.
        let mut frame = Vec::new();
        while vif.queue().rx.posted() > 1 {
            send(&[1; 100]);
            while vif.queue().rx.receive_bytes(&mut frame).unwrap().is_some() {}
        }
        let resident = resident();
        let large = pattern(8000, 1);
        for _ in 0..100_000 {
            send(&large);
        }
        let grown = self::resident().saturating_sub(resident);
        assert!(grown < 32 << 20, "{grown} bytes more are in use");
        // With pages frames come again, up to the very last.
        let last = pattern(333, 7);
        until("the last frame", || {
            vif.queue().pump().unwrap();
            send(&last);
            while vif.queue().rx.receive_bytes(&mut frame).unwrap().is_some() {
                if frame.ends_with(&last) {
                    return true;
                }
            }
            false
        });
        let domid = hypervisor::Guest::domid(&*vif.guest);
        vif.close();
        assert_eq!(dom0.mapped(domid), 0);
    })
    .join()
    .unwrap();
}

/// Bytes of this process that are in memory.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// A frame of two slots waits for a second page for as long as the drain time, and then it is dropped, so that a frame
/// that fits gets the page.
#[test]
fn a_frame_that_never_gets_its_pages_is_dropped() {
    let (scene, mut vif) = Scene::connected(&Options { rx_notify: false, ..Options::default() });
    let end = vif.end();
    exhaust(&mut vif);
    let queue = vif.queue();
    assert_eq!(queue.rx.refill(1), 1);
    queue.publish().unwrap();
    end.send(&plain(5000, 1));
    let small = plain(60, 2);
    end.send(&small);
    let mut frame = Vec::new();
    until("the small frame", || {
        // The guest may post whatever it likes meanwhile, as long as it is not enough for the large one.
        queue.rx.receive_bytes(&mut frame).unwrap().is_some()
    });
    assert_eq!(frame, small);
    queue.pump().unwrap();
    vif.works();
    scene.close(vif);
}

/// What a guest does not cope with is done for it: no blank checksum, no GSO, no second slot goes to one that did not
/// say that it takes them.
#[test]
fn a_guest_gets_nothing_that_it_did_not_ask_for() {
    let full = |segment: Vec<u8>| ethernet(GUEST_MAC, PEER_MAC, 0x0800, &ipv4(TCP, &segment));
    let blank = tcp4(1000);
    let whole = {
        let pseudo = [&[10, 0, 0, 2, 10, 0, 0, 1][..], &[0, TCP], &1020u16.to_be_bytes()].concat();
        let sum = !sum(&[&pseudo, &tcp(0, &pattern(1000, 4))]);
        let mut frame = blank.clone();
        frame[50..52].copy_from_slice(&sum.to_be_bytes());
        frame
    };
    let partial = Offload { partial: Some(Partial { start: 34, offset: 16 }), headers: 54, ..Offload::NONE };
    let gso4 = Offload { gso: Some((GsoType::TcpV4, 1000)), ..partial };
    // All of it.
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    end.send_as(&partial, &blank);
    let (frame, meta) = receive(vif.queue());
    assert_eq!((frame, meta.checksum, meta.gso), (blank.clone(), Checksum::Blank, None));
    let large = tcp4(20_000);
    end.send_as(&gso4, &large);
    let (frame, meta) = receive(vif.queue());
    assert!(frame == large);
    assert_eq!((meta.checksum, meta.gso), (Checksum::Blank, Some((GsoType::TcpV4, 1000))));
    let large = tcp6(20_000);
    let gso6 = Offload {
        partial: Some(Partial { start: 54, offset: 16 }),
        headers: 74,
        gso: Some((GsoType::TcpV6, 1000)),
        ..Offload::NONE
    };
    end.send_as(&gso6, &large);
    let (frame, meta) = receive(vif.queue());
    assert!(frame == large);
    assert_eq!((meta.checksum, meta.gso), (Checksum::Blank, Some((GsoType::TcpV6, 1000))));
    scene.close(vif);
    // No blank checksums.
    let (scene, mut vif) = Scene::connected(&Options { csum_v4: false, csum_v6: false, ..Options::default() });
    let end = vif.end();
    end.send_as(&partial, &blank);
    let (frame, meta) = receive(vif.queue());
    assert_eq!(frame, whole);
    assert_eq!((meta.checksum, meta.gso), (Checksum::Validated, None));
    scene.close(vif);
    // No GSO: it is cut.
    for options in [
        Options { gso_v4: false, gso_v6: false, ..Options::default() },
        Options { sg: false, ..Options::default() },
        Options { csum_v4: false, csum_v6: false, ..Options::default() },
    ] {
        let (scene, mut vif) = Scene::connected(&options);
        let end = vif.end();
        end.send_as(&gso4, &full(tcp(0, &pattern(3500, 1))));
        let mut payload = Vec::new();
        for len in [1000, 1000, 1000, 500] {
            let (frame, meta) = receive(vif.queue());
            assert_eq!((frame.len(), meta.gso), (54 + len, None), "{options:?}");
            assert_ne!(meta.checksum, Checksum::Blank);
            // The checksum is right: with it the sum over everything is all ones.
            let pseudo = [&frame[26..34], &[0, TCP], &(20 + len as u16).to_be_bytes()].concat();
            assert_eq!(sum(&[&pseudo, &frame[34..]]), 0xffff, "{options:?}");
            payload.extend_from_slice(&frame[54..]);
        }
        assert!(payload == pattern(3500, 1));
        scene.close(vif);
    }
    // One slot: what does not fit is dropped, what fits comes.
    let (scene, mut vif) = Scene::connected(&Options { sg: false, ..Options::default() });
    let end = vif.end();
    end.send(&plain(4097, 1));
    end.send(&plain(4096, 2));
    assert_eq!(receive(vif.queue()).0, plain(4096, 2));
    scene.close(vif);
}

/// Room before each frame, and a guest that changes its mind as fast as it can.
#[test]
fn headroom_is_left_and_may_change() {
    let (mut scene, mut vif) = Scene::connected(&Options { headroom: Some(256), ..Options::default() });
    let end = vif.end();
    for len in [60, 3840, 3841, 9000] {
        end.send(&plain(len, 1));
        let (frame, meta) = receive(vif.queue());
        assert!(frame == plain(len, 1), "{len}");
        assert_eq!(meta.headroom, Some(256));
    }
    for headroom in [0, 1, 2048, 17, 256] {
        vif.front.set_headroom(headroom).unwrap();
        until("the new headroom", || {
            end.send(&plain(9000, 1));
            let (frame, meta) = receive(vif.queue());
            assert!(frame == plain(9000, 1), "{headroom}");
            meta.headroom == (headroom > 0).then_some(headroom)
        });
    }
    // A flood of states and values (row 21), garbage last: that one ends the device.
    let (store, front) = (scene.store(), scene.front_path());
    for round in 0..200 {
        store.write(&format!("{front}/xdp-headroom"), &(round % 2048).to_string()).unwrap();
        store.write(&format!("{front}/state"), ["7", "4"][round % 2]).unwrap();
    }
    store.write(&format!("{front}/state"), "4").unwrap();
    scene.neighbour_works();
    end.send(&plain(9000, 1));
    assert!(receive(vif.queue()).0 == plain(9000, 1));
    store.write(&format!("{front}/xdp-headroom"), "32767").unwrap();
    store.write(&format!("{front}/state"), "7").unwrap();
    scene.gave_up("xdp-headroom");
    scene.close(vif);
}

/// Linux' netfront writes state 7 before it writes the key, so a backend may have answered 8 by then: the key counts
/// whenever it comes.
#[test]
fn a_headroom_that_comes_after_its_state() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let (store, front) = (scene.store(), scene.front_path());
    for headroom in [256u16, 0, 128] {
        scene.say("7");
        scene.wait_state(&[State::Reconfigured]);
        store.write(&format!("{front}/xdp-headroom"), &headroom.to_string()).unwrap();
        scene.say("4");
        until("the new headroom", || {
            end.send(&plain(9000, 1));
            let (frame, meta) = receive(vif.queue());
            assert!(frame == plain(9000, 1), "{headroom}");
            meta.headroom == (headroom > 0).then_some(headroom)
        });
        scene.wait_state(&[State::Connected]);
    }
    scene.close(vif);
}

/// Groups that were not joined are not delivered; everything else is.
#[test]
fn multicast_is_filtered_when_asked_for() {
    let (scene, mut vif) = Scene::connected(&Options { multicast: true, ..Options::default() });
    let end = vif.end();
    let group = |last: u8| [0x01, 0x00, 0x5e, 0, 0, last];
    let to = |mac: [u8; 6]| ethernet(mac, PEER_MAC, 0x88b5, &pattern(50, mac[5]));
    let join = |vif: &mut Vif, mac, wanted, fine: u64| {
        let before = vif.queue().tx.sent();
        assert!(vif.queue().tx.send_group(mac, wanted));
        vif.queue().publish().unwrap();
        until("an answer", || {
            vif.queue().tx.reap().unwrap();
            let now = vif.queue().tx.sent();
            now.okay + now.error > before.okay + before.error
        });
        assert_eq!(vif.queue().tx.sent().okay - before.okay, fine, "{mac:?}");
    };
    join(&mut vif, group(1), true, 1);
    // Row 52: a station, an unknown one to leave, more than there may be.
    join(&mut vif, GUEST_MAC, true, 0);
    join(&mut vif, [0; 6], true, 0);
    join(&mut vif, group(200), false, 1);
    for last in 2..=64 {
        join(&mut vif, group(last), true, 1);
    }
    for last in 65..=255 {
        join(&mut vif, group(last), true, 0);
    }
    join(&mut vif, group(64), false, 1);
    join(&mut vif, group(65), true, 1);
    for (mac, wanted) in [
        (group(1), true),
        (group(64), false),
        (group(65), true),
        (group(66), false),
        ([0x33, 0x33, 0, 0, 0, 1], false),
        ([0xff; 6], true),
        (GUEST_MAC, true),
    ] {
        end.send(&to(mac));
        if wanted {
            assert_eq!(receive(vif.queue()).0, to(mac));
        }
    }
    vif.works();
    // Off and on again while connected.
    vif.front.set_multicast(false).unwrap();
    let mut frame = Vec::new();
    until("a frame to a group that was not joined", || {
        end.send(&to(group(99)));
        let came = vif.queue().rx.receive_bytes(&mut frame).unwrap().is_some();
        vif.queue().pump().unwrap();
        came
    });
    scene.close(vif);
}

/// The hash of a frame goes with it, once the guest has asked for it (see also hostile_ctrl.rs).
#[test]
fn no_hash_without_a_wish() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    end.send(&tcp4(100));
    let (_, meta) = receive(vif.queue());
    assert!(!matches!(meta.hash, Some(Extra::Hash { .. })));
    scene.close(vif);
}
