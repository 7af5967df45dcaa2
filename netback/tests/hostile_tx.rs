//! What a hostile guest can do with the transmit ring: indices, events, grants, and its own end.
//!
//! Rows of the checklist; hostile_packets.rs, hostile_offload.rs, hostile_rx.rs, hostile_ctrl.rs and hostile_store.rs have
//! the others.
//!
//! | row | test |
//! |---|---|
//! | 1 producer too far ahead | `a_producer_too_far_ahead_ends_the_device`, `xsa_39_a_garbage_ring_is_not_processed` |
//! | 2 producer moves backwards | `a_producer_that_moves_backwards_ends_the_device` |
//! | 3 request changed after the check | `requests_are_read_once`, `any_byte_of_both_rings` |
//! | 4 event indices garbage | `event_indices_are_only_wishes` |
//! | 5 responses overwritten | `the_guest_scribbles_over_responses` |
//! | 11 event storm | `xsa_332_an_event_storm_without_work` |
//! | 12 ring grant revoked | `the_grants_of_the_rings_are_revoked_or_changed` |
//! | 13 guest dies with packets in flight | `a_guest_is_destroyed_while_packets_flow` |
//! | 14 granted page ballooned out | does not apply: emulated guests have no paging, and grants that name no page fail for good (`bad_grants_in_a_batch`) |
//!
//! Advisories: 39, 90, 216, 332 by name.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::frames::{plain, tcp4};
use common::slots::{BLANK, EXTRA, answers, ask, chain, ends, gso, put, slot};
use common::{Scene, Vif, during, random, until, works};
use hypervisor::PAGE_SIZE;
use hypervisor::emu::{READONLY, RawEntry};
use hypervisor::memory::Mapping;
use netback::abi::{GsoType, TxRequest, status};
use netback::front::{Meta, Options, Queue};
use ring::layout::{HEADER, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use status::{ERROR, OKAY};
use xenstore_client::xenbus::State;

fn set(ring: &Mapping, index: usize, value: u32) {
    ring.atomic_u32(index).store(value, Ordering::SeqCst);
}

fn get(ring: &Mapping, index: usize) -> u32 {
    ring.atomic_u32(index).load(Ordering::SeqCst)
}

#[test]
fn a_producer_too_far_ahead_ends_the_device() {
    // An honest packet of one slot and one of two came before.
    for prod in [3 + 257, 1 << 31, u32::MAX] {
        ends("transmit ring", |queue| set(queue.tx.ring_memory(), REQ_PROD, prod));
    }
    // On any queue of several.
    let (scene, vif) = Scene::connected(&Options { queues: 3, ..Options::default() });
    set(vif.queues[2].tx.ring_memory(), REQ_PROD, 300);
    vif.queues[2].tx_channel().notify().unwrap();
    scene.gave_up("transmit ring");
    scene.close(vif);
}

#[test]
fn a_producer_that_moves_backwards_ends_the_device() {
    ends("transmit ring", |queue| set(queue.tx.ring_memory(), REQ_PROD, 1));
}

/// Slots full of garbage behind a producer that is too far ahead: not one of them is looked at.
#[test]
fn xsa_39_a_garbage_ring_is_not_processed() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let before = scene.counters().0;
    let queue = vif.queue();
    let frame = plain(100, 1);
    let (gref, offset) = put(queue, 0, 0, &frame);
    for at in 0..256 {
        let request = TxRequest { gref, offset, flags: 0, id: at, size: 100 };
        queue.tx.ring_memory().write_record(HEADER + usize::from(at) * 12, &request.encode());
    }
    set(queue.tx.ring_memory(), REQ_PROD, 257);
    queue.tx_channel().notify().unwrap();
    scene.gave_up("transmit ring");
    assert_eq!(scene.counters().0.since(&before).copies, 0, "nothing was copied");
    assert!(end.is_quiet(), "nothing was sent");
    assert_eq!(get(vif.queue().tx.ring_memory(), RSP_PROD), 0, "nothing was answered");
    scene.close(vif);
}

/// A rogue vif is disabled by several of its queues at once, in the middle of traffic both ways.
#[test]
fn xsa_90_a_rogue_vif_is_disabled_in_the_middle_of_traffic() {
    let mut scene = Scene::new();
    scene.attach();
    for round in 0..20u16 {
        let mut vif = scene.connect(&Options { queues: 4, ..Options::default() });
        for at in 0..4 {
            let end = vif.end_of(at);
            (0..20).for_each(|_| end.send(&plain(1000, round as u8)));
            let queue = &mut vif.queues[at as usize];
            (0..50).for_each(|_| assert!(queue.tx.send_bytes(&[&plain(1000, 1)], &Meta::default())));
            let evil = slot(queue, 0, EXTRA, 900, 60);
            queue.tx.raw_request(&evil.bytes());
            queue.tx.raw_request(&[0xff; 12]);
        }
        vif.queues.iter_mut().for_each(|queue| queue.publish().unwrap());
        scene.gave_up("an extra of type 255");
        scene.neighbour_works();
        vif.close();
        assert_eq!(scene.mapped(), 0);
    }
    let mut vif = scene.connect(&Options::default());
    while vif.end().next(std::time::Duration::ZERO).is_some() {}
    vif.works();
    scene.close(vif);
}

/// Fields of requests change while they are looked at. Whatever was checked is what is done: a frame is as long as it
/// was allowed to be, no byte of a page that was not named comes along, and every slot is answered.
#[test]
fn requests_are_read_once() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    // Page 0 may be sent, byte for byte; what lies behind it in memory is never named.
    let page = [&plain(64, 0)[..14], &[0xa5; PAGE_SIZE - 14]].concat();
    let (gref, _) = put(queue, 0, 0, &page);
    queue.tx.pool().copy_in(PAGE_SIZE, &vec![0x5a; 8 * PAGE_SIZE]);
    // A window, because the queue is used meanwhile.
    let guest = vif.guest.clone();
    let place = guest.read_entry(vif.queues[0].tx.ring_ref()).unwrap().frame as usize * PAGE_SIZE;
    assert!(ring_is_at(&guest, place, &vif.queues[0]));
    let mut seed = 155;
    let scribble = || {
        let random = random(&mut seed);
        let slot = place + HEADER + (random % 256) as usize * 12;
        let byte = (random >> 40) as u8;
        match (random >> 8) % 3 {
            // Size and offset, low and high byte: at most a page together.
            0 => guest.memory().write_record(slot + 10, &u16::from(byte).to_le_bytes()),
            1 => guest.memory().write_record(slot + 4, &u16::from(byte).to_le_bytes()),
            // Flags that change what a packet is, but never promise more slots.
            _ => guest.memory().write_record(slot + 6, &[byte & 3, 0]),
        }
    };
    let queue = &mut vif.queues[0];
    during(scribble, || {
        for _ in 0..300 {
            for id in 0..64 {
                queue.tx.raw_request(&TxRequest { gref, offset: 0, flags: 0, id, size: 200 }.encode());
            }
            queue.publish().unwrap();
            for answer in answers(queue, 64) {
                assert!([OKAY, ERROR].contains(&answer.status), "{answer:?}");
            }
            while let Some((_, frame)) = end.next(std::time::Duration::ZERO) {
                assert!(frame.len() >= 14 && frame.len() <= 255, "{} bytes", frame.len());
                assert!(!frame.contains(&0x5a) || frame[..14].contains(&0x5a), "bytes that were not named");
            }
        }
    });
    works(&mut vif.queues[0], &end);
    scene.close(vif);
}

fn ring_is_at(guest: &hypervisor::emu::GuestSeat, place: usize, queue: &Queue) -> bool {
    get(guest.memory(), place + REQ_PROD) == get(queue.tx.ring_memory(), REQ_PROD)
}

/// The same with every byte of both rings' pages, their indices among them. The guest may ruin its own rings and its own
/// memory, and the device may end; nobody else notices.
#[test]
fn any_byte_of_both_rings() {
    let mut scene = Scene::new();
    scene.attach();
    for round in 0..12 {
        let mut vif = scene.connect(&Options { split_channels: round % 2 == 0, ..Options::default() });
        let end = vif.end();
        let guest = vif.guest.clone();
        let place = |gref| guest.read_entry(gref).unwrap().frame as usize * PAGE_SIZE;
        let rings = [place(vif.queues[0].tx.ring_ref()), place(vif.queues[0].rx.ring_ref())];
        // First the slots alone, for some time; then the indices too.
        let indices = AtomicBool::new(false);
        let mut seed = round + 1;
        let scribble = || {
            let from = if indices.load(Ordering::Relaxed) { 0 } else { HEADER };
            let random = random(&mut seed);
            let at = rings[(random % 2) as usize] + from + (random >> 8) as usize % (PAGE_SIZE - from);
            guest.memory().write_record(at, &[(random >> 32) as u8]);
        };
        let queue = vif.queue();
        during(scribble, || {
            for step in 0..400u64 {
                if step == 300 {
                    indices.store(true, Ordering::Relaxed);
                }
                let frame = plain(60 + step as usize, round as u8);
                for at in 0..8 {
                    let (gref, offset) = put(queue, at, 0, &frame);
                    if queue.tx.free() > 0 {
                        let request = TxRequest { gref, offset, flags: 0, id: 0, size: frame.len() as u16 };
                        queue.tx.raw_request(&request.encode());
                    }
                }
                queue.publish().unwrap();
                queue.tx_channel().notify().unwrap();
                end.try_send(&netback::vnet::Offload::NONE, &frame);
                while end.next(std::time::Duration::ZERO).is_some() {}
                // Our own half does not believe what stands there either.
                while let Ok(Some(_)) = queue.tx.raw_response() {}
                let mut slot = [0; 8];
                while let Ok(true) = queue.rx.raw_slot(&mut slot) {}
            }
        });
        scene.neighbour_works();
        vif.close();
        assert_eq!(scene.mapped(), 0);
    }
    // And the device is as good as new.
    let mut vif = scene.connect(&Options::default());
    while vif.end().next(std::time::Duration::ZERO).is_some() {}
    vif.works();
    scene.close(vif);
}

#[test]
fn event_indices_are_only_wishes() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let frame = plain(60, 9);
    for (round, garbage) in [0, 1, 257, 1 << 31, u32::MAX].into_iter().cycle().take(100).enumerate() {
        let queue = vif.queue();
        let (gref, offset) = put(queue, 0, 0, &frame);
        let request = TxRequest { gref, offset, flags: 0, id: round as u16, size: 60 };
        queue.tx.raw_request(&request.encode());
        for ring in [queue.tx.ring_memory(), queue.rx.ring_memory()] {
            set(ring, REQ_EVENT, garbage);
            set(ring, RSP_EVENT, garbage);
        }
        queue.publish().unwrap();
        // The guest has overwritten the backend's wish to be woken, so it must guess.
        queue.tx_channel().notify().unwrap();
        assert_eq!(answers(queue, 1)[0].status, OKAY);
        assert_eq!(end.frame(), frame);
    }
    vif.works();
    scene.close(vif);
}

#[test]
fn the_guest_scribbles_over_responses() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let frame = plain(60, 9);
    let queue = vif.queue();
    for round in 0..300u32 {
        // Everything that is the backend's to write: its producer, and all slots.
        for slot in 0..256 {
            queue.tx.ring_memory().write_record(HEADER + slot * 12, &[0xff; 12]);
        }
        let (gref, offset) = put(queue, 0, 0, &frame);
        queue.tx.raw_request(&TxRequest { gref, offset, flags: 0, id: round as u16, size: 60 }.encode());
        set(queue.tx.ring_memory(), RSP_PROD, 0x7777_7777);
        queue.publish().unwrap();
        queue.tx_channel().notify().unwrap();
        until("an answer", || get(queue.tx.ring_memory(), RSP_PROD) == round + 1);
        let answer = queue.tx.raw_response().unwrap().map(|answer| (answer.id, answer.status));
        assert_eq!(answer, Some((round as u16, OKAY)));
        assert_eq!(end.frame(), frame);
    }
    vif.works();
    scene.close(vif);
}

#[test]
fn the_grants_of_the_rings_are_revoked_or_changed() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    for gref in [vif.queue().tx.ring_ref(), vif.queue().rx.ring_ref()] {
        let good = scene.hostile.read_entry(gref).unwrap();
        for entry in [
            RawEntry::default(),
            RawEntry { frame: u32::MAX, ..good },
            RawEntry { frame: 0, ..good },
            RawEntry { domid: 9, ..good },
            RawEntry { flags: good.flags | READONLY, ..good },
        ] {
            scene.hostile.write_entry(gref, entry);
            // What is mapped stays mapped; nobody looks at the reference again.
            vif.works();
        }
        scene.hostile.write_entry(gref, good);
    }
    scene.close(vif);
}

#[test]
fn a_guest_is_destroyed_while_packets_flow() {
    for queues in [1, 4] {
        let (scene, mut vif) = Scene::connected(&Options { queues, ..Options::default() });
        for at in 0..queues {
            let end = vif.end_of(at);
            (0..30).for_each(|_| end.send(&plain(9000, 3)));
            let queue = &mut vif.queues[at as usize];
            while queue.tx.send_bytes(&[&plain(9000, 4)], &Meta::default()) {}
            queue.publish().unwrap();
        }
        scene.end();
    }
}

/// Responses are as long as they must be: behind them stands what the guest itself has written there.
#[test]
fn xsa_216_responses_carry_nothing_of_ours() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let frame = tcp4(500);
    let mut written = vec![[0; 12]; 256];
    for round in 0..300 {
        let slots = chain(queue, &frame, &[300, frame.len() - 300], BLANK, &[gso(100, GsoType::TcpV4)]);
        for (at, slot) in slots.iter().enumerate() {
            let bytes = slot.bytes();
            written[(round * 3 + at) % 256][..bytes.len()].copy_from_slice(&bytes);
        }
        ask(queue, &slots, OKAY);
        assert_eq!(end.frame(), frame);
        for (at, (id, status)) in [(1000_u16, OKAY), (1, status::NULL), (1001, OKAY)].into_iter().enumerate() {
            let place = (round * 3 + at) % 256;
            written[place][..2].copy_from_slice(&id.to_le_bytes());
            written[place][2..4].copy_from_slice(&status.to_le_bytes());
            let mut slot = [0; 12];
            queue.tx.ring_memory().read_once(HEADER + place * 12, &mut slot);
            assert_eq!(slot, written[place]);
        }
    }
    scene.close(vif);
}

/// The guest rings on and on. Its queue stays masked while it works, and longer and longer when there was nothing to
/// do; it answers no event with an event.
#[test]
fn xsa_332_an_event_storm_without_work() {
    const STORM: u64 = 200_000;
    for split_channels in [false, true] {
        let (mut scene, mut vif) = Scene::connected(&Options { split_channels, ..Options::default() });
        vif.works();
        let (to_guest, before) = (scene.events_to_guest(), scene.counters().1);
        for _ in 0..STORM / 2 {
            vif.queue().tx_channel().notify().unwrap();
            vif.queue().rx_channel().notify().unwrap();
        }
        let storm = scene.counters().1.since(&before);
        assert_eq!(storm.notifications + storm.notifications_suppressed, STORM);
        assert!(storm.notifications < STORM / 500, "{} of {STORM} events woke the backend", storm.notifications);
        // The last of the honest answers may be seen before its event is raised.
        assert!(scene.events_to_guest() <= to_guest + 4, "an event was answered with an event");
        scene.neighbour_works();
        // Both at once: the storm hurts nobody, and its own interface only in speed.
        let queue = vif.queue();
        let storm = move || {
            queue.tx_channel().notify().unwrap();
            queue.rx_channel().notify().unwrap();
        };
        during(storm, || (0..50).for_each(|_| scene.neighbour_works()));
        vif.works();
        scene.close(vif);
    }
}

/// A guest is woken when it asked for it, and not otherwise.
#[test]
fn no_event_without_need() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let frame = plain(60, 1);
    let (gref, offset) = put(queue, 0, 0, &frame);
    let before = scene.events_to_guest();
    set(queue.tx.ring_memory(), RSP_EVENT, 25);
    for id in 1..=32u16 {
        queue.tx.raw_request(&TxRequest { gref, offset, flags: 0, id, size: 60 }.encode());
        queue.publish().unwrap();
        queue.tx_channel().notify().unwrap();
        until("an answer", || get(queue.tx.ring_memory(), RSP_PROD) == u32::from(id));
        assert_eq!(end.frame(), frame);
    }
    until("the event", || scene.events_to_guest() > before);
    assert_eq!(scene.events_to_guest(), before + 1, "one event, at the 25th answer");
    scene.close(vif);
}

#[test]
fn requests_after_closing() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let more = |vif: &mut Vif| {
        let queue = vif.queue();
        for id in 0..8 {
            let (gref, offset) = put(queue, id, 0, &plain(60, 1));
            queue.tx.raw_request(&TxRequest { gref, offset, flags: 0, id: id as u16, size: 60 }.encode());
        }
        queue.publish().unwrap();
        queue.tx_channel().notify().unwrap();
    };
    more(&mut vif);
    scene.say("5");
    more(&mut vif);
    scene.wait_state(&[State::Closing, State::Closed]);
    more(&mut vif);
    scene.say("6");
    scene.wait_state(&[State::Closed]);
    until("unmapping", || scene.mapped() == 0);
    let answered = get(vif.queue().tx.ring_memory(), RSP_PROD);
    more(&mut vif);
    assert!(answered <= 24, "{answered}");
    assert_eq!(get(vif.queue().tx.ring_memory(), RSP_PROD), answered, "nobody answers after Closed");
    while end.next(std::time::Duration::ZERO).is_some() {}
    scene.close(vif);
}
