//! A guest that migrates: for a while both its domains have the disk, and only one may use it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blkback::abi::op;
use blkback::device::ON_HOLD;
use blkback::front::{Frontend, Options, Piece};
use blkback::hotplug::{self, Event};
use common::{Disk, Dom0, LoopDevice, XVDA, outcomes, status, until};
use hypervisor::emu::GuestSeat;
use hypervisor::{DomId, Guest};
use xenstore_client::Store;
use xenstore_client::xenbus::toolstack::{DeviceAddress, add_device};

const PAGE: [Piece; 1] = [Piece { page: 0, first: 0, last: 7 }];

fn write(disk: &mut Disk, byte: u8) -> i16 {
    disk.queue().data().copy_in(0, &[byte; 4096]);
    disk.queue().submit(op::WRITE, 0, &PAGE, 1);
    status(disk.queue())
}

fn read(disk: &mut Disk) -> u8 {
    disk.queue().submit(op::READ, 0, &PAGE, 1);
    assert_eq!(status(disk.queue()), 0);
    first(disk)
}

fn first(disk: &mut Disk) -> u8 {
    let mut byte = [0];
    disk.queue().data().copy_out(0, &mut byte);
    byte[0]
}

fn attach(dom0: &Dom0, guest: &GuestSeat, image: &Path) -> Result<(), String> {
    let spec = format!("{},raw,xvda,w", image.display());
    dom0.attach(guest, &spec).map(drop).map_err(|error| error.to_string())
}

fn connect(guest: &Arc<GuestSeat>) -> Disk {
    let mut front = Frontend::connect(guest.clone(), XVDA, &Options::default()).unwrap();
    let queues = front.take_queues();
    Disk { guest: guest.clone(), front, queues }
}

fn on_hold(dom0: &Dom0, disk: &Disk) -> Option<String> {
    dom0.store.read_opt(&format!("{}/{ON_HOLD}", disk.front.backend_path())).unwrap()
}

fn answers(disk: &mut Disk, longest: Duration) -> bool {
    disk.queue().publish().unwrap();
    disk.queue().wait(None, longest).unwrap()
}

/// A departing guest with a disk, and the disk.
fn departing(dom0: &Dom0, image: &Path) -> Disk {
    let mut disk = dom0.connected(image, "w", &Options::default());
    assert_eq!(write(&mut disk, 1), 0);
    disk
}

/// Each kind of image that this machine has: what holds it differs.
fn each_image(each: impl Fn(&Dom0, PathBuf)) {
    let dom0 = Dom0::start();
    each(&dom0, dom0.image("disk.img", 1 << 20));
    drop(dom0);
    let dom0 = Dom0::start();
    let below = dom0.image("below.img", 1 << 20);
    match LoopDevice::on(&below, 512) {
        Some(device) => each(&dom0, device.path().into()),
        None => println!("NOT TESTED: a block device that is taken over: there are no loop devices here"),
    }
}

#[test]
fn the_arriving_guest_waits_for_the_departing_one() {
    each_image(|dom0, image| {
        let mut old = departing(dom0, &image);
        let arriving = dom0.guest("guest--incoming");
        attach(dom0, &arriving, &image).unwrap();
        let mut new = connect(&arriving);
        assert!(on_hold(dom0, &new).unwrap().contains("waits"), "{:?}", on_hold(dom0, &new));
        // What it asks for before its time is done afterwards.
        new.queue().submit(op::READ, 0, &PAGE, 5);
        assert!(!answers(&mut new, Duration::from_millis(300)), "nothing is read while another has the disk");
        assert_eq!(write(&mut old, 2), 0, "what the departing one had on its way");
        let departing = old.guest.clone();
        old.close();
        dom0.detach(&departing, "xvda");
        assert_eq!(outcomes(new.queue(), 1)[0].status, 0);
        assert_eq!(first(&mut new), 2);
        until("it says that all is well", || on_hold(dom0, &new).is_none());
        assert_eq!((write(&mut new, 3), read(&mut new)), (0, 3));
        new.close();
        dom0.detach(&arriving, "xvda");
    });
}

/// By the identity that both have, whatever they are called; and before the arriving guest's driver comes.
#[test]
fn the_disk_is_free_before_the_guest_comes() {
    each_image(|dom0, image| {
        let old = departing(dom0, &image);
        let arriving = dom0.guest("another-name");
        attach(dom0, &arriving, &image).expect_err("a stranger");
        for guest in [Guest::domid(&*old.guest), Guest::domid(&*arriving)] {
            dom0.store.write(&format!("{}/vm", guest.home()), "/vm/1-2-3").unwrap();
        }
        attach(dom0, &arriving, &image).unwrap();
        let departing = old.guest.clone();
        old.close();
        dom0.detach(&departing, "xvda");
        let mut new = connect(&arriving);
        assert_eq!((read(&mut new), write(&mut new, 4), read(&mut new)), (1, 0, 4));
        new.close();
        dom0.detach(&arriving, "xvda");
    });
}

/// The migration fails: the departing guest is resumed, and the other one never had anything.
#[test]
fn the_departing_guest_is_resumed() {
    each_image(|dom0, image| {
        let mut old = departing(dom0, &image);
        let arriving = dom0.guest("guest--incoming");
        attach(dom0, &arriving, &image).unwrap();
        let mut new = connect(&arriving);
        new.queue().data().copy_in(0, &[9; 4096]);
        new.queue().submit(op::WRITE, 0, &PAGE, 5);
        assert!(!answers(&mut new, Duration::from_millis(300)));
        // As another guest would be: refused, who waits or not.
        let other = attach(dom0, &dom0.guest("stranger"), &image).unwrap_err();
        assert!(other.contains("alone"), "{other}");
        dom0.machine.destroy(Guest::domid(&*arriving)).unwrap();
        assert_eq!((read(&mut old), write(&mut old, 7), read(&mut old)), (1, 0, 7));
        drop(new);
        assert_eq!(read(&mut old), 7);
        let guest = old.guest.clone();
        old.close();
        dom0.detach(&guest, "xvda");
    });
}

/// A CD-ROM is read whatever `mode` says, also by a guest that waits for it: the file may be one that nobody can write to.
#[test]
fn a_cdrom_is_waited_for_as_a_reader() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.iso", 1 << 20);
    let old = departing(&dom0, &image);
    let immutable = |flag| std::process::Command::new("chattr").arg(flag).arg(&image).status();
    if !immutable("+i").is_ok_and(|status| status.success()) {
        println!("NOT TESTED: a CD-ROM that is taken over: chattr +i does not work here (e2fsprogs, root)");
        return;
    }
    let arriving = dom0.guest("guest--incoming");
    let backend = "/local/domain/0/backend/vbd";
    let (domid, path) = (Guest::domid(&*arriving), image.to_str().unwrap());
    let device = DeviceAddress { kind: "vbd", frontend_kind: "vbd", backend: DomId(0), frontend: domid, devid: XVDA };
    let keys = [("params", path), ("mode", "w"), ("device-type", "cdrom"), ("removable", "1")];
    add_device(&dom0.store, &device, &keys, &[("virtual-device", "51712")]).unwrap();
    let state = format!("{backend}/{domid}/{XVDA}/state");
    until("the backend is there", || dom0.store.read_opt(&state).unwrap().as_deref() == Some("2"));
    hotplug::run(&dom0.store, &format!("{backend}/{domid}/{XVDA}"), Event::Add).unwrap();
    let mut new = connect(&arriving);
    assert!(on_hold(&dom0, &new).unwrap().contains("waits"), "{:?}", on_hold(&dom0, &new));
    let departing = old.guest.clone();
    old.close();
    dom0.detach(&departing, "xvda");
    new.queue().submit(op::READ, 0, &PAGE, 1);
    assert_eq!(outcomes(new.queue(), 1)[0].status, 0);
    assert_eq!(first(&mut new), 1);
    new.close();
    immutable("-i").unwrap();
}
