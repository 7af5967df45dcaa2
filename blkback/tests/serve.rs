//! Disks served from end to end: XenStore, ring, grants, event channel and io_uring, in one process.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::os::unix::fs::MetadataExt;

use blkback::abi::{Protocol, op};
use blkback::device::Config;
use blkback::front::{Options, Piece, Queue};
use blkback::negotiate::Limits;
use common::{Disk, Dom0, LoopDevice, outcomes, status};

/// A whole page of the pool.
fn page(page: u32) -> Piece {
    Piece { page, first: 0, last: 7 }
}

fn pattern(seed: u64, page: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(page) << 32 | 1;
    (0..4096)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// Writes `pages` pages at `sector`, reads them into other pages, and compares.
fn round_trip(queue: &mut Queue, sector: u64, pages: u32, seed: u64) {
    let pieces: Vec<_> = (0..pages).map(page).collect();
    for number in 0..pages {
        queue.data().copy_in(number as usize * 4096, &pattern(seed, number));
    }
    queue.submit(op::WRITE, sector, &pieces, 1);
    assert_eq!(status(queue), 0, "write");
    let pieces: Vec<_> = (pages..2 * pages).map(page).collect();
    queue.submit(op::READ, sector, &pieces, 2);
    assert_eq!(status(queue), 0, "read");
    let mut back = vec![0; 4096];
    for number in 0..pages {
        queue.data().copy_out((pages + number) as usize * 4096, &mut back);
        assert!(back == pattern(seed, number), "page {number} of {pages} at sector {sector}");
    }
}

/// Every layout, ring size, number of queues and way to the guest's pages, direct and indirect requests through each.
#[test]
fn every_shape_of_ring() {
    for persistent in [true, false] {
        let dom0 = Dom0::with(Config { limits: Limits { queues: 4, ..Limits::default() }, ..Config::default() });
        let image = dom0.image("disk.img", 8 << 20);
        for protocol in [Protocol::X86_64, Protocol::X86_32, Protocol::Arm] {
            for (ring_order, queues) in [(0, 1), (1, 1), (4, 1), (0, 2), (2, 4)] {
                let options =
                    Options { protocol, ring_order, queues, persistent, pool_pages: 128, ..Options::default() };
                let mut disk = dom0.connected(&image, "w", &options);
                assert_eq!(disk.queues.len(), queues as usize);
                for (number, queue) in disk.queues.iter_mut().enumerate() {
                    assert_eq!(queue.slots(), 32 << ring_order);
                    for pages in [1, 11, 12, 64] {
                        round_trip(queue, number as u64 * 2048, pages, u64::from(pages) + 1000 * number as u64);
                    }
                    // More requests than the ring has slots, so that its indices wrap.
                    for round in 0..2 * queue.slots() {
                        queue.submit(op::READ, 0, &[page(round % 128)], 7);
                        assert_eq!(status(queue), 0);
                    }
                }
                let guest = disk.guest.clone();
                disk.close();
                dom0.detach(&guest, "xvda");
            }
        }
    }
}

/// A guest that does not name its layout is a 32-bit one.
#[test]
fn a_guest_that_names_no_protocol_is_a_32_bit_guest() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let options = Options { protocol: Protocol::X86_32, name_protocol: false, ..Options::default() };
    let mut disk = dom0.connected(&image, "w", &options);
    round_trip(disk.queue(), 8, 4, 1);
    disk.close();
}

#[test]
fn a_full_ring_of_small_requests_with_odd_sectors() {
    for persistent in [true, false] {
        let dom0 = Dom0::start();
        let image = dom0.image("disk.img", 1 << 20);
        let mut disk = dom0.connected(&image, "w", &Options { persistent, ..Options::default() });
        let queue = disk.queue();
        for round in 0..32u32 {
            queue.data().copy_in(round as usize * 4096, &pattern(9, round));
            // Three sectors from the third of each page.
            let piece = Piece { page: round, first: 2, last: 4 };
            queue.submit(op::WRITE, u64::from(round) * 3, &[piece], round.into());
        }
        assert!(outcomes(queue, 32).iter().all(|outcome| outcome.status == 0));
        let file = std::fs::read(&image).unwrap();
        for round in 0..32 {
            let written = &file[round * 1536..round * 1536 + 1536];
            assert!(written == &pattern(9, round as u32)[1024..2560], "request {round}");
        }
        disk.close();
    }
}

#[test]
fn discard_frees_the_file_and_reads_as_zeros() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 4 << 20);
    let mut disk = dom0.connected(&image, "w", &Options::default());
    if !disk.front.disk().discard {
        eprintln!("NOT TESTED: discard: the file system of {} cannot punch holes", image.display());
        return;
    }
    let queue = disk.queue();
    for sector in (0..2048).step_by(64) {
        round_trip(queue, sector, 8, sector);
    }
    queue.submit(op::FLUSH_DISKCACHE, 0, &[], 3);
    assert_eq!(status(queue), 0);
    let before = std::fs::metadata(&image).unwrap().blocks();
    // From the middle of a block to the middle of another: no byte outside may change.
    queue.submit_discard(1, 2000, 4);
    assert_eq!(status(queue), 0);
    let after = std::fs::metadata(&image).unwrap();
    assert!(after.blocks() < before && after.len() == 4 << 20, "{} blocks, then {}", before, after.blocks());
    let file = std::fs::read(&image).unwrap();
    assert!(file[..512] == pattern(0, 0)[..512], "the sector before");
    assert!(file[512..2001 * 512].iter().all(|&byte| byte == 0), "discarded sectors read as zeros");
    assert!(file[2001 * 512..].iter().any(|&byte| byte != 0), "the sectors behind");
    disk.close();
}

/// backendtype=tap of Xen 4.19 and newer: another directory, `params` with a format before the path.
#[test]
fn the_directory_that_libxl_writes_for_backendtype_tap() {
    use std::sync::Arc;

    use blkback::device::VbdKind;
    use hypervisor::emu::Member;
    use hypervisor::{Backend, DomId, Guest};
    use xenstore_client::Store;
    use xenstore_client::xenbus::driver::{Driver, StopHandle};
    use xenstore_client::xenbus::{State, toolstack};

    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let xen: Arc<dyn Backend> = Arc::new(Member::local(&dom0.machine, DomId::DOM0).unwrap());
    let stop = StopHandle::new().unwrap();
    let kind = VbdKind::new("vbd3", xen, Config::default());
    let mut driver = Driver::new(dom0.store.clone(), DomId::DOM0, kind).unwrap();
    let server = std::thread::spawn({
        let stop = stop.clone();
        move || driver.run(&stop).unwrap()
    });

    let guest = dom0.guest("guest");
    let frontend = Guest::domid(&*guest);
    let device = toolstack::DeviceAddress {
        kind: "vbd3",
        frontend_kind: "vbd",
        backend: DomId::DOM0,
        frontend,
        devid: common::XVDA,
    };
    let params = format!("aio:{}", image.display());
    toolstack::add_device(&dom0.store, &device, &[("params", &params), ("mode", "w")], &[]).unwrap();
    let back = device.backend_path();
    let state = format!("{back}/state");
    toolstack::wait_state(&dom0.store, &state, &[State::InitWait], common::PATIENCE).unwrap();
    dom0.store.write(&format!("{back}/hotplug-status"), "connected").unwrap();
    let mut front = blkback::front::Frontend::connect(guest.clone(), common::XVDA, &Options::default()).unwrap();
    let mut queues = front.take_queues();
    round_trip(&mut queues[0], 0, 4, 1);
    front.close(queues).unwrap();
    toolstack::remove_device(&dom0.store, &device, common::PATIENCE, false, || Ok(())).unwrap();
    // A guest's seat is its domain: it had to outlive the disk.
    drop(guest);
    stop.stop();
    server.join().unwrap();
}

/// Barriers on all queues at once, from threads that do not know of each other: each is answered, and what one queue
/// wrote before its barrier is on the disk after it.
#[test]
fn barriers_on_every_queue() {
    let limits = Limits { queues: 4, flush: false, ..Limits::default() };
    let dom0 = Dom0::with(Config { limits, ..Config::default() });
    let image = dom0.image("disk.img", 8 << 20);
    let options = Options { queues: 4, pool_pages: 32, ..Options::default() };
    let mut disk = dom0.connected(&image, "w", &options);
    std::thread::scope(|scope| {
        for (number, queue) in disk.queues.iter_mut().enumerate() {
            scope.spawn(move || {
                let first = number as u64 * 2048;
                for round in 0..40u32 {
                    for slot in 0..8 {
                        queue.data().copy_in(slot as usize * 4096, &pattern(u64::from(round) << 8 | first, slot));
                        queue.submit(op::WRITE, first + 8 * u64::from(slot), &[page(slot)], u64::from(slot));
                    }
                    let with_data = round % 3 != 0;
                    queue.submit(op::WRITE_BARRIER, first + 64, &[page(0)][..usize::from(with_data)], 8);
                    let mut seen: Vec<_> = outcomes(queue, 9).iter().map(|done| (done.tag, done.status)).collect();
                    seen.sort_unstable();
                    assert_eq!(seen, (0..9).map(|tag| (tag, 0)).collect::<Vec<_>>(), "queue {number}, round {round}");
                }
            });
        }
    });
    disk.close();
}

/// A guest with sectors of 512 bytes on a file system whose disk has 4096: direct I/O all the same, from two queues that
/// write into the same blocks.
#[test]
fn small_sectors_on_large_ones() {
    let dir = tempfile::tempdir().unwrap();
    let (below, place) = (dir.path().join("below.img"), dir.path().join("place"));
    std::fs::File::create(&below).unwrap().set_len(64 << 20).unwrap();
    std::fs::create_dir(&place).unwrap();
    let run = |program: &str, args: &[&str]| {
        std::process::Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
    };
    let place_name = place.to_str().unwrap();
    let device = LoopDevice::on(&below, 4096)
        .filter(|device| run("mkfs.ext4", &["-q", "-b", "4096", device.path()]))
        .filter(|device| run("mount", &[device.path(), place_name]));
    let Some(_device) = device else {
        println!("NOT TESTED: sectors of 4096 bytes under files: needs loop devices, mkfs.ext4 and the right to mount");
        return;
    };
    /// Unmounted before the loop device goes.
    struct Mounted<'a>(&'a str);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let done = std::process::Command::new("umount").arg(self.0).status();
            assert!(done.is_ok_and(|status| status.success()) || std::thread::panicking(), "umount {}", self.0);
        }
    }
    let _mounted = Mounted(place_name);
    let dom0 = Dom0::with(Config { limits: Limits { queues: 2, ..Limits::default() }, ..Config::default() });
    let image = place.join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    assert_eq!(blkback::image::Image::open(&image, blkback::spec::Access::Write).unwrap().unit, 4096);
    let options = Options { queues: 2, pool_pages: 32, ..Options::default() };
    let mut disk = dom0.connected(&image, "w", &options);
    assert_eq!(disk.front.disk().sector_size, 512);
    // Even sectors are one queue's, odd ones the other's.
    std::thread::scope(|scope| {
        for (number, queue) in disk.queues.iter_mut().enumerate() {
            scope.spawn(move || {
                for round in 1..=20u8 {
                    for sector in (number as u64..256).step_by(2) {
                        let slot = (sector / 2 % 16) as u32;
                        queue.data().copy_in(slot as usize * 4096 + 512, &[round ^ sector as u8; 512]);
                        let piece = Piece { page: slot, first: 1, last: 1 };
                        queue.submit(op::WRITE, sector, &[piece], sector);
                        if slot == 15 {
                            assert!(outcomes(queue, 16).iter().all(|done| done.status == 0));
                        }
                    }
                }
            });
        }
    });
    let queue = disk.queue();
    for sector in 0..256u64 {
        queue.submit(op::READ, sector, &[Piece { page: 0, first: 3, last: 3 }], 1);
        assert_eq!(status(queue), 0);
        let mut seen = [0; 512];
        queue.data().copy_out(3 * 512, &mut seen);
        assert!(seen == [20 ^ sector as u8; 512], "sector {sector}: {:?}", &seen[..4]);
    }
    disk.close();
}

/// A block device is served like a file: read, written, flushed, and freed by discards.
#[test]
fn a_block_device() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 4 << 20);
    for sector_size in [512, 4096] {
        let Some(device) = LoopDevice::on(&image, sector_size) else {
            println!("NOT TESTED: block devices: needs losetup, a free loop device, and root");
            return;
        };
        let guest = dom0.guest("guest");
        dom0.attach(&guest, &format!("phy:{},xvda,w", device.path())).unwrap();
        let mut front = blkback::front::Frontend::connect(guest.clone(), common::XVDA, &Options::default()).unwrap();
        assert_eq!((front.disk().sectors, front.disk().sector_size), (8192, sector_size));
        assert!(front.disk().discard, "a loop device can discard");
        let secure = xenstore_client::Store::read_opt(&dom0.store, &format!("{}/discard-secure", front.backend_path()));
        assert_eq!(secure.unwrap().as_deref(), Some("0"), "it cannot erase");
        let mut queues = front.take_queues();
        for sector in (0..2048).step_by(64) {
            round_trip(&mut queues[0], sector, 8, sector);
        }
        queues[0].submit(op::FLUSH_DISKCACHE, 0, &[], 1);
        assert_eq!(status(&mut queues[0]), 0);
        let before = std::fs::metadata(&image).unwrap().blocks();
        queues[0].submit_discard(8, 2000, 2);
        assert_eq!(status(&mut queues[0]), 0);
        queues[0].submit(op::FLUSH_DISKCACHE, 0, &[], 3);
        assert_eq!(status(&mut queues[0]), 0);
        let file = std::fs::read(&image).unwrap();
        assert!(file[..4096] == pattern(0, 0)[..], "what lies before");
        assert!(file[4096..2008 * 512].iter().all(|&byte| byte == 0), "what was discarded");
        assert!(std::fs::metadata(&image).unwrap().blocks() < before, "the file behind the device got smaller");
        front.close(queues).unwrap();
        dom0.detach(&guest, "xvda");
    }
}

/// A block device with sectors of 4096 bytes has sectors of 512 for a guest that needs them.
#[test]
fn small_sectors_on_a_block_device_with_large_ones() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 4 << 20);
    std::fs::write(&image, vec![0x11; 4 << 20]).unwrap();
    let Some(device) = LoopDevice::on(&image, 4096) else {
        println!("NOT TESTED: block devices: needs losetup, a free loop device, and root");
        return;
    };
    let guest = dom0.guest("guest");
    dom0.attach(&guest, &format!("{},,xvda,w,sector-size=512", device.path())).unwrap();
    let mut front = blkback::front::Frontend::connect(guest.clone(), common::XVDA, &Options::default()).unwrap();
    let physical = format!("{}/physical-sector-size", front.backend_path());
    assert_eq!((front.disk().sectors, front.disk().sector_size), (8192, 512));
    assert_eq!(xenstore_client::Store::read_str(&dom0.store, &physical).unwrap(), "4096");
    let mut queues = front.take_queues();
    let queue = &mut queues[0];
    queue.data().copy_in(0, &[0x22; 4096]);
    for sector in [0, 9, 8191] {
        queue.submit(op::WRITE, sector, &[Piece { page: 0, first: 2, last: 2 }], sector);
        assert_eq!(status(queue), 0);
    }
    queue.submit(op::READ, 8, &[Piece { page: 1, first: 0, last: 2 }], 1);
    assert_eq!(status(queue), 0);
    let mut seen = [0; 3 * 512];
    queue.data().copy_out(4096, &mut seen);
    assert!(seen[..512] == [0x11; 512] && seen[512..1024] == [0x22; 512] && seen[1024..] == [0x11; 512]);
    // A discard gives up the whole units inside of it, and nothing else.
    queue.submit_discard(15, 18, 2);
    assert_eq!(status(queue), 0);
    queue.submit(op::FLUSH_DISKCACHE, 0, &[], 3);
    assert_eq!(status(queue), 0);
    let file = std::fs::read(&image).unwrap();
    for (sector, expected) in
        [(0, 0x22), (1, 0x11), (8, 0x11), (9, 0x22), (10, 0x11), (15, 0x11), (16, 0), (31, 0), (32, 0x11), (8191, 0x22)]
    {
        let bytes = &file[sector * 512..(sector + 1) * 512];
        assert!(bytes.iter().all(|&byte| byte == expected), "sector {sector}: {:#x}", bytes[0]);
    }
    front.close(queues).unwrap();
    dom0.detach(&guest, "xvda");
    // Two backends would undo each other's writes.
    let image = blkback::image::Image::open(std::path::Path::new(device.path()), blkback::spec::Access::SharedWrite);
    let error = image.unwrap().have_small_sectors(blkback::spec::Access::SharedWrite).unwrap_err();
    assert!(error.to_string().contains("w!"), "{error}");
}

/// A device that promises no zeros is not told to make holes, but to discard: by a call of the kernel's, off the queue's
/// thread.
#[test]
fn a_device_discards_without_holes() {
    use blkback::storage::{Sleep, Storage, UringStorage};
    use std::os::fd::AsFd;

    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    std::fs::write(&image, vec![7; 1 << 20]).unwrap();
    let Some(device) = LoopDevice::on(&image, 512) else {
        println!("NOT TESTED: BLKDISCARD: needs losetup, a free loop device, and root");
        return;
    };
    let before = std::fs::metadata(&image).unwrap().blocks();
    let file = std::fs::File::options().read(true).write(true).open(device.path()).unwrap();
    let erase = blkback::erase::discards_of_device(&file).unwrap();
    let mut storage = UringStorage::with_eraser(file.as_fd(), &[], 8, Some(erase)).unwrap();
    storage.discard(4096, (1 << 20) - 8192, 5);
    let done = loop {
        match storage.next() {
            Some(done) => break done,
            None => storage.wait(None).unwrap(),
        }
    };
    assert_eq!(done.token, 5);
    done.result.unwrap();
    rustix::fs::fdatasync(&file).unwrap();
    let bytes = std::fs::read(&image).unwrap();
    assert!(bytes[..4096].iter().chain(&bytes[(1 << 20) - 4096..]).all(|&byte| byte == 7), "what is around it");
    assert!(std::fs::metadata(&image).unwrap().blocks() < before, "the file behind the device got smaller");
}

#[test]
fn many_guests_and_disks_at_once() {
    let dom0 = Dom0::start();
    let threads: Vec<_> = (0..8)
        .map(|number| {
            let image = dom0.image(&format!("{number}.img"), 1 << 20);
            let mut disk = dom0.connected(&image, "w", &Options::default());
            std::thread::spawn(move || {
                for round in 0..50 {
                    round_trip(disk.queue(), round * 8, 8, round + number * 1000);
                }
                disk.close();
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(dom0.machine.domains().iter().map(|domain| domain.mapped).sum::<u32>(), 0, "pages still mapped");
}

/// Requests that were in the ring when the guest closes are answered before its pages are let go.
#[test]
fn closing_waits_for_what_is_in_flight() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let mut disk = dom0.connected(&image, "w", &Options::default());
    for round in 0..32 {
        disk.queue().submit(op::WRITE, round * 8, &[page(round as u32)], round);
    }
    disk.queue().publish().unwrap();
    let guest = disk.guest.clone();
    disk.close();
    dom0.detach(&guest, "xvda");
    assert_eq!(dom0.machine.domains().iter().map(|domain| domain.mapped).sum::<u32>(), 0);
}

/// `xl save -c`, or a migration that failed: the guest stops where it stands, and goes on with the same rings. A backend
/// is told nothing of it; it must have done its part and wait, however long the answers lie there.
#[test]
fn a_guest_is_suspended_and_goes_on() {
    let dom0 = Dom0::start();
    for persistent in [true, false] {
        let image = dom0.image(&format!("{persistent}.img"), 1 << 20);
        let options = Options { queues: 2, persistent, pool_pages: 64, ..Options::default() };
        let mut disk = dom0.connected(&image, "w", &options);
        let watch = dom0.store.watcher().unwrap();
        let state = format!("{}/state", disk.front.backend_path());
        round_trip(disk.queue(), 0, 4, 9);
        // Suspended with requests on their way and answers not taken.
        for (nth, queue) in disk.queues.iter_mut().enumerate() {
            for slot in 0..32 {
                queue.data().copy_in(slot as usize * 4096, &pattern(slot, nth as u32));
                queue.submit(op::WRITE, 64 + (nth as u64 * 32 + slot) * 8, &[page(slot as u32)], slot);
            }
            queue.publish().unwrap();
        }
        let written = |nth: u32, slot: u64| {
            let at = (64 + (u64::from(nth) * 32 + slot) * 8) * 512;
            std::fs::read(&image).unwrap()[at as usize..][..4096] == pattern(slot, nth)
        };
        common::until("everything is written", || (0..2).all(|nth| (0..32).all(|slot| written(nth, slot))));
        watch.add(&state, "state").unwrap();
        while watch.wait(std::time::Duration::from_millis(200)).unwrap().is_some() {}
        let mapped = || dom0.machine.domains().iter().map(|domain| domain.mapped).sum::<u32>();
        let before = mapped();
        // Resumed. Some drivers write their state again, others nothing at all.
        let own = format!("{}/state", disk.front.path());
        xenstore_client::Store::write(&hypervisor::Guest::store(&*disk.guest).unwrap(), &own, "4").unwrap();
        for queue in &mut disk.queues {
            let done = outcomes(queue, 32);
            assert!(done.iter().all(|outcome| outcome.status == 0));
        }
        for (nth, queue) in disk.queues.iter_mut().enumerate() {
            for slot in 0..32 {
                queue.submit(op::READ, 64 + (nth as u64 * 32 + slot) * 8, &[page(slot as u32)], slot);
            }
            assert!(outcomes(queue, 32).iter().all(|outcome| outcome.status == 0));
            for slot in 0..32 {
                let mut back = vec![0; 4096];
                queue.data().copy_out(slot as usize * 4096, &mut back);
                assert!(back == pattern(slot, nth as u32), "queue {nth}, slot {slot}");
            }
            round_trip(queue, 1024, 4, 77);
        }
        assert!(watch.next().unwrap().is_none(), "the backend's state was not touched");
        assert_eq!(mapped(), before);
        let guest = disk.guest.clone();
        disk.close();
        dom0.detach(&guest, "xvda");
    }
}

/// A guest that resumes with new rings and does not say goodbye to the old ones: 4, then 1, then 3.
#[test]
fn a_guest_resumes_with_new_rings() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let mut disk = dom0.connected(&image, "w", &Options { queues: 2, ..Options::default() });
    let mut left = Vec::new();
    for round in 0..5u64 {
        round_trip(disk.queue(), 256, 4, round);
        // On their way when it is suspended; nobody will take the answers.
        for slot in 0..4 {
            disk.queue().data().copy_in(slot * 4096, &pattern(round, slot as u32));
            disk.queue().submit(op::WRITE, slot as u64 * 8, &[page(slot as u32)], 0);
        }
        disk.queue().publish().unwrap();
        let own = format!("{}/state", disk.front.path());
        xenstore_client::Store::write(&hypervisor::Guest::store(&*disk.guest).unwrap(), &own, "1").unwrap();
        let options = Options { queues: 2, ..Options::default() };
        let mut front = blkback::front::Frontend::connect(disk.guest.clone(), common::XVDA, &options).unwrap();
        let queues = front.take_queues();
        let Disk { guest, front: old, queues: old_queues } = disk;
        // Its memory stays the guest's, as a resumed guest keeps what it cannot give back.
        left.push((old, old_queues));
        disk = Disk { guest, front, queues };
        for slot in 0..4u32 {
            disk.queue().submit(op::READ, u64::from(slot) * 8, &[page(slot)], 0);
            assert_eq!(status(disk.queue()), 0);
            let mut back = vec![0; 4096];
            disk.queue().data().copy_out(slot as usize * 4096, &mut back);
            assert!(back == pattern(round, slot), "what was on its way is done before the new rings are served");
        }
    }
    let guest = disk.guest.clone();
    disk.close();
    dom0.detach(&guest, "xvda");
    let mapped = dom0.machine.domains().iter().map(|domain| domain.mapped).sum::<u32>();
    assert_eq!(mapped, 0, "nothing of the old rings is mapped");
}

/// The guest unloads its driver and loads it again, as pvgrub and the kernel after it do.
#[test]
fn a_guest_reconnects() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let guest = dom0.guest("guest");
    dom0.attach(&guest, &format!("{},raw,xvda,w", image.display())).unwrap();
    for round in 0..5 {
        let mut front = blkback::front::Frontend::connect(guest.clone(), common::XVDA, &Options::default()).unwrap();
        let mut queues = front.take_queues();
        round_trip(&mut queues[0], 0, 4, round);
        front.close(queues).unwrap();
        // The driver loads anew.
        let path = format!("/local/domain/{}/device/vbd/{}/state", hypervisor::Guest::domid(&*guest), common::XVDA);
        xenstore_client::Store::write(&hypervisor::Guest::store(&*guest).unwrap(), &path, "1").unwrap();
    }
    dom0.detach(&guest, "xvda");
}
