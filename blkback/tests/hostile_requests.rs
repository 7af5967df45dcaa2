//! What a hostile guest can ask for in a ring that is sound.
//!
//! Rows of the checklist of what a hostile frontend can do:
//!
//! | row | test |
//! |---|---|
//! | 23 number of segments | `numbers_of_segments` |
//! | 24 number of indirect segments | `numbers_of_indirect_segments` |
//! | 25 inner operation | `inner_operations` |
//! | 26 indirect page bogus, or a data page, or the ring | `indirect_pages_that_are_something_else` |
//! | 27 indirect page changes while it is read | `xsa_155_requests_and_descriptors_are_read_once` (hostile_ring.rs) |
//! | 28, 29 segment outside its page | `segments_outside_their_page` |
//! | 30 past the end, overflow | `sectors_past_the_end` |
//! | 31 misaligned on 4K | `requests_misaligned_on_a_4k_disk` |
//! | 32 write to a read-only disk | `writes_to_a_read_only_disk`, `writes_to_a_cdrom` |
//! | 33 unknown operations | `unknown_operations` |
//! | 34 bad discards | `discards_that_make_no_sense`, `discards_that_were_not_offered` |
//! | 35 one id twice in flight | `one_id_for_all_requests` |
//! | 36 one page in many segments | `one_page_in_many_segments_and_requests` |
//! | 37 read-only grants | `read_only_grants` |
//! | 38 always new grants | `always_new_grants` |
//! | 39 barrier storm | `a_storm_of_flushes_and_barriers` |
//! | 41 thousands of bad requests | `thousands_of_bad_requests` |

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::Write;
use std::sync::{Arc, Mutex};

use blkback::abi::{Protocol, Segment, Slot, op};
use blkback::front::{Frontend, Options, Queue};
use common::LoopDevice;
use common::scene::{DISK, SECTORS, Scene, answers, ask, direct, whole, works};
use common::{Disk, XVDA, until};
use hypervisor::{DomId, GrantAccess, GrantRef, PAGE_SIZE};

const PROTOCOL: Protocol = Protocol::X86_64;

/// Runs `test` against a disk of a guest that keeps its pages, and of one that does not; the disk works afterwards.
fn each_way(test: impl Fn(&Scene, &mut Queue)) {
    for persistent in [true, false] {
        let (scene, mut disk) = Scene::connected("w", &Options { persistent, ..Options::default() });
        test(&scene, disk.queue());
        works(disk.queue());
        scene.close(disk);
    }
}

/// A direct request that says it has `count` segments.
fn counted(operation: u8, count: u8, gref: GrantRef) -> Slot {
    let mut slot = direct(operation, 7, 0, &[whole(gref); 11]);
    slot.bytes[1] = count;
    slot
}

fn indirect(operation: u8, sector: u64, count: u16, page: GrantRef) -> Slot {
    Slot::indirect(PROTOCOL, operation, 7, sector, count, &[page])
}

#[test]
fn numbers_of_segments() {
    each_way(|_, queue| {
        let gref = queue.data_refs()[0];
        for count in std::iter::once(0).chain(12..=255) {
            for operation in [op::READ, op::WRITE] {
                assert_eq!(ask(queue, &counted(operation, count, gref)), -1, "{count} segments");
            }
        }
        assert_eq!(ask(queue, &counted(op::READ, 11, gref)), 0);
    });
}

#[test]
fn numbers_of_indirect_segments() {
    each_way(|_, queue| {
        // The descriptors are good: 512 times the same page.
        let (page, data) = (queue.data_refs()[1], queue.data_refs()[2]);
        for at in 0..512 {
            queue.data().write_record(PAGE_SIZE + at * 8, &whole(data).encode());
        }
        for count in [0, 257, 512, 513, 4096, 65535] {
            for operation in [op::READ, op::WRITE] {
                assert_eq!(ask(queue, &indirect(operation, 0, count, page)), -1, "{count} segments");
            }
        }
        for count in [1, 11, 12, 255, 256] {
            assert_eq!(ask(queue, &indirect(op::READ, 0, count, page)), 0, "{count} segments");
        }
    });
}

#[test]
fn inner_operations() {
    each_way(|_, queue| {
        let page = queue.data_refs()[1];
        queue.data().write_record(PAGE_SIZE, &whole(queue.data_refs()[2]).encode());
        for operation in 2..=255 {
            assert_eq!(ask(queue, &indirect(operation, 0, 1, page)), -1, "inner operation {operation}");
        }
    });
}

#[test]
fn indirect_pages_that_are_something_else() {
    each_way(|scene, queue| {
        let refs = queue.data_refs().to_vec();
        for gref in [GrantRef(0), GrantRef(u32::MAX), GrantRef(scene.hostile.entries())] {
            assert_eq!(ask(queue, &indirect(op::READ, 0, 4, gref)), -1);
        }
        // Only one page of descriptors is ever needed; what stands behind it is not looked at.
        queue.data().write_record(PAGE_SIZE, &whole(refs[2]).encode());
        let more = [refs[1], GrantRef(u32::MAX), refs[1], refs[1]];
        assert_eq!(ask(queue, &Slot::indirect(PROTOCOL, op::READ, 1, 0, 1, &more)), 0);
        // The descriptors' own page is what is written to the disk, and what is read over.
        queue.data().write_record(PAGE_SIZE, &whole(refs[1]).encode());
        assert_eq!(ask(queue, &indirect(op::WRITE, 0, 1, refs[1])), 0);
        assert_eq!(ask(queue, &indirect(op::READ, 0, 1, refs[1])), 0);
        // The ring: its indices are no grants, and answers written meanwhile hurt nobody.
        let ring: u32 = xenstore_client::Store::read_str(&scene.store(), &format!("{}/ring-ref", scene.front_path()))
            .unwrap()
            .parse()
            .unwrap();
        assert_eq!(ask(queue, &indirect(op::WRITE, 0, 256, GrantRef(ring))), -1);
        // The ring as the data of a write is the guest's own affair.
        assert_eq!(ask(queue, &direct(op::WRITE, 7, 0, &[whole(GrantRef(ring))])), 0);
    });
}

#[test]
fn segments_outside_their_page() {
    each_way(|_, queue| {
        let (gref, page) = (queue.data_refs()[0], queue.data_refs()[1]);
        queue.data().copy_in(0, &vec![0xa5; queue.data().len()]);
        let before = |queue: &Queue| {
            let mut all = vec![0; queue.data().len()];
            queue.data().copy_out(0, &mut all);
            all.iter().enumerate().all(|(at, &byte)| at / PAGE_SIZE == 1 || byte == 0xa5)
        };
        for (first_sect, last_sect) in [(1, 0), (7, 6), (255, 0), (0, 8), (7, 8), (8, 8), (0, 255), (255, 255), (8, 7)]
        {
            let bad = Segment { gref, first_sect, last_sect };
            for operation in [op::READ, op::WRITE] {
                assert_eq!(ask(queue, &direct(operation, 7, 0, &[bad])), -1, "sectors {first_sect} to {last_sect}");
                // Also as the last of many, where the others are good.
                let segments: Vec<_> = std::iter::repeat_n(whole(gref), 10).chain([bad]).collect();
                assert_eq!(ask(queue, &direct(operation, 7, 0, &segments)), -1);
                for (at, segment) in segments.iter().enumerate() {
                    queue.data().write_record(PAGE_SIZE + at * 8, &segment.encode());
                }
                assert_eq!(ask(queue, &indirect(operation, 0, 11, page)), -1);
            }
        }
        assert!(before(queue), "a refused request changed the guest's pages");
    });
}

#[test]
fn sectors_past_the_end() {
    each_way(|scene, queue| {
        let (gref, page) = (queue.data_refs()[0], queue.data_refs()[1]);
        queue.data().write_record(PAGE_SIZE, &whole(gref).encode());
        queue.data().write_record(PAGE_SIZE + 8, &whole(gref).encode());
        for sector in [SECTORS - 7, SECTORS, SECTORS + 1, 1 << 32, 1 << 54, 1 << 55, 1 << 63, u64::MAX - 7, u64::MAX] {
            for operation in [op::READ, op::WRITE, op::FLUSH_DISKCACHE] {
                assert_eq!(ask(queue, &direct(operation, 7, sector, &[whole(gref)])), -1, "sector {sector}");
            }
            assert_eq!(ask(queue, &indirect(op::WRITE, sector, 2, page)), -1);
        }
        assert_eq!(ask(queue, &direct(op::WRITE, 7, SECTORS - 8, &[whole(gref)])), 0);
        assert_eq!(std::fs::metadata(scene.image()).unwrap().len(), DISK, "the file grew");
    });
}

#[test]
fn requests_misaligned_on_a_4k_disk() {
    let scene = Scene::new();
    let Some(device) = LoopDevice::on(&scene.image(), 4096) else {
        eprintln!("NOT TESTED: requests_misaligned_on_a_4k_disk: needs losetup, a free loop device, and root");
        return;
    };
    scene.dom0.attach(&scene.hostile, &format!("phy:{},xvda,w", device.path())).unwrap();
    let mut disk = scene.connect(&Options::default());
    assert_eq!((disk.front.disk().sector_size, disk.front.disk().sectors), (4096, SECTORS));
    let queue = disk.queue();
    let gref = queue.data_refs()[0];
    for operation in [op::READ, op::WRITE] {
        for sector in [1, 4, 7, 9, SECTORS - 9] {
            assert_eq!(ask(queue, &direct(operation, 7, sector, &[whole(gref)])), -1, "sector {sector}");
        }
        for (first_sect, last_sect) in [(0, 0), (0, 6), (1, 7), (4, 7)] {
            let half = Segment { gref, first_sect, last_sect };
            assert_eq!(ask(queue, &direct(operation, 7, 0, &[half])), -1, "sectors {first_sect} to {last_sect}");
            assert_eq!(ask(queue, &direct(operation, 7, 0, &[half; 8])), -1);
        }
    }
    works(queue);
    scene.close(disk);
}

#[test]
fn writes_to_a_read_only_disk() {
    for persistent in [true, false] {
        let (scene, mut disk) = Scene::connected("r", &Options { persistent, ..Options::default() });
        assert!(disk.front.disk().read_only());
        only_reads(&mut disk);
        assert!(std::fs::read(scene.image()).unwrap().iter().all(|&byte| byte == 0));
        scene.close(disk);
    }
}

#[test]
fn writes_to_a_cdrom() {
    let scene = Scene::new();
    scene.dom0.attach(&scene.hostile, &format!("{},raw,xvda,r,cdrom", scene.image().display())).unwrap();
    let mut disk = scene.connect(&Options::default());
    assert_eq!(disk.front.disk().info, 1 | 2 | 4);
    only_reads(&mut disk);
    scene.close(disk);
}

fn only_reads(disk: &mut Disk) {
    let queue = disk.queue();
    let (gref, page) = (queue.data_refs()[0], queue.data_refs()[1]);
    queue.data().write_record(PAGE_SIZE, &whole(gref).encode());
    queue.data().copy_in(0, &[0xee; PAGE_SIZE]);
    assert_eq!(ask(queue, &direct(op::WRITE, 7, 0, &[whole(gref)])), -1);
    assert_eq!(ask(queue, &indirect(op::WRITE, 0, 1, page)), -1);
    assert_eq!(ask(queue, &direct(op::FLUSH_DISKCACHE, 7, 0, &[whole(gref)])), -1, "a flush that brings data");
    assert!(ask(queue, &Slot::discard(PROTOCOL, 7, 0, 8, 0)) < 0);
    assert!(ask(queue, &direct(op::WRITE_BARRIER, 7, 0, &[whole(gref)])) < 0);
    assert_eq!(ask(queue, &direct(op::READ, 7, 0, &[whole(gref)])), 0);
    assert_eq!(ask(queue, &direct(op::FLUSH_DISKCACHE, 7, 0, &[])), 0, "there is nothing to flush");
}

#[test]
fn unknown_operations() {
    each_way(|_, queue| {
        let gref = queue.data_refs()[0];
        for operation in std::iter::once(4).chain(7..=255) {
            for segments in [&[][..], &[whole(gref)]] {
                assert_eq!(ask(queue, &direct(operation, 7, 0, segments)), -2, "operation {operation}");
            }
            assert_eq!(ask(queue, &counted(operation, 255, gref)), -2);
        }
    });
}

#[test]
fn discards_that_make_no_sense() {
    let (scene, mut disk) = Scene::connected("w", &Options::default());
    if !disk.front.disk().discard {
        eprintln!("NOT TESTED: discards_that_make_no_sense: the file system of {:?} has no holes", scene.image());
        return;
    }
    let queue = disk.queue();
    queue.data().copy_in(0, &[0xee; PAGE_SIZE]);
    let gref = queue.data_refs()[0];
    for sector in [0, SECTORS - 8] {
        assert_eq!(ask(queue, &direct(op::WRITE, 7, sector, &[whole(gref)])), 0);
    }
    let half = 1 << 63;
    for (sector, sectors) in [
        (0, 0),
        (SECTORS, 0),
        (0, SECTORS + 1),
        (SECTORS - 8, 9),
        (SECTORS, 1),
        (0, half),
        (half, half),
        (0, u64::MAX),
        (1, u64::MAX),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (1 << 55, 8),
    ] {
        assert_eq!(ask(queue, &Slot::discard(PROTOCOL, 7, sector, sectors, 0)), -1, "{sectors} sectors from {sector}");
    }
    let file = std::fs::read(scene.image()).unwrap();
    assert_eq!(file.len() as u64, DISK);
    assert!(file[..4096].iter().chain(&file[file.len() - 4096..]).all(|&byte| byte == 0xee), "something was discarded");
    // Secure erasure is not offered, and a plain discard is none.
    assert_eq!(ask(queue, &Slot::discard(PROTOCOL, 7, 0, 8, 1)), -2);
    assert_eq!(std::fs::read(scene.image()).unwrap()[..4096], [0xee; 4096]);
    scene.close(disk);
}

#[test]
fn discards_that_were_not_offered() {
    let scene = Scene::new();
    scene.dom0.attach(&scene.hostile, &format!("{},raw,xvda,w,no-discard", scene.image().display())).unwrap();
    let mut disk = scene.connect(&Options::default());
    assert!(!disk.front.disk().discard);
    let queue = disk.queue();
    queue.data().copy_in(0, &[0xee; PAGE_SIZE]);
    let gref = queue.data_refs()[0];
    assert_eq!(ask(queue, &direct(op::WRITE, 7, 0, &[whole(gref)])), 0);
    for (sector, sectors) in [(0, 8), (0, SECTORS), (0, 0), (0, 1 << 63)] {
        assert_eq!(ask(queue, &Slot::discard(PROTOCOL, 7, sector, sectors, 0)), -2);
    }
    assert!(std::fs::read(scene.image()).unwrap()[..4096].iter().all(|&byte| byte == 0xee));
    scene.close(disk);
}

/// A file can be discarded, not erased: freeing what was to be erased would be a lie.
#[test]
fn erasing_that_was_not_offered() {
    let (scene, mut disk) = Scene::connected("w", &Options::default());
    let offered =
        xenstore_client::Store::read_opt(&scene.dom0.store, &format!("{}/discard-secure", scene.back_path())).unwrap();
    assert!(matches!(offered.as_deref(), None | Some("0")), "{offered:?}");
    let queue = disk.queue();
    queue.data().copy_in(0, &[0xee; PAGE_SIZE]);
    let gref = queue.data_refs()[0];
    assert_eq!(ask(queue, &direct(op::WRITE, 7, 0, &[whole(gref)])), 0);
    for flag in [1, 3, 0xff] {
        assert_eq!(ask(queue, &Slot::discard(PROTOCOL, 7, 0, 8, flag)), -2);
    }
    assert!(std::fs::read(scene.image()).unwrap()[..4096].iter().all(|&byte| byte == 0xee));
    scene.close(disk);
}

#[test]
fn one_id_for_all_requests() {
    each_way(|_, queue| {
        for id in [0, 5, u64::MAX] {
            for at in 0..32 {
                let gref = queue.data_refs()[at];
                queue.submit_raw(&direct([op::READ, op::WRITE][at % 2], id, at as u64 * 8, &[whole(gref)]));
            }
            let answers = answers(queue, 32);
            assert!(answers.iter().all(|answer| answer.id == id && answer.status == 0), "{answers:?}");
            assert_eq!(answers.iter().filter(|answer| answer.operation == op::WRITE).count(), 16);
        }
    });
}

#[test]
fn one_page_in_many_segments_and_requests() {
    each_way(|scene, queue| {
        let gref = queue.data_refs()[0];
        for round in 0..10 {
            for at in 0..32 {
                let operation = [op::READ, op::WRITE][at % 2];
                queue.submit_raw(&direct(operation, at as u64, round * 100, &[whole(gref); 11]));
            }
            assert!(answers(queue, 32).iter().all(|answer| answer.status == 0));
        }
        assert!(scene.mapped() <= 2, "one page is mapped once");
    });
}

#[test]
fn read_only_grants() {
    each_way(|scene, queue| {
        let frame = scene.hostile.alloc_pages(2).unwrap();
        let memory = scene.hostile.memory();
        memory.copy_in(frame as usize * PAGE_SIZE, &[0x77; PAGE_SIZE]);
        let gref = scene.hostile.grant(frame, DomId(0), GrantAccess::ReadOnly).unwrap();
        let table = scene.hostile.grant(frame + 1, DomId(0), GrantAccess::ReadOnly).unwrap();
        memory.write_record((frame as usize + 1) * PAGE_SIZE, &whole(gref).encode());
        for _ in 0..3 {
            // To write a page to the disk is to read the page.
            assert_eq!(ask(queue, &direct(op::WRITE, 7, 16, &[whole(gref)])), 0);
            assert_eq!(ask(queue, &indirect(op::WRITE, 16, 1, table)), 0);
            assert_eq!(ask(queue, &direct(op::READ, 7, 0, &[whole(gref)])), -1);
            assert_eq!(ask(queue, &indirect(op::READ, 0, 1, table)), -1);
        }
        let mut page = [0; PAGE_SIZE];
        memory.copy_out(frame as usize * PAGE_SIZE, &mut page);
        assert!(page == [0x77; PAGE_SIZE], "a read-only page was written");
        assert!(std::fs::read(scene.image()).unwrap()[16 * 512..][..PAGE_SIZE] == page);
    });
}

/// A guest that says it uses the same pages again and again, and then never does.
#[test]
fn always_new_grants() {
    let (scene, mut disk) = Scene::connected("w", &Options::default());
    let first = scene.hostile.alloc_pages(1800).unwrap();
    let grant = |page| scene.hostile.grant(first + page, DomId(0), GrantAccess::ReadWrite).unwrap();
    let refs: Vec<GrantRef> = (0..1800).map(grant).collect();
    let queue = disk.queue();
    for chunk in refs.chunks(9) {
        let segments: Vec<_> = chunk.iter().map(|&gref| whole(gref)).collect();
        for operation in [op::WRITE, op::READ] {
            assert_eq!(ask(queue, &direct(operation, 7, 0, &segments)), 0);
        }
    }
    assert_eq!(scene.mapped(), 1 + 1056, "the ring, and as many pages as Linux keeps");
    // Those beyond were copied, and are the guest's; those kept are still used, also by an old reference.
    refs[1056..].iter().for_each(|&gref| scene.hostile.revoke(gref).unwrap());
    assert!(scene.hostile.revoke(refs[0]).is_err(), "it is mapped");
    for &gone in &refs[1056..1100] {
        assert_eq!(ask(queue, &direct(op::READ, 7, 0, &[whole(gone)])), -1, "a revoked grant");
    }
    scene.close(disk);
}

#[test]
fn a_storm_of_flushes_and_barriers() {
    let (mut scene, mut disk) = Scene::connected("w", &Options::default());
    let gref = disk.queue().data_refs()[0];
    for round in 0..20 {
        for id in 0..32 {
            let operation = if round % 2 == 0 { op::FLUSH_DISKCACHE } else { op::WRITE_BARRIER };
            let segments = if id % 2 == 0 { &[][..] } else { &[whole(gref)] };
            disk.queue().submit_raw(&direct(operation, id, 0, segments));
        }
        disk.queue().publish().unwrap();
        scene.neighbour_works();
        assert!(answers(disk.queue(), 32).iter().all(|answer| answer.status == 0));
    }
    scene.close(disk);
}

/// Everything that is logged at the level a service runs at.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// Lines of threads of this domain's queues, or about its devices.
    fn lines_about(&self, domid: DomId) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let about = |line: &&str| line.contains(&format!("{domid}.vbd")) || line.contains(&format!("/vbd/{domid}/"));
        text.lines().filter(about).map(str::to_owned).collect()
    }
}

/// They are all answered, the neighbour goes on, and the log stays short: whether the guest's requests are bad, or
/// its disk.
#[test]
fn thousands_of_bad_requests() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_thread_names(true)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .try_init()
        .unwrap();
    let mut scene = Scene::new();
    // An id of its own, so that its lines can be told from other tests'.
    let options = hypervisor::emu::GuestOptions { domid: Some(DomId(777)), ..Default::default() };
    scene.hostile = Arc::new(scene.dom0.machine.create_guest(options).unwrap());
    scene.attach("w");
    let mut disk = scene.connect(&Options::default());
    let bad = |queue: &Queue, number: u64| match number % 4 {
        0 => direct(255, number, 0, &[]),
        1 => direct(op::READ, number, u64::MAX, &[whole(queue.data_refs()[0])]),
        2 => direct(op::WRITE, number, 0, &[whole(GrantRef(u32::MAX))]),
        _ => counted(op::READ, 200, queue.data_refs()[0]),
    };
    for round in 0..200 {
        for at in 0..32 {
            let slot = bad(disk.queue(), round * 32 + at);
            disk.queue().submit_raw(&slot);
        }
        assert!(answers(disk.queue(), 32).iter().all(|answer| answer.status < 0));
        if round % 20 == 0 {
            scene.neighbour_works();
        }
    }
    // Now good requests on a file that somebody has cut off.
    std::fs::File::options().write(true).open(scene.image()).unwrap().set_len(4096).unwrap();
    for _ in 0..100 {
        for id in 0..32 {
            let gref = disk.queue().data_refs()[0];
            disk.queue().submit_raw(&direct(op::READ, id, 64, &[whole(gref)]));
        }
        assert!(answers(disk.queue(), 32).iter().all(|answer| answer.status == -1));
    }
    until("a line in the log", || !log.lines_about(DomId(777)).is_empty());
    let lines = log.lines_about(DomId(777));
    assert!(lines.len() < 60, "{} lines for 9600 requests, such as {:?}", lines.len(), lines.last());
    assert!(lines.iter().any(|line| line.contains("request failed")), "the first failure is told: {lines:#?}");
    scene.close(disk);
}

/// A guest with two disks ruins one; the other does not notice.
#[test]
fn the_guests_own_other_disk_goes_on() {
    let (scene, mut disk) = Scene::connected("w", &Options::default());
    let image = scene.dom0.image("other.img", 1 << 20);
    scene.dom0.attach(&scene.hostile, &format!("{},raw,xvdb,w", image.display())).unwrap();
    let mut other = Frontend::connect(scene.hostile.clone(), XVDA + 16, &Options::default()).unwrap();
    let mut queues = other.take_queues();
    let gref = disk.queue().data_refs()[0];
    disk.queue().submit_raw(&direct(op::READ, 1, u64::MAX, &[whole(gref)]));
    assert_eq!(answers(disk.queue(), 1)[0].status, -1);
    disk.queue().ring_memory().atomic_u32(0).store(1 << 20, std::sync::atomic::Ordering::SeqCst);
    disk.queue().channel().notify().unwrap();
    scene.gave_up("req_prod");
    works(&mut queues[0]);
    other.close(queues).unwrap();
    scene.close(disk);
}
