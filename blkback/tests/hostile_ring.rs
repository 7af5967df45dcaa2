//! What a hostile guest can do to the ring, the event channel and the grants behind them.
//!
//! Rows of the checklist of what a hostile frontend can do and where they are tested; hostile_store.rs and
//! hostile_requests.rs have the others.
//!
//! | row | test |
//! |---|---|
//! | 1 producer too far ahead | `a_producer_too_far_ahead_ends_the_device`, on every ring |
//! | 2 producer moves backwards | `a_producer_that_moves_backwards_ends_the_device` |
//! | 3 request changed after the check | `xsa_155_requests_and_descriptors_are_read_once`, `xsa_155_any_byte_of_the_ring` |
//! | 4 event indices garbage | `event_indices_are_only_wishes` |
//! | 5 responses overwritten | `the_guest_scribbles_over_responses` |
//! | 11 event storm | `xsa_332_an_event_storm_without_work` (and patience.rs) |
//! | 12 ring grant revoked | `the_grant_of_the_ring_is_revoked_or_changed` |
//! | 13 guest dies with I/O in flight | `a_guest_is_destroyed_with_io_in_flight` |
//! | 14 granted page ballooned out | does not apply: emulated guests have no paging, and grants that name no page fail for good (`xsa_361_362_365_bad_grants_in_a_batch`) |
//! | 40 requests after Closing | `requests_after_closing` |
//!
//! Advisories: 155, 216, 332, 361, 362, 365, 371, 391, 396 by name; 349 and 350 are in hostile_store.rs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use blkback::abi::{Protocol, Segment, Slot, op};
use blkback::front::{Options, Queue};
use common::scene::{DISK, SECTORS, Scene, answers, ask, direct, during, whole, works};
use common::{Disk, until};
use hypervisor::emu::{GuestSeat, READONLY, RawEntry};
use hypervisor::{DomId, GrantAccess, GrantRef, PAGE_SIZE};
use ring::layout::{HEADER, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use xenstore_client::Store;
use xenstore_client::xenbus::State;

fn set(queue: &Queue, index: usize, value: u32) {
    queue.ring_memory().atomic_u32(index).store(value, Ordering::SeqCst);
}

fn get(queue: &Queue, index: usize) -> u32 {
    queue.ring_memory().atomic_u32(index).load(Ordering::SeqCst)
}

/// The reference of the only page of the ring.
fn ring_ref(scene: &Scene) -> GrantRef {
    GrantRef(scene.store().read_str(&format!("{}/ring-ref", scene.front_path())).unwrap().parse().unwrap())
}

/// Where a granted page lies in the guest's memory.
fn place(guest: &GuestSeat, gref: GrantRef) -> usize {
    guest.read_entry(gref).unwrap().frame as usize * PAGE_SIZE
}

#[test]
fn a_producer_too_far_ahead_ends_the_device() {
    for (queues, hit, prod) in [(1, 0, 33), (1, 0, u32::MAX), (2, 0, 1 << 31), (2, 1, 33)] {
        let (scene, disk) = Scene::connected("w", &Options { queues, ..Options::default() });
        set(&disk.queues[hit], REQ_PROD, prod);
        disk.queues[hit].channel().notify().unwrap();
        scene.gave_up("req_prod");
        scene.close(disk);
    }
}

#[test]
fn a_producer_that_moves_backwards_ends_the_device() {
    let (scene, mut disk) = Scene::connected("w", &Options::default());
    works(disk.queue());
    set(disk.queue(), REQ_PROD, 1);
    disk.queue().channel().notify().unwrap();
    scene.gave_up("req_prod");
    scene.close(disk);
}

#[test]
fn event_indices_are_only_wishes() {
    let (scene, mut disk) = Scene::connected("w", &Options::default());
    for (round, garbage) in [0, 1, 33, 1 << 31, u32::MAX].into_iter().cycle().take(100).enumerate() {
        let queue = disk.queue();
        let gref = queue.data_refs()[0];
        queue.submit_raw(&direct(op::READ, round as u64, 0, &[whole(gref)]));
        set(queue, REQ_EVENT, garbage);
        set(queue, RSP_EVENT, garbage);
        queue.publish().unwrap();
        // The guest has overwritten the backend's wish to be woken, so it must guess.
        queue.channel().notify().unwrap();
        assert_eq!(answers(queue, 1)[0].status, 0);
    }
    scene.close(disk);
}

#[test]
fn the_guest_scribbles_over_responses() {
    let (scene, mut disk) = Scene::connected("w", &Options::default());
    let queue = disk.queue();
    for round in 0..40u32 {
        // Everything that is the backend's to write: its producer, and all slots but the next.
        for slot in 0..32 {
            queue.ring_memory().write_record(HEADER + slot * 112, &[0xff; 112]);
        }
        let gref = queue.data_refs()[0];
        queue.submit_raw(&direct(op::READ, u64::from(round), 0, &[whole(gref)]));
        set(queue, RSP_PROD, 0x7777_7777);
        queue.publish().unwrap();
        queue.channel().notify().unwrap();
        until("an answer", || get(queue, RSP_PROD) == round + 1);
        assert_eq!(queue.raw_outcome().unwrap().map(|answer| (answer.id, answer.status)), Some((round.into(), 0)));
    }
    scene.close(disk);
}

#[test]
fn the_grant_of_the_ring_is_revoked_or_changed() {
    for persistent in [true, false] {
        let (scene, mut disk) = Scene::connected("w", &Options { persistent, ..Options::default() });
        let gref = ring_ref(&scene);
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
            works(disk.queue());
        }
        scene.hostile.write_entry(gref, good);
        scene.close(disk);
    }
}

#[test]
fn a_guest_is_destroyed_with_io_in_flight() {
    for persistent in [true, false] {
        for operation in [op::READ, op::WRITE] {
            let (scene, mut disk) = Scene::connected("w", &Options { persistent, ..Options::default() });
            let queue = disk.queue();
            for id in 0..32 {
                let segments: Vec<_> = queue.data_refs()[id * 11..][..11].iter().map(|&gref| whole(gref)).collect();
                queue.submit_raw(&direct(operation, id as u64, id as u64 * 88, &segments));
            }
            queue.publish().unwrap();
            scene.end();
        }
    }
}

#[test]
fn requests_after_closing() {
    let (scene, mut disk) = Scene::connected("w", &Options::default());
    let more = |queue: &mut Queue| {
        for id in 0..8 {
            let gref = queue.data_refs()[id];
            queue.submit_raw(&direct(op::WRITE, id as u64, 0, &[whole(gref)]));
        }
        queue.publish().unwrap();
        queue.channel().notify().unwrap();
    };
    more(disk.queue());
    scene.say("5");
    more(disk.queue());
    scene.wait_state(&[State::Closing, State::Closed]);
    more(disk.queue());
    scene.say("6");
    scene.wait_state(&[State::Closed]);
    assert_eq!(scene.mapped(), 0);
    let answered = get(disk.queue(), RSP_PROD);
    more(disk.queue());
    assert!(answered <= 24 && get(disk.queue(), RSP_PROD) == answered, "nobody answers after Closed");
    scene.close(disk);
}

/// Random numbers, the same in every run.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Fields of requests and of indirect descriptors change while they are being looked at. Whatever was checked is what
/// is done: no byte behind the end of the disk, none behind the end of a page, and every request is answered.
///
/// Not changed are the two bytes of a slot where the backend writes the status, and references to pages: those may
/// lead to the ring itself, see the test after this.
#[test]
fn xsa_155_requests_and_descriptors_are_read_once() {
    for (persistent, indirect) in [(true, false), (false, false), (true, true), (false, true)] {
        let scene = Scene::new();
        let tail = [0x5a; 300];
        let file = std::fs::File::options().write(true).read(true).open(scene.image()).unwrap();
        file.write_all_at(&tail, DISK).unwrap();
        scene.attach("w");
        let mut disk = scene.connect(&Options { persistent, ..Options::default() });
        let queue = disk.queue();
        // The requests use even pages. References read from what they hold lead nowhere.
        queue.data().copy_in(0, &vec![0xa5; queue.data().len()]);
        let refs: Vec<GrantRef> = queue.data_refs().iter().copied().step_by(2).collect();
        let (tables, refs) = refs.split_at(32);
        let memory = scene.hostile.memory().clone();
        let (ring, first_table) = (place(&scene.hostile, ring_ref(&scene)), place(&scene.hostile, tables[0]));
        let choose = |random: u64| {
            let byte = (random >> 32) as u8;
            let slot = ring + HEADER + (random % 32) as usize * 112;
            match (random >> 8) as usize % 112 {
                // Of a descriptor: first sector, last sector, padding.
                at @ 56.. if indirect => {
                    let table = first_table + (random % 32) as usize * 2 * PAGE_SIZE;
                    Some((table + (at % 12) * 8 + 4 + at % 4, byte))
                }
                0 => Some((slot, [op::READ, op::WRITE, 2, 4, op::DISCARD, 7, 255][usize::from(byte) % 7])),
                // The status of the response.
                10 | 11 => None,
                at @ 24.. if indirect || (at - 24) % 8 < 4 => None,
                at => Some((slot + at, byte)),
            }
        };
        let mut seed = 155;
        let scribble = || {
            if let Some((at, byte)) = choose(random(&mut seed)) {
                memory.write_record(at, &[byte]);
            }
        };
        during(scribble, || {
            for round in 0..60 {
                for id in 0..32 {
                    let segments: Vec<_> = (0..11).map(|at| whole(refs[(id + at * 7) % refs.len()])).collect();
                    let sector = (round * 32 + id as u64) % (SECTORS - 88);
                    let operation = [op::READ, op::WRITE][id % 2];
                    queue.submit_raw(&if indirect {
                        let table = first_table + id * 2 * PAGE_SIZE;
                        for (at, segment) in segments.iter().enumerate() {
                            memory.write_record(table + at * 8, &segment.encode());
                        }
                        Slot::indirect(Protocol::X86_64, operation, id as u64, sector, 11, &[tables[id]])
                    } else {
                        direct(operation, id as u64, sector, &segments)
                    });
                }
                for answer in answers(queue, 32) {
                    assert!((-2..=0).contains(&answer.status), "{answer:?}");
                }
            }
        });
        works(disk.queue());
        let mut page = [0; PAGE_SIZE];
        for canary in (1..disk.queue().data_refs().len()).step_by(2) {
            disk.queue().data().copy_out(canary * PAGE_SIZE, &mut page);
            assert!(page == [0xa5; PAGE_SIZE], "page {canary} was never to be written");
        }
        let mut after = [0; 300];
        file.read_exact_at(&mut after, DISK).unwrap();
        assert!(after == tail && file.metadata().unwrap().len() == DISK + 300, "bytes behind the end of the disk");
        scene.close(disk);
    }
}

/// The same with every byte of the ring's page, its indices among them. The guest may ruin its own ring and its own
/// memory, and the device may end; nobody else notices.
#[test]
fn xsa_155_any_byte_of_the_ring() {
    let mut scene = Scene::new();
    scene.attach("w");
    for round in 0..12 {
        let mut disk = scene.connect(&Options { persistent: round % 2 == 0, ..Options::default() });
        let memory = scene.hostile.memory().clone();
        let ring = place(&scene.hostile, ring_ref(&scene));
        // First the slots alone, for some time; then the indices too.
        let indices = AtomicBool::new(false);
        let mut seed = round + 1;
        let scribble = || {
            let from = if indices.load(Ordering::Relaxed) { 0 } else { HEADER };
            let random = random(&mut seed);
            memory.write_record(ring + from + (random >> 8) as usize % (PAGE_SIZE - from), &[(random >> 32) as u8]);
        };
        during(scribble, || {
            let queue = disk.queue();
            for step in 0..2000u64 {
                if step == 1500 {
                    indices.store(true, Ordering::Relaxed);
                }
                while queue.free() > 0 {
                    let gref = queue.data_refs()[step as usize % 300];
                    queue.submit_raw(&direct([op::WRITE, op::READ][step as usize % 2], step, step, &[whole(gref); 3]));
                }
                queue.publish().unwrap();
                queue.channel().notify().unwrap();
                // Our own half does not believe what stands there either.
                while let Ok(Some(_)) = queue.raw_outcome() {}
            }
        });
        scene.neighbour_works();
        disk.close();
        assert_eq!(scene.mapped(), 0);
        scene.say("1");
    }
    // And the device is as good as new.
    let mut disk = scene.connect(&Options::default());
    works(disk.queue());
    scene.close(disk);
}

/// Responses are as long as they must be, and what is padding in them is zero.
#[test]
fn xsa_216_responses_carry_nothing_of_ours() {
    for (protocol, stride, len) in [(Protocol::X86_64, 112, 16), (Protocol::X86_32, 108, 12), (Protocol::Arm, 112, 16)]
    {
        let (scene, mut disk) = Scene::connected("w", &Options { protocol, ..Options::default() });
        let queue = disk.queue();
        for round in 0..40 {
            queue.submit_raw(&Slot { bytes: [0xee; 112], protocol });
            assert_eq!(answers(queue, 1)[0].status, -2);
            let mut slot = vec![0; stride];
            queue.ring_memory().read_once(HEADER + round % 32 * stride, &mut slot);
            let response = [0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0, 0xfe, 0xff, 0, 0, 0, 0];
            assert_eq!(slot[..len], response[..len]);
            assert!(slot[len..].iter().all(|&byte| byte == 0xee), "more than the response was written");
        }
        scene.close(disk);
    }
}

/// The guest rings on and on. Its queue stays masked while it works, and longer and longer when there was nothing to
/// do; it answers no event with an event.
#[test]
fn xsa_332_an_event_storm_without_work() {
    const STORM: u64 = 200_000;
    let (mut scene, mut disk) = Scene::connected("w", &Options::default());
    let to_guest = scene.events_to_guest();
    works(disk.queue());
    let before = scene.counters().1;
    for _ in 0..STORM {
        disk.queue().channel().notify().unwrap();
    }
    let storm = scene.counters().1.since(&before);
    assert_eq!(storm.notifications + storm.notifications_suppressed, STORM);
    assert!(storm.notifications < STORM / 1000, "{} of {STORM} events woke the backend", storm.notifications);
    // The last of the two honest answers may be seen before its event is raised.
    assert!(scene.events_to_guest() <= to_guest + 2, "an event was answered with an event");
    scene.neighbour_works();
    // Both at once: the storm hurts nobody, and its own disk only in speed.
    let queue = disk.queue();
    let storm = move || queue.channel().notify().unwrap();
    during(storm, || (0..50).for_each(|_| scene.neighbour_works()));
    works(disk.queue());
    scene.close(disk);
}

/// One bad reference among many good ones, in one batch: that request fails, the others do not.
#[test]
fn xsa_361_362_365_bad_grants_in_a_batch() {
    for persistent in [true, false] {
        let (scene, mut disk) = Scene::connected("w", &Options { persistent, ..Options::default() });
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
        let queue = disk.queue();
        for &bad in &bad {
            for (which, &operation) in [op::READ, op::WRITE].iter().enumerate() {
                for id in 0..32 {
                    let mut segments: Vec<_> = queue.data_refs()[id * 5..][..5].iter().map(|&g| whole(g)).collect();
                    if id % 4 == 1 {
                        segments[(id / 4 + which) % 5].gref = bad;
                    }
                    queue.submit_raw(&direct(operation, id as u64, id as u64 * 40, &segments));
                }
                for answer in answers(queue, 32) {
                    let expected = if answer.id % 4 == 1 { -1 } else { 0 };
                    assert_eq!(answer.status, expected, "request {} with {bad:?}", answer.id);
                }
            }
            let all_bad: Vec<Segment> = vec![whole(bad); 11];
            assert_eq!(ask(queue, &direct(op::READ, 9, 0, &all_bad)), -1);
            assert_eq!(ask(queue, &Slot::indirect(Protocol::X86_64, op::READ, 9, 0, 20, &[bad])), -1);
        }
        works(disk.queue());
        scene.close(disk);
    }
}

/// Pages kept mapped for a guest are let go of however it leaves.
#[test]
fn xsa_371_kept_pages_are_returned() {
    let use_all = |disk: &mut Disk| {
        let queue = disk.queue();
        for id in 0..32 {
            let segments: Vec<_> = queue.data_refs()[id * 11..][..11].iter().map(|&gref| whole(gref)).collect();
            assert_eq!(ask(queue, &direct(op::WRITE, id as u64, 0, &segments)), 0);
        }
    };
    // In order, and many times.
    let (scene, mut disk) = Scene::connected("w", &Options::default());
    for _ in 0..5 {
        use_all(&mut disk);
        assert_eq!(scene.mapped(), 1 + 32 * 11, "the ring and the pages");
        disk.close();
        assert_eq!(scene.mapped(), 0);
        scene.say("1");
        disk = scene.connect(&Options::default());
    }
    // Without a word: the directory goes.
    use_all(&mut disk);
    scene.dom0.store.rm(&scene.front_path()).unwrap();
    until("unmapping", || scene.mapped() == 0);
    scene.end();
    // By a broken ring, and by death.
    let (scene, mut disk) = Scene::connected("w", &Options::default());
    use_all(&mut disk);
    set(disk.queue(), REQ_PROD, 1 << 20);
    disk.queue().channel().notify().unwrap();
    scene.gave_up("req_prod");
    until("unmapping", || scene.mapped() == 0);
    scene.end();
    let (scene, mut disk) = Scene::connected("w", &Options::default());
    use_all(&mut disk);
    scene.end();
}

/// A guest is woken when it asked for it, and not otherwise.
#[test]
fn xsa_391_no_event_without_need() {
    let (scene, mut disk) = Scene::connected("w", &Options::default());
    let queue = disk.queue();
    let before = scene.events_to_guest();
    set(queue, RSP_EVENT, 25);
    for id in 1..=32 {
        queue.submit_raw(&direct(255, id, 0, &[]));
        queue.publish().unwrap();
        queue.channel().notify().unwrap();
        until("an answer", || u64::from(get(queue, RSP_PROD)) == id);
    }
    until("the event", || scene.events_to_guest() > before);
    assert_eq!(scene.events_to_guest(), before + 1, "one event, at the 25th answer");
    scene.close(disk);
}

/// Once a request is answered its pages are the guest's alone: it can revoke each grant at once.
#[test]
fn xsa_396_pages_are_free_before_the_answer() {
    let (scene, mut disk) = Scene::connected("w", &Options { persistent: false, ..Options::default() });
    let first = scene.hostile.alloc_pages(12).unwrap();
    for round in 0..50 {
        let grant = |page| scene.hostile.grant(first + page, DomId(0), GrantAccess::ReadWrite).unwrap();
        let refs: Vec<GrantRef> = (0..12).map(grant).collect();
        let segments: Vec<_> = refs[..11].iter().map(|&gref| whole(gref)).collect();
        for (at, segment) in segments.iter().enumerate() {
            let table = (first + 11) as usize * PAGE_SIZE;
            scene.hostile.memory().write_record(table + at * 8, &segment.encode());
        }
        let operation = [op::READ, op::WRITE][round % 2];
        let slot = match round % 4 {
            0 | 1 => direct(operation, 1, 0, &segments),
            _ => Slot::indirect(Protocol::X86_64, operation, 1, 0, 11, &refs[11..]),
        };
        assert_eq!(ask(disk.queue(), &slot), 0);
        assert_eq!(scene.mapped(), 1, "only the ring is mapped");
        refs.into_iter().for_each(|gref| scene.hostile.revoke(gref).expect("a page of an answered request"));
    }
    scene.close(disk);
}
