//! What a hostile guest can do with what it sends: the transmit ring, its slots, and the bytes of its packets.
//!
//! Rows of the checklist (reference/xen-protocol.md, section 11); hostile_rx.rs, hostile_ctrl.rs and hostile_store.rs
//! have the others.
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
//! | 42 chain longer than the ring | `chains_longer_than_the_ring` |
//! | 43 21 slots and more | `more_than_twenty_slots_after_the_first_end_the_device` |
//! | 44 19 and 20 slots | `nineteen_or_twenty_slots_after_the_first_are_refused` |
//! | 45 size 0, less than 14 | `packets_shorter_than_a_header` |
//! | 46 slots beyond their page | `slots_beyond_their_page_end_the_device` |
//! | 47 later slot larger than the rest | `a_later_slot_larger_than_the_rest` |
//! | 48 later slots of no bytes | `xsa_448_later_slots_of_no_bytes` |
//! | 49 extras: missing, endless, unknown, twice | `extras_that_are_missing_endless_or_unknown`, `the_last_of_two_extras_counts` |
//! | 50 GSO that does not fit its packet | `gso_that_contradicts_the_packet` |
//! | 51 checksums where none can be | `blank_checksums_where_there_is_none`, `blank_checksums_behind_any_headers`, `xsa_423_headers_split_at_every_byte` |
//! | 56 spoofed addresses | not netback's to judge: bridge-scripts' filters; here `any_frame_goes_to_the_network_as_it_is` |
//! | 57 broadcast, STP, LLDP, pause frames | `any_frame_goes_to_the_network_as_it_is` |
//! | 60 larger than the MTU, stacked tags | `any_frame_goes_to_the_network_as_it_is` |
//!
//! Advisories: 39, 90, 216, 332, 423, 432, 448 by name.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod hostile_common;

use std::sync::atomic::{AtomicBool, Ordering};

use hostile_common::frames::{
    GUEST_MAC, PEER_MAC, TCP, UDP, ethernet, ipv4, ipv4_with, ipv6, pattern, plain, pseudo4, pseudo6, tcp, tcp4, tcp6,
    udp, udp4,
};
use hostile_common::{Scene, Slot, Vif, answers, ask, chain, during, put, random, submit, until, works};
use hypervisor::emu::{READONLY, RawEntry};
use hypervisor::memory::Mapping;
use hypervisor::{DomId, GrantAccess, GrantRef, PAGE_SIZE};
use netback::abi::{Extra, GsoType, TxRequest, status, tx_flag};
use netback::front::{Meta, Options, Queue};
use netback::vnet::Partial;
use ring::layout::{HEADER, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use status::{ERROR, OKAY};
use xenstore_client::xenbus::State;

const BLANK: u16 = tx_flag::CSUM_BLANK | tx_flag::DATA_VALIDATED;
const MORE: u16 = tx_flag::MORE_DATA;
const EXTRA: u16 = tx_flag::EXTRA_INFO;

fn set(ring: &Mapping, index: usize, value: u32) {
    ring.atomic_u32(index).store(value, Ordering::SeqCst);
}

fn get(ring: &Mapping, index: usize) -> u32 {
    ring.atomic_u32(index).load(Ordering::SeqCst)
}

fn gso(size: u16, kind: GsoType) -> Extra {
    Extra::Gso { size, kind }
}

/// A slot that points at page 0 of the pool.
fn slot(queue: &Queue, offset: u16, flags: u16, id: u16, size: u16) -> Slot {
    Slot::Data(TxRequest { gref: queue.tx.refs()[0], offset, flags, id, size })
}

/// A scene in which the hostile guest does something that ends its device, with `why`; it can connect again.
fn ends(why: &str, evil: impl FnOnce(&mut Queue)) {
    let (mut scene, mut vif) = Scene::connected(&Options::default());
    vif.works();
    evil(vif.queue());
    // Whether or not the backend asked for it.
    vif.queue().tx_channel().notify().unwrap();
    scene.gave_up(why);
    scene.neighbour_works();
    until("unmapping", || scene.mapped() == 0);
    vif.close();
    let mut vif = scene.connect(&Options::default());
    vif.works();
    scene.close(vif);
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

/// As many slots as the ring has, each with more to come; and one that has more to come than there is.
#[test]
fn chains_longer_than_the_ring() {
    for count in [1, 2, 18, 20] {
        ends("goes on beyond the requests", |queue| {
            let slots: Vec<_> =
                (0..count).map(|id| slot(queue, 0, MORE, id, if id == 0 { 4000 } else { 10 })).collect();
            submit(queue, &slots);
        });
    }
    ends("more than 20 slots", |queue| {
        let slots: Vec<_> = (0..256).map(|id| slot(queue, 0, MORE, id, 200)).collect();
        submit(queue, &slots);
    });
}

#[test]
fn more_than_twenty_slots_after_the_first_end_the_device() {
    for later in [21, 22, 100, 255] {
        ends("more than 20 slots", |queue| {
            let slots: Vec<_> = (0..=later)
                .map(|id| slot(queue, 0, if id < later { MORE } else { 0 }, id, if id == 0 { 60_000 } else { 10 }))
                .collect();
            submit(queue, &slots);
        });
    }
}

#[test]
fn nineteen_or_twenty_slots_after_the_first_are_refused() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let frame = plain(60 + 20 * 100, 7);
    let queue = vif.queue();
    for later in [17, 18, 19, 20] {
        let lens: Vec<usize> = std::iter::once(frame.len() - later * 100).chain((0..later).map(|_| 100)).collect();
        let slots = chain(queue, &frame, &lens, 0, &[]);
        if later <= 18 {
            ask(queue, &slots, OKAY);
            assert_eq!(end.frame(), frame, "{later} slots after the first");
        } else {
            ask(queue, &slots, ERROR);
            assert!(end.is_quiet(), "{later} slots after the first");
        }
        works(queue, &end);
    }
    scene.close(vif);
}

#[test]
fn packets_shorter_than_a_header() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    for size in 0..14 {
        ask(queue, &[slot(queue, 0, 0, 5, size)], ERROR);
        ask(queue, &[slot(queue, 0, BLANK, 5, size)], ERROR);
    }
    // Long enough, but its first slot has fewer than 14 bytes, which Linux refuses too.
    for first in 0..14 {
        let slots = chain(queue, &plain(100, 1), &[first, 100 - first], 0, &[]);
        ask(queue, &slots, ERROR);
    }
    assert!(end.is_quiet());
    // The shortest that there is.
    let frame = plain(14, 0);
    let slots = chain(queue, &frame, &[14], 0, &[]);
    ask(queue, &slots, OKAY);
    assert_eq!(end.frame(), frame);
    works(queue, &end);
    scene.close(vif);
}

#[test]
fn slots_beyond_their_page_end_the_device() {
    for (offset, size) in [(0, 4097), (0, 65535), (4095, 14), (4000, 97), (4096, 14), (65535, 14), (65535, 65535)] {
        ends("beyond its page", |queue| submit(queue, &[slot(queue, offset, 0, 1, size)]));
    }
    // In a later slot, and in the first when only the later ones tell its length.
    ends("beyond its page", |queue| {
        submit(queue, &[slot(queue, 0, MORE, 1, 1000), slot(queue, 4000, 0, 2, 97)]);
    });
    ends("beyond its page", |queue| {
        submit(queue, &[slot(queue, 4000, MORE, 1, 1000), slot(queue, 0, 0, 2, 903)]);
    });
    // A slot of no bytes at an offset that no page has.
    ends("beyond its page", |queue| {
        submit(queue, &[slot(queue, 0, MORE, 1, 1000), slot(queue, 4097, 0, 2, 0)]);
    });
    // The last byte of a page is still in it.
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let frame = plain(96, 8);
    let (gref, offset) = put(queue, 3, 4000, &frame);
    ask(queue, &[Slot::Data(TxRequest { gref, offset, flags: 0, id: 1, size: 96 })], OKAY);
    assert_eq!(end.frame(), frame);
    scene.close(vif);
}

#[test]
fn a_later_slot_larger_than_the_rest() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    for (total, later) in
        [(100, &[101][..]), (100, &[4096]), (60, &[30, 31]), (14, &[10, 0, 5]), (0, &[1]), (200, &[190])]
    {
        let mut slots = vec![slot(queue, 0, MORE, 10, total)];
        for (at, &size) in later.iter().enumerate() {
            let more = if at + 1 < later.len() { MORE } else { 0 };
            slots.push(slot(queue, 0, more, 11 + at as u16, size));
        }
        ask(queue, &slots, ERROR);
        assert!(end.is_quiet(), "{total} {later:?}");
        works(queue, &end);
    }
    scene.close(vif);
}

#[test]
fn xsa_448_later_slots_of_no_bytes() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    for (frame, flags) in [(plain(200, 3), 0), (udp4(100), BLANK), (tcp4(100), BLANK)] {
        for later in 1..=18 {
            let lens: Vec<usize> = std::iter::once(frame.len()).chain((0..later).map(|_| 0)).collect();
            let slots = chain(queue, &frame, &lens, flags, &[]);
            ask(queue, &slots, OKAY);
            assert_eq!(end.frame(), frame, "{later} slots of no bytes");
        }
        // Between others; and with grants that do not exist, which nobody has to look at.
        let (gref, offset) = put(queue, 0, 0, &frame[..60]);
        let (rest_ref, rest_offset) = put(queue, 1, 0, &frame[60..]);
        let rest = (frame.len() - 60) as u16;
        let none = |id| Slot::Data(TxRequest { gref: GrantRef(u32::MAX), offset: 0, flags: MORE, id, size: 0 });
        let size = frame.len() as u16;
        let slots = [
            Slot::Data(TxRequest { gref, offset, flags: flags | MORE, id: 1, size }),
            none(2),
            none(3),
            Slot::Data(TxRequest { gref: rest_ref, offset: rest_offset, flags: MORE, id: 4, size: rest }),
            none(5),
            Slot::Data(TxRequest { gref: GrantRef(0), offset: 4096, flags: 0, id: 6, size: 0 }),
        ];
        ask(queue, &slots, OKAY);
        assert_eq!(end.frame(), frame);
    }
    // Nothing but slots of no bytes, the first too.
    let nothing: Vec<_> = (0..19).map(|id| slot(queue, 0, if id < 18 { MORE } else { 0 }, id, 0)).collect();
    ask(queue, &nothing, ERROR);
    assert!(end.is_quiet());
    works(queue, &end);
    scene.close(vif);
}

#[test]
fn extras_that_are_missing_endless_or_unknown() {
    ends("goes on beyond the requests", |queue| submit(queue, &[slot(queue, 0, EXTRA, 1, 60)]));
    ends("goes on beyond the requests", |queue| {
        submit(queue, &[slot(queue, 0, EXTRA, 1, 60), Slot::Extra(gso(1000, GsoType::TcpV4), true)]);
    });
    // As many as the ring has slots for, each with one more to come.
    ends("goes on beyond the requests", |queue| {
        let hash = Slot::Extra(Extra::Hash { kind: 1, algorithm: 1, value: 7 }, true);
        let slots: Vec<_> = std::iter::once(slot(queue, 0, EXTRA, 1, 60)).chain((0..240).map(|_| hash)).collect();
        submit(queue, &slots);
    });
    for kind in [0, 6, 7, 255] {
        ends(&format!("an extra of type {kind}"), |queue| {
            submit(queue, &[slot(queue, 0, EXTRA, 1, 60), Slot::Raw([kind; 12])]);
        });
    }
    for kind in [3, 4, 255] {
        ends(&format!("GSO of type {kind}"), |queue| {
            let extra = Slot::Raw([1, 0, 100, 0, kind, 0, 0, 0, 0, 0, 0, 0]);
            submit(queue, &[slot(queue, 0, EXTRA, 1, 60), extra]);
        });
    }
}

#[test]
fn the_last_of_two_extras_counts() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let frame = tcp4(3000);
    let xdp = Extra::Xdp { headroom: 0x7fff };
    let hash = Extra::Hash { kind: 255, algorithm: 255, value: u32::MAX };
    let extras = [gso(1, GsoType::TcpV6), hash, xdp, hash, gso(1000, GsoType::TcpV4)];
    let slots = chain(queue, &frame, &[frame.len()], BLANK, &extras);
    ask(queue, &slots, OKAY);
    let (offload, bytes) = end.packet();
    assert_eq!((offload.gso, bytes), (Some((GsoType::TcpV4, 1000)), frame));
    // 18 extras, and the packet may still have its 18 slots.
    let frame = plain(2000, 1);
    let lens: Vec<usize> = std::iter::once(200).chain((0..18).map(|_| 100)).collect();
    let slots = chain(queue, &frame, &lens, 0, &[hash; 18]);
    ask(queue, &slots, OKAY);
    assert_eq!(end.frame(), frame);
    works(queue, &end);
    scene.close(vif);
}

#[test]
fn gso_that_contradicts_the_packet() {
    for (size, kind) in [(0, GsoType::TcpV4), (0, GsoType::TcpV6), (1000, GsoType::None), (0, GsoType::None)] {
        ends("GSO with segments of no size or of no kind", |queue| {
            let slots = chain(queue, &tcp4(3000), &[3054], BLANK, &[gso(size, kind)]);
            submit(queue, &slots);
        });
    }
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let (v4, v6) = (GsoType::TcpV4, GsoType::TcpV6);
    let no_tcp_header = ethernet(PEER_MAC, GUEST_MAC, 0x0800, &ipv4(TCP, &[1; 19]));
    let mut bad_offset = tcp4(500);
    bad_offset[14 + 20 + 12] = 0xf0;
    bad_offset.truncate(14 + 20 + 30);
    let mut fragment = tcp4(500);
    fragment[14 + 6..14 + 8].copy_from_slice(&[0x20, 0x10]);
    for (frame, kind) in [
        (tcp4(3000), v6),
        (tcp6(3000), v4),
        (udp4(3000), v4),
        (plain(3000, 1), v4),
        (plain(3000, 1), v6),
        (no_tcp_header, v4),
        (bad_offset, v4),
        (fragment, v4),
    ] {
        for flags in [0, BLANK] {
            let slots = chain(queue, &frame, &[frame.len()], flags, &[gso(1000, kind)]);
            ask(queue, &slots, ERROR);
            assert!(end.is_quiet(), "{kind:?} {flags} {:?}", &frame[..40]);
        }
    }
    // Segments larger than the packet are one segment; and smaller than is sensible is the network's to judge.
    for size in [1, 3000, 65535] {
        let frame = tcp4(3000);
        let slots = chain(queue, &frame, &[1000, 2054], BLANK, &[gso(size, v4)]);
        ask(queue, &slots, OKAY);
        let (offload, bytes) = end.packet();
        assert_eq!((offload.gso, offload.partial), (Some((v4, size)), Some(Partial { start: 34, offset: 16 })));
        assert_eq!(bytes, frame);
    }
    // Without csum_blank the checksum is made what cutting needs: the pseudo header's sum.
    for (frame, kind, place, sum) in
        [(tcp4(3000), v4, 50, pseudo4(TCP, 3020)), (tcp6(3000), v6, 70, pseudo6(TCP, 3020))]
    {
        let mut full = frame.clone();
        full[place..place + 2].copy_from_slice(&[0xde, 0xad]);
        let slots = chain(queue, &full, &[full.len()], 0, &[gso(1000, kind)]);
        ask(queue, &slots, OKAY);
        let (offload, bytes) = end.packet();
        assert_eq!(offload.gso, Some((kind, 1000)));
        assert_eq!(offload.partial.map(|partial| usize::from(partial.start + partial.offset)), Some(place));
        assert_eq!(bytes[place..place + 2], sum.to_be_bytes());
        assert_eq!(bytes, frame);
    }
    works(queue, &end);
    scene.close(vif);
}

/// Frames whose checksum is said to be blank and that have no place for one.
fn without_checksum() -> Vec<(&'static str, Vec<u8>)> {
    let ip4 = |payload: Vec<u8>| ethernet(PEER_MAC, GUEST_MAC, 0x0800, &payload);
    let ip6 = |payload: Vec<u8>| ethernet(PEER_MAC, GUEST_MAC, 0x86dd, &payload);
    let with = |mut frame: Vec<u8>, at: usize, byte: u8| {
        frame[at] = byte;
        frame
    };
    let cut = |frame: Vec<u8>, len: usize| frame[..len].to_vec();
    let hops = |count: usize| {
        // Hop-by-hop options, each of 8 bytes, the last before UDP.
        let mut chain = Vec::new();
        for at in 0..count {
            chain.extend([if at + 1 < count { 0 } else { UDP }, 0, 1, 4, 0, 0, 0, 0]);
        }
        chain.extend(udp(0, &[0; 20]));
        ipv6(0, &chain)
    };
    vec![
        ("no IP", plain(100, 1)),
        ("ARP", ethernet([0xff; 6], GUEST_MAC, 0x0806, &[0; 46])),
        ("nothing after Ethernet", cut(tcp4(10), 14)),
        ("a truncated IPv4 header", cut(tcp4(10), 33)),
        ("IPv4 and nothing behind", cut(tcp4(10), 34)),
        ("a truncated TCP header", cut(tcp4(10), 51)),
        ("a truncated UDP header", cut(udp4(10), 41)),
        ("IPv4 with ihl 4", with(tcp4(100), 14, 0x44)),
        ("IPv4 with ihl 0", with(tcp4(100), 14, 0x40)),
        ("IPv4 with ihl 15 and no room", cut(with(tcp4(20), 14, 0x4f), 74)),
        ("IPv4 of version 6", with(tcp4(100), 14, 0x65)),
        ("ICMP", with(tcp4(100), 14 + 9, 1)),
        ("a fragment", with(udp4(100), 14 + 7, 1)),
        ("a first fragment", with(udp4(100), 14 + 6, 0x20)),
        ("a truncated IPv6 header", cut(tcp6(10), 53)),
        ("IPv6 and nothing behind", cut(tcp6(10), 54)),
        ("IPv6 of version 4", with(tcp6(100), 14, 0x40)),
        ("an IPv6 chain without end", ip6(hops(60))),
        ("an IPv6 extension beyond the frame", ip6(ipv6(0, &[UDP, 255, 0, 0, 0, 0, 0, 0]))),
        ("an IPv6 fragment", ip6(ipv6(44, &[&[UDP, 0, 0, 9, 0, 0, 0, 1][..], &udp(0, &[0; 40])].concat()))),
        ("IPv6 without next header", ip6(ipv6(59, &[0; 40]))),
        ("IPv4 where IPv6 should be", ip6(ipv4(UDP, &udp(0, &[0; 40])))),
        ("three tags", {
            let tag = [0x81, 0, 0, 5];
            [&tcp4(10)[..12], &tag, &tag, &tag, &tcp4(10)[12..]].concat()
        }),
        ("nothing but tags", [&tcp4(10)[..12], &[0x81, 0, 0, 5].repeat(200)].concat()),
        ("options to the very end", ip4(ipv4_with(&[1; 40], UDP, &[]))),
    ]
}

#[test]
fn blank_checksums_where_there_is_none() {
    let (mut scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    for (what, frame) in without_checksum() {
        let slots = chain(queue, &frame, &[frame.len()], BLANK, &[]);
        ask(queue, &slots, ERROR);
        assert!(end.is_quiet(), "{what}");
        // Without the promise it is just a frame.
        let slots = chain(queue, &frame, &[frame.len()], 0, &[]);
        ask(queue, &slots, OKAY);
        let (offload, bytes) = end.packet();
        assert_eq!((offload.partial, offload.gso, bytes), (None, None, frame), "{what}");
    }
    works(queue, &end);
    scene.neighbour_works();
    scene.close(vif);
}

#[test]
fn blank_checksums_behind_any_headers() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let hop = [UDP, 1, 5, 2, 0, 0, 1, 10, 0, 0, 0, 0, 0, 0, 0, 0];
    let tagged = |tags: &[u8], frame: &[u8]| [&frame[..12], tags, &frame[12..]].concat();
    let (vlan, qinq) = ([0x81, 0, 0x0f, 0xff], [0x88, 0xa8, 0, 1]);
    let options = ethernet(PEER_MAC, GUEST_MAC, 0x0800, &ipv4_with(&[1; 40], TCP, &tcp(7, &[9; 30])));
    let extension = ethernet(PEER_MAC, GUEST_MAC, 0x86dd, &ipv6(0, &[&hop[..], &udp(7, &[9; 30])].concat()));
    for (frame, start, offset) in [
        (tcp4(0), 34, 16),
        (tcp4(1460), 34, 16),
        (udp4(0), 34, 6),
        (tcp6(0), 54, 16),
        (options, 74, 16),
        (extension, 70, 6),
        (tagged(&vlan, &tcp4(100)), 38, 16),
        (tagged(&[&qinq[..], &vlan].concat(), &udp4(100)), 42, 6),
        (tagged(&[&vlan[..], &vlan].concat(), &tcp6(100)), 62, 16),
    ] {
        let slots = chain(queue, &frame, &[frame.len()], BLANK, &[]);
        ask(queue, &slots, OKAY);
        let (offload, bytes) = end.packet();
        assert_eq!(offload.partial, Some(Partial { start, offset }), "{:?}", &frame[..40]);
        assert_eq!(bytes, frame);
    }
    works(queue, &end);
    scene.close(vif);
}

/// The headers of a packet lie in two slots, split at every place of its first 128 bytes; the kernel gets them in one
/// piece all the same, because the header before them names as many bytes as must be linear.
#[test]
fn xsa_423_headers_split_at_every_byte() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let options = ethernet(PEER_MAC, GUEST_MAC, 0x0800, &ipv4_with(&[1; 40], TCP, &tcp(7, &pattern(300, 2))));
    for (frame, partial, extras) in [
        (tcp4(2000), Partial { start: 34, offset: 16 }, vec![gso(1000, GsoType::TcpV4)]),
        (tcp6(2000), Partial { start: 54, offset: 16 }, vec![gso(1000, GsoType::TcpV6)]),
        (udp4(300), Partial { start: 34, offset: 6 }, vec![]),
        (options, Partial { start: 74, offset: 16 }, vec![]),
    ] {
        for split in 14..=128 {
            let slots = chain(queue, &frame, &[split, frame.len() - split], BLANK, &extras);
            ask(queue, &slots, OKAY);
            let (offload, bytes) = end.packet();
            assert_eq!(bytes, frame, "split at {split}");
            assert_eq!(offload.partial, Some(partial), "split at {split}");
            let headers = usize::from(offload.headers);
            assert!(headers >= 128.min(frame.len()) && headers <= frame.len(), "{headers} linear bytes");
        }
        // Byte by byte, as far as slots go.
        let lens: Vec<usize> = [14].into_iter().chain([1; 17]).chain([frame.len() - 31]).collect();
        let slots = chain(queue, &frame, &lens, BLANK, &extras);
        ask(queue, &slots, OKAY);
        assert_eq!(end.frame(), frame);
        // Fewer than Ethernet's own header are refused, as Linux does.
        for split in 1..14 {
            let slots = chain(queue, &frame, &[split, frame.len() - split], BLANK, &extras);
            ask(queue, &slots, ERROR);
            assert!(end.is_quiet(), "split at {split}");
        }
    }
    works(queue, &end);
    scene.close(vif);
}

/// Odd packets: random chains of random lengths, at random offsets, with random bytes and flags. What arrives is what
/// was named, in order; what is refused does not arrive.
#[test]
fn xsa_432_odd_packets() {
    let (mut scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let mut seed = 432;
    let (mut sent, mut refused) = (0, 0);
    for round in 0..4000u32 {
        let mut below = |limit: u64| (random(&mut seed) % limit) as usize;
        let later = below(19);
        // Many around the lengths at which something changes.
        let edges = [0, 1, 13, 14, 15, 33, 34, 53, 54, 127, 128, 129, 1500, 4095, 4096];
        let mut lens: Vec<usize> = (0..=later).map(|_| edges[below(15)]).collect();
        lens[0] = lens[0].max(below(3) * 14);
        let whole = [tcp4(4000), tcp6(4000), udp4(4000), plain(4000, 1)];
        let template = &whole[below(4)];
        let flags = if below(3) == 0 { BLANK } else { 0 };
        let mut frame = Vec::new();
        let mut slots = Vec::new();
        let total: usize = lens.iter().sum();
        if total > 0xffff {
            continue;
        }
        for (page, &len) in lens.iter().enumerate() {
            let bytes: Vec<u8> = (0..len)
                .map(|at| template.get(frame.len() + at).copied().unwrap_or(at as u8))
                .map(|byte| if below(200) == 0 { below(256) as u8 } else { byte })
                .collect();
            let offset = below((4096 - len + 1) as u64);
            let (gref, offset) = put(queue, page, offset, &bytes);
            frame.extend(bytes);
            let more = if page < later { MORE } else { 0 };
            let (flags, size) = if page == 0 { (flags | more, total) } else { (more, len) };
            slots.push(Slot::Data(TxRequest { gref, offset, flags, id: page as u16, size: size as u16 }));
        }
        submit(queue, &slots);
        let answers = answers(queue, slots.len());
        let outcome = answers[0].status;
        assert!(answers.iter().all(|answer| answer.status == outcome), "{answers:?}");
        if outcome == OKAY {
            sent += 1;
            let (offload, bytes) = end.packet();
            assert!(bytes == frame, "round {round}: {lens:?}");
            assert_eq!(offload.partial.is_some(), flags == BLANK);
            if let Some(Partial { start, offset }) = offload.partial {
                assert!(usize::from(start) + usize::from(offset) + 2 <= frame.len());
            }
        } else {
            refused += 1;
            assert_eq!(outcome, ERROR);
            assert!(flags == BLANK || lens[0] < 14, "round {round}: {lens:?} was refused");
        }
    }
    assert!(sent > 500 && refused > 100, "{sent} sent, {refused} refused");
    assert!(end.is_quiet());
    works(queue, &end);
    scene.neighbour_works();
    scene.close(vif);
}

/// One bad reference among many good ones, in one batch: that packet fails, in all its slots; the others do not.
#[test]
fn bad_grants_in_a_batch() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let frame = scene.hostile.alloc_pages(1).unwrap();
    let grant = |entry| {
        let gref = scene.hostile.grant(frame, DomId(0), GrantAccess::ReadWrite).unwrap();
        scene.hostile.write_entry(gref, entry);
        gref
    };
    let good = RawEntry::granting(frame, DomId(0), GrantAccess::ReadWrite);
    let bad = [
        GrantRef(0),
        GrantRef(scene.hostile.entries()),
        GrantRef(u32::MAX),
        grant(RawEntry::default()),
        grant(RawEntry { domid: 77, ..good }),
        grant(RawEntry { domid: DomId::SELF.0, ..good }),
        grant(RawEntry { frame: u32::MAX, ..good }),
        grant(RawEntry { flags: 2, ..good }),
        grant(RawEntry { flags: 3, ..good }),
        grant(RawEntry { flags: 0xffff, ..good }),
    ];
    let queue = vif.queue();
    for &bad in &bad {
        let mut expected = Vec::new();
        for id in 0..20u16 {
            let bytes = plain(300, id as u8);
            let mut slots = chain(queue, &bytes, &[100, 100, 100], 0, &[]);
            let wrong = id % 4 == 1;
            if wrong && let Slot::Data(request) = &mut slots[usize::from(id / 4) % 3] {
                request.gref = bad;
            }
            for slot in &mut slots {
                let Slot::Data(request) = slot else { continue };
                request.id = id;
            }
            // Each packet's own pages: chain uses the first three of the pool.
            for (at, slot) in slots.iter_mut().enumerate() {
                let Slot::Data(request) = slot else { continue };
                if request.gref == bad {
                    continue;
                }
                let (gref, offset) = put(queue, 3 + usize::from(id) * 3 + at, 0, &bytes[at * 100..at * 100 + 100]);
                (request.gref, request.offset) = (gref, offset);
            }
            slots.iter().for_each(|slot| queue.tx.raw_request(&slot.bytes()));
            if !wrong {
                expected.push(bytes);
            }
        }
        queue.publish().unwrap();
        for answer in answers(queue, 60) {
            let status = if answer.id % 4 == 1 { ERROR } else { OKAY };
            assert_eq!(answer.status, status, "packet {} with {bad:?}", answer.id);
        }
        for bytes in expected {
            assert_eq!(end.frame(), bytes);
        }
        assert!(end.is_quiet());
    }
    works(queue, &end);
    scene.close(vif);
}

/// Whatever frame a guest sends, it is the network's to judge: the tap gets it as it is. Who may send what is for the
/// filters between the tap and the bridge.
#[test]
fn any_frame_goes_to_the_network_as_it_is() {
    let (mut scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let tags = [0x81, 0, 0, 1].repeat(100);
    let frames = [
        // Row 57: a giant broadcast, STP, LLDP, a pause frame.
        ethernet([0xff; 6], GUEST_MAC, 0x88b5, &pattern(65000, 1)),
        ethernet([0x01, 0x80, 0xc2, 0, 0, 0], GUEST_MAC, 38, &[&[0x42, 0x42, 3][..], &[0; 35]].concat()),
        ethernet([0x01, 0x80, 0xc2, 0, 0, 0x0e], GUEST_MAC, 0x88cc, &[2, 7, 4, 0, 0, 0, 0, 0, 0, 0, 0]),
        ethernet([0x01, 0x80, 0xc2, 0, 0, 1], GUEST_MAC, 0x8808, &[0, 1, 0xff, 0xff]),
        // Row 56: somebody else's address, nobody's, everybody's.
        ethernet(PEER_MAC, [0x02, 9, 9, 9, 9, 9], 0x88b5, &[1; 60]),
        ethernet(PEER_MAC, [0; 6], 0x88b5, &[1; 60]),
        ethernet([0xff; 6], [0xff; 6], 0x0806, &[1; 60]),
        // Row 60: larger than any MTU, as large as can be, tags upon tags.
        plain(9014, 2),
        plain(65535, 3),
        [&plain(60, 4)[..12], &tags, &plain(60, 4)[12..]].concat(),
    ];
    for frame in frames {
        let lens: Vec<usize> = frame.chunks(PAGE_SIZE).map(<[u8]>::len).collect();
        let slots = chain(queue, &frame, &lens, 0, &[]);
        ask(queue, &slots, OKAY);
        let (offload, bytes) = end.packet();
        assert!(bytes == frame, "{} bytes", frame.len());
        assert!(offload.partial.is_none() && offload.gso.is_none());
    }
    works(queue, &end);
    scene.neighbour_works();
    scene.close(vif);
}

/// A packet of 64 KiB, whose size does not fit into its field: what it says is less than what its slots have.
#[test]
fn a_packet_whose_size_wraps() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    for total in [65536usize, 65536 + 14, 65536 + 4000] {
        let count = total.div_ceil(PAGE_SIZE) as u16;
        let slots: Vec<_> = (0..count)
            .map(|id| {
                let more = if id + 1 < count { MORE } else { 0 };
                let len =
                    if id == 0 { total as u16 } else { PAGE_SIZE.min(total - usize::from(id) * PAGE_SIZE) as u16 };
                slot(queue, 0, more, id, len)
            })
            .collect();
        ask(queue, &slots, ERROR);
        assert!(end.is_quiet(), "{total}");
    }
    works(queue, &end);
    scene.close(vif);
}

/// Responses are as long as they must be, and what is padding in them is zero.
#[test]
fn xsa_216_responses_carry_nothing_of_ours() {
    let (scene, mut vif) = Scene::connected(&Options::default());
    let end = vif.end();
    let queue = vif.queue();
    let frame = tcp4(500);
    for round in 0..300usize {
        let slots = chain(queue, &frame, &[300, frame.len() - 300], BLANK, &[gso(100, GsoType::TcpV4)]);
        ask(queue, &slots, OKAY);
        assert_eq!(end.frame(), frame);
        for (at, (id, status)) in [(1000u16, OKAY), (0, status::NULL), (1001, OKAY)].into_iter().enumerate() {
            let mut slot = [0; 12];
            queue.tx.ring_memory().read_once(HEADER + (round * 3 + at) % 256 * 12, &mut slot);
            if status != status::NULL {
                assert_eq!(slot[..2], id.to_le_bytes());
            }
            assert_eq!(slot[2..4], status.to_le_bytes());
            // Behind them stands nothing, or what the guest itself wrote there.
            let own = slots[at].bytes();
            let clean =
                slot[4..].iter().zip(own[4..].iter().chain(&[0; 12])).all(|(&now, &own)| now == 0 || now == own);
            assert!(clean, "{slot:?}");
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
