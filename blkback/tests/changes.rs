//! A disk that changes while a guest uses it: it grows, it is exchanged, its storage is full.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use blkback::abi::op;
use blkback::device::{MEDIUM_STATUS, ON_HOLD, RESIZE};
use blkback::drive;
use blkback::front::{Options, Piece, Queue};
use blkback::image::Image;
use blkback::spec::Access;
use blkback::vdev::Vdev;
use common::{Disk, Dom0, LoopDevice, outcomes, status, until};
use hypervisor::{DomId, Guest};
use xenstore_client::Store;

fn key(dom0: &Dom0, disk: &Disk, name: &str) -> Option<String> {
    dom0.store.read_opt(&format!("{}/{name}", disk.front.backend_path())).unwrap()
}

fn tell(dom0: &Dom0, disk: &Disk, name: &str, value: &str) {
    dom0.store.write(&format!("{}/{name}", disk.front.backend_path()), value).unwrap();
}

fn whole(page: u32) -> Piece {
    Piece { page, first: 0, last: 7 }
}

/// Reads a page's worth of sectors and returns the first byte, or the status.
fn first_byte(queue: &mut Queue, sector: u64) -> Result<u8, i16> {
    queue.submit(op::READ, sector, &[whole(0)], 1);
    match status(queue) {
        0 => {
            let mut byte = [0];
            queue.data().copy_out(0, &mut byte);
            Ok(byte[0])
        }
        other => Err(other),
    }
}

fn grow(path: &Path, bytes: u64) {
    File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

/// On command, and by itself; all queues know of it before the guest does.
#[test]
fn a_file_that_grows() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let mut disk = dom0.connected(&image, "w", &Options { queues: 2, ..Options::default() });
    assert_eq!(first_byte(disk.queue(), 2048), Err(-1), "past the end");
    for (megabytes, on_command) in [(2, true), (3, false)] {
        grow(&image, megabytes << 20);
        if on_command {
            let (vdev, domid) = (Vdev::parse("xvda").unwrap(), Guest::domid(&*disk.guest));
            let sizes = drive::resize(&dom0.store, DomId::DOM0, domid, vdev).unwrap();
            assert_eq!(sizes, (2048, 4096));
        }
        let sectors = (megabytes * 2048).to_string();
        until("the guest is told", || key(&dom0, &disk, "sectors").as_deref() == Some(&sectors));
        assert_eq!(key(&dom0, &disk, "state").as_deref(), Some("4"));
        for queue in &mut disk.queues {
            assert_eq!(first_byte(queue, megabytes * 2048 - 8), Ok(0));
            assert_eq!(first_byte(queue, megabytes * 2048), Err(-1));
        }
    }
    grow(&image, 1 << 20);
    tell(&dom0, &disk, RESIZE, "1");
    assert_eq!(first_byte(disk.queue(), 4096), Err(-1), "what was cut off gives errors");
    assert_eq!(first_byte(disk.queue(), 0), Ok(0));
    assert_eq!(key(&dom0, &disk, "sectors").as_deref(), Some("6144"), "a guest cannot be told to need less");
    disk.close();
}

#[test]
fn a_block_device_that_grows() {
    let dom0 = Dom0::start();
    let image = dom0.image("below.img", 1 << 20);
    let Some(device) = LoopDevice::on(&image, 512) else {
        println!("NOT TESTED: a block device that grows: there are no loop devices here");
        return;
    };
    let mut disk = dom0.connected(Path::new(device.path()), "w", &Options::default());
    grow(&image, 2 << 20);
    assert!(Command::new("losetup").args(["--set-capacity", device.path()]).status().unwrap().success());
    tell(&dom0, &disk, RESIZE, "1");
    until("the guest is told", || key(&dom0, &disk, "sectors").as_deref() == Some("4096"));
    assert_eq!(first_byte(disk.queue(), 4088), Ok(0));
    // And shrinks, and grows again.
    grow(&image, 1 << 20);
    assert!(Command::new("losetup").args(["--set-capacity", device.path()]).status().unwrap().success());
    let (vdev, domid) = (Vdev::parse("xvda").unwrap(), Guest::domid(&*disk.guest));
    let look = || drive::resize(&dom0.store, DomId::DOM0, domid, vdev).map_err(|error| error.to_string());
    let error = look().unwrap_err();
    assert!(error.contains("has 2048 sectors now") && error.contains("keeps its 4096"), "{error}");
    assert_eq!(first_byte(disk.queue(), 4088), Err(-1));
    assert_eq!(first_byte(disk.queue(), 2040), Ok(0));
    assert_eq!(key(&dom0, &disk, "sectors").as_deref(), Some("4096"));
    grow(&image, 3 << 20);
    assert!(Command::new("losetup").args(["--set-capacity", device.path()]).status().unwrap().success());
    assert_eq!(look(), Ok((4096, 6144)));
    assert_eq!(first_byte(disk.queue(), 6136), Ok(0));
    disk.close();
}

/// Nobody has to ask: what is wrong stands in `blkback list` within the period in which the backend looks by itself.
#[test]
fn a_file_that_shrinks() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let disk = dom0.connected(&image, "w", &Options::default());
    let listed = || blkback::toolstack::list(&dom0.store, Guest::domid(&*disk.guest), None).unwrap();
    grow(&image, 1 << 19);
    until("the list says so", || listed().contains("has 1024 sectors now"));
    grow(&image, 1 << 20);
    until("the list is content again", || !listed().contains("sectors"));
    disk.close();
}

/// Out, empty, in again: the guest sees sizes change, and never a byte of the other disk.
#[test]
fn a_disk_is_exchanged_in_its_drive() {
    let dom0 = Dom0::start();
    let images = [(1u8, 1 << 20), (2, 2 << 20)].map(|(number, bytes)| {
        let path = dom0.image(&format!("{number}.iso"), bytes);
        File::options().write(true).open(&path).unwrap().write_all_at(&[number; 4096], 0).unwrap();
        path
    });
    let guest = dom0.guest("guest");
    dom0.attach(&guest, &format!("{},raw,xvdd,r,cdrom", images[0].display()).replace(",r,cdrom", ":cdrom,r")).unwrap();
    let mut front = blkback::front::Frontend::connect(guest.clone(), 51712 + 3 * 16, &Options::default()).unwrap();
    let queues = front.take_queues();
    let mut disk = Disk { guest, front, queues };
    assert_eq!(first_byte(disk.queue(), 0), Ok(1));
    let change = |disk: &Disk, target: Option<&Path>| {
        let vdev = Vdev::parse("xvdd").unwrap();
        let target = target.map(|path| path.to_str().unwrap());
        drive::change(&dom0.store, DomId::DOM0, Guest::domid(&*disk.guest), vdev, target)
            .map_err(|error| error.to_string())
    };
    let shows = |disk: &Disk, sectors: &str| {
        until("the guest is told", || key(&dom0, disk, "sectors").as_deref() == Some(sectors));
    };
    for _ in 0..3 {
        change(&disk, None).unwrap();
        shows(&disk, "0");
        assert_eq!(first_byte(disk.queue(), 0), Err(-1));
        // A child that another test of this process has just forked holds all our files until it becomes its program.
        until("an ejected disk is let go", || Image::open(&images[0], Access::Write).is_ok());
        assert!(change(&disk, Some(Path::new("/no/such.iso"))).unwrap_err().contains("no such file"));
        change(&disk, Some(&images[1])).unwrap();
        shows(&disk, "4096");
        assert_eq!(first_byte(disk.queue(), 0), Ok(2));
        change(&disk, Some(&images[0])).unwrap();
        shows(&disk, "2048");
        assert_eq!(first_byte(disk.queue(), 0), Ok(1));
    }
    disk.close();
}

#[test]
fn a_fixed_disk_is_not_exchanged() {
    let dom0 = Dom0::start();
    let (image, other) = (dom0.image("disk.img", 1 << 20), dom0.image("other.img", 2 << 20));
    let mut disk = dom0.connected(&image, "w", &Options::default());
    let (vdev, domid) = (Vdev::parse("xvda").unwrap(), Guest::domid(&*disk.guest));
    let error = drive::change(&dom0.store, DomId::DOM0, domid, vdev, Some(other.to_str().unwrap())).unwrap_err();
    assert!(error.to_string().contains("fixed disk"), "{error}");
    // Nor when the key is written past the command.
    tell(&dom0, &disk, "params", other.to_str().unwrap());
    until("the refusal", || key(&dom0, &disk, MEDIUM_STATUS).is_some_and(|text| text.contains("fixed disk")));
    assert_eq!(first_byte(disk.queue(), 2048), Err(-1));
    disk.close();
}

/// A file system of its own, as large as the test says.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Option<Self> {
        let place = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(place.path()).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Self(place))
    }

    fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        assert!(Command::new("mount").args(["-o", &options]).arg(self.0.path()).status().unwrap().success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let gone = Command::new("umount").arg(self.0.path()).status();
        assert!(gone.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

fn fill(queue: &mut Queue) {
    for slot in 0..16 {
        queue.data().copy_in(slot as usize * 4096, &[0xab; 4096]);
    }
    for number in 0..24u64 {
        let pieces: Vec<_> = (0..11).map(|slot| whole(slot % 16)).collect();
        queue.submit(op::WRITE, number * 88, &pieces, number);
    }
    queue.publish().unwrap();
}

/// Writes wait, reads go on, the key says so; and everything goes on by itself when there is room.
#[test]
fn storage_that_is_full() {
    let Some(small) = Small::new() else {
        println!("NOT TESTED: storage that is full: mounting is not allowed here");
        return;
    };
    let dom0 = Dom0::start();
    let image = small.0.path().join("disk.img");
    File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let options = Options { pool_pages: 32, ..Options::default() };
    let mut disk = dom0.connected(&image, "w", &options);
    fill(disk.queue());
    until("the disk says that it waits", || key(&dom0, &disk, ON_HOLD).is_some_and(|text| text.starts_with("ENOSPC")));
    // All but those that wait are answered, and a read passes them.
    let mut okay = 0;
    while let Some(outcome) = disk.queue().outcome().unwrap() {
        assert_eq!(outcome.status, 0);
        okay += 1;
    }
    assert!(okay < 24, "1 MiB cannot take all");
    disk.queue().submit(op::READ, 0, &[whole(31)], 99);
    assert!(outcomes(disk.queue(), 1).iter().all(|done| done.tag == 99 && done.status == 0));
    small.resize("8m");
    assert!(outcomes(disk.queue(), 24 - okay).iter().all(|done| done.status == 0));
    until("the disk says that it goes on", || key(&dom0, &disk, ON_HOLD).is_none());
    disk.queue().submit(op::FLUSH_DISKCACHE, 0, &[], 1);
    assert_eq!(status(disk.queue()), 0);
    assert!(std::fs::read(&image).unwrap()[..24 * 88 * 512].iter().all(|&byte| byte == 0xab), "nothing is missing");
    disk.close();
    drop(dom0);
}

/// A disk whose writes wait can be taken away.
#[test]
fn full_storage_holds_up_no_detach() {
    let Some(small) = Small::new() else {
        println!("NOT TESTED: full storage and detach: mounting is not allowed here");
        return;
    };
    let dom0 = Dom0::start();
    let image = small.0.path().join("disk.img");
    File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let options = Options { pool_pages: 32, ..Options::default() };
    let mut disk = dom0.connected(&image, "w", &options);
    fill(disk.queue());
    until("the disk says that it waits", || key(&dom0, &disk, ON_HOLD).is_some());
    let on_hold = format!("{}/{ON_HOLD}", disk.front.backend_path());
    disk.close();
    assert_eq!(dom0.store.read_opt(&on_hold).unwrap(), None, "nothing waits any more");
    drop(dom0);
}
