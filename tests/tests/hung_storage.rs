//! Storage that does not answer while a disk is opened or closed: its own guest waits, and nobody else; and nothing stays
//! of a guest that has gone meanwhile.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blkback::abi::op;
use blkback::device::OPENING;
use blkback::front::{Frontend, Options};
use blkback::image::Image;
use blkback::spec::Access;
use blkback::toolstack::detach;
use blkback::vdev::Vdev;
use hypervisor::emu::GuestSeat;
use hypervisor::{DomId, Guest};
use system_tests::PATIENCE;
use system_tests::sim::served::Served;
use xenstore_client::Store;
use xenstore_client::xenbus::State;
use xenstore_client::xenbus::toolstack::{DeviceAddress, add_device, wait_state};

const SIZE: usize = 1 << 20;
const XVDA: u32 = 51712;

/// The tests look at this process's threads and descriptors.
static ALONE: Mutex<()> = Mutex::new(());

fn served() -> Option<Served> {
    match Served::new(SIZE) {
        Ok(served) => Some(served),
        Err(error) => {
            println!("NOT TESTED: storage that hangs while it is opened: {error}");
            None
        }
    }
}

fn until(what: &str, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Threads that open or close an image.
fn openers() -> usize {
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    std::fs::read_dir("/proc/self/task").unwrap().flatten().map(name).filter(|name| name == "opener\n").count()
}

fn xvda(guest: &GuestSeat) -> DeviceAddress<'static> {
    let frontend = Guest::domid(guest);
    DeviceAddress { kind: "vbd", frontend_kind: "vbd", backend: DomId::DOM0, frontend, devid: XVDA }
}

fn key(served: &Served, guest: &GuestSeat, name: &str) -> Option<String> {
    served.store.read_opt(&format!("{}/{name}", xvda(guest).backend_path())).unwrap()
}

/// What libxl and its hotplug program do, up to where the backend opens the disk; these do not look at the storage.
fn add(served: &Served, guest: &GuestSeat) {
    let (device, path) = (xvda(guest), served.mounted.path());
    let keys = [("params", path.to_str().unwrap()), ("mode", "w"), ("device-type", "disk")];
    add_device(&served.store, &device, &keys, &[("virtual-device", "51712"), ("device-type", "disk")]).unwrap();
    wait_state(&served.store, &format!("{}/state", device.backend_path()), &[State::InitWait], PATIENCE).unwrap();
    served.store.write(&format!("{}/hotplug-status", device.backend_path()), "connected").unwrap();
}

/// A guest whose disk is elsewhere: attached, used, detached.
fn another_comes_and_goes(served: &Served, image: &Path) {
    let guest = served.guest("neighbour").unwrap();
    let mut disk = served.connect(&guest, image, "xvda", ",w").unwrap();
    assert_eq!(disk.write(0, 0x5a).unwrap(), 0);
    assert_eq!(disk.ask(op::FLUSH_DISKCACHE, 0, PATIENCE).unwrap(), Some(0));
    assert_eq!(disk.read(0).unwrap(), Ok(0x5a));
    disk.close().unwrap();
    take_away(served, &guest).unwrap();
    served.destroy(&guest).unwrap();
}

fn take_away(served: &Served, guest: &GuestSeat) -> Result<(), String> {
    let vdev = Vdev::parse("xvda").unwrap();
    detach(&served.store, DomId::DOM0, Guest::domid(guest), vdev, false).map_err(|error| error.to_string())
}

fn neighbours_image() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("neighbour.img");
    File::create(&path).unwrap().set_len(SIZE as u64).unwrap();
    (folder, path)
}

/// The image can be had by whoever comes next, and this process has it open no more often than the test itself.
fn nothing_is_left(served: &Served) {
    let path = served.mounted.path();
    until("the openers' threads end", || openers() == 0);
    until("the image is closed", || {
        let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        open.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|link| link == path)).count() == 1
    });
    Image::open(&path, Access::Write).unwrap();
}

#[test]
fn a_disk_that_hangs_while_it_is_opened() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(served) = served() else { return };
    let (_folder, image) = neighbours_image();
    let guest = served.guest("waits").unwrap();
    let hangs = served.mounted.medium();
    add(&served, &guest);
    another_comes_and_goes(&served, &image);

    // Said in a sentence, and taken away at once; tried again and again it has one thread.
    until("it is said", || key(&served, &guest, OPENING).is_some());
    let said = served.list(&guest).unwrap();
    assert!(said.contains("xvda: opening ") && said.contains(" has not answered for "), "{said}");
    for _ in 0..10 {
        take_away(&served, &guest).unwrap();
        add(&served, &guest);
    }
    until("it is said again", || key(&served, &guest, OPENING).is_some());
    assert_eq!(openers(), 1);
    another_comes_and_goes(&served, &image);
    assert_eq!(key(&served, &guest, "sectors"), None);

    // It answers, and all goes on.
    drop(hangs);
    let mut front = Frontend::connect(guest.clone(), XVDA, &Options::default()).unwrap();
    assert_eq!(key(&served, &guest, "sectors"), Some((SIZE / 512).to_string()));
    assert_eq!(key(&served, &guest, OPENING), None);
    let queues = front.take_queues();
    front.close(queues).unwrap();
    take_away(&served, &guest).unwrap();
    nothing_is_left(&served);
}

/// Destroyed, or without its server, while its disk hangs.
#[test]
fn nothing_stays_of_who_went_while_the_disk_hung() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut served) = served() else { return };
    let (_folder, image) = neighbours_image();
    let (guest, other) = (served.guest("goes").unwrap(), served.guest("stays").unwrap());
    let medium = Arc::clone(&served.mounted.medium);
    let hangs = medium.hang();
    add(&served, &guest);
    until("it hangs", || openers() == 1);
    let backend = xvda(&guest).backend_path();
    served.destroy(&guest).unwrap();
    served.store.rm_if_exists(&backend).unwrap();
    add(&served, &other);
    another_comes_and_goes(&served, &image);
    assert_eq!(openers(), 1);
    // The server's end does not wait for it; the next one serves.
    served.restart().unwrap();
    another_comes_and_goes(&served, &image);
    assert_eq!(key(&served, &other, "state").as_deref(), Some("2"));
    drop(hangs);
    let mut front = Frontend::connect(other.clone(), XVDA, &Options::default()).unwrap();
    let queues = front.take_queues();
    front.close(queues).unwrap();
    take_away(&served, &other).unwrap();
    assert_eq!(served.store.read_opt(&format!("{backend}/state")).unwrap(), None);
    nothing_is_left(&served);
}

/// The last close of a file can hang as well (a network file system writes back then).
#[test]
fn a_disk_that_hangs_while_it_is_closed() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(served) = served() else { return };
    let (_folder, image) = neighbours_image();
    let guest = served.guest("leaves").unwrap();
    let path = served.mounted.path();
    let mut disk = served.connect(&guest, &path, "xvda", ",w").unwrap();
    assert_eq!(disk.write(0, 0x11).unwrap(), 0);
    disk.close().unwrap();
    let hangs = served.mounted.medium();
    served.store.write(&format!("{}/online", xvda(&guest).backend_path()), "0").unwrap();
    served.store.write(&format!("{}/state", xvda(&guest).backend_path()), "5").unwrap();
    until("it hangs", || openers() == 1);
    another_comes_and_goes(&served, &image);
    assert_eq!(key(&served, &guest, "state").as_deref(), Some("5"), "who sees a 6 may take the image");
    drop(hangs);
    take_away(&served, &guest).unwrap();
    nothing_is_left(&served);
}
