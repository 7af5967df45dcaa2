//! What a hostile guest can do with the packets it sends: their slots, their extras, and their bytes; what it leaves to
//! be done with them is in hostile_offload.rs.
//!
//! Rows of the checklist:
//!
//! | row | test |
//! |---|---|
//! | 42 chain longer than the ring | `chains_longer_than_the_ring` |
//! | 43 21 slots and more | `more_than_twenty_slots_after_the_first_end_the_device` |
//! | 44 19 and 20 slots | `nineteen_or_twenty_slots_after_the_first_are_refused` |
//! | 45 size 0, less than 14 | `packets_shorter_than_a_header` |
//! | 46 slots beyond their page | `slots_beyond_their_page_end_the_device` |
//! | 47 later slot larger than the rest | `a_later_slot_larger_than_the_rest` |
//! | 48 later slots of no bytes | `xsa_448_later_slots_of_no_bytes` |
//! | 49 extras: missing, endless, unknown, twice | `extras_that_are_missing_endless_or_unknown`, `the_last_of_two_extras_counts` |
//! | 56 spoofed addresses | not netback's to judge: bridge-scripts' filters; here `any_frame_goes_to_the_network_as_it_is` |
//! | 57 broadcast, STP, LLDP, pause frames | `any_frame_goes_to_the_network_as_it_is` |
//! | 60 larger than the MTU, stacked tags | `any_frame_goes_to_the_network_as_it_is` |
//!
//! Advisories: 432, 448 by name.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::frames::{GUEST_MAC, PEER_MAC, ethernet, pattern, plain, tcp4, tcp6, udp4};
use common::slots::{BLANK, EXTRA, MORE, Slot, answers, ask, chain, ends, gso, put, slot, submit};
use common::{Scene, random, works};
use hypervisor::emu::RawEntry;
use hypervisor::{DomId, GrantAccess, GrantRef, PAGE_SIZE};
use netback::abi::{Extra, GsoType, TxRequest, status};
use netback::front::Options;
use netback::vnet::Partial;
use status::{ERROR, OKAY};

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
