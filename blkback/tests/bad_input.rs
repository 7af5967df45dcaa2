//! Disks that cannot be served, and disks that go bad while they are. Who attaches one reads a sentence that says what
//! is wrong and what to do, and nothing is left in XenStore; a guest gets errors, and nothing worse.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use blkback::abi::op;
use blkback::front::{Frontend, Options};
use blkback::spec::DiskSpec;
use blkback::toolstack;
use common::scene::{DISK, SECTORS, Scene, ask, direct, whole, works};
use common::{Dom0, XVDA, until};
use hypervisor::emu::GuestSeat;
use hypervisor::{DomId, Guest, PAGE_SIZE};
use nix::unistd::{Uid, setfsuid};
use xenstore_client::Store;
use xenstore_client::xenbus::toolstack::find_domain;

/// Everything there is in XenStore about the disks of a domain.
fn traces(dom0: &Dom0, domid: DomId) -> Vec<String> {
    let below = |path: String| {
        let names = dom0.store.directory_opt(&path).unwrap().unwrap_or_default();
        names.into_iter().map(move |name| format!("{path}/{name}"))
    };
    below(format!("/local/domain/0/backend/vbd/{domid}")).chain(below(format!("{}/device/vbd", domid.home()))).collect()
}

/// Attaching says all of `words`, and leaves things as they were.
fn refused(dom0: &Dom0, guest: &GuestSeat, spec: &str, words: &[&str]) {
    let domid = Guest::domid(guest);
    let before = traces(dom0, domid);
    let error = dom0.attach(guest, spec).expect_err(spec).to_string();
    for word in words {
        assert!(error.contains(word), "{error:?} does not say {word:?}");
    }
    assert_eq!(traces(dom0, domid), before, "{spec}");
}

fn spec(path: &Path, vdev: &str, access: &str) -> String {
    format!("{},raw,{vdev},{access}", path.display())
}

#[test]
fn what_is_no_disk() {
    let dom0 = Dom0::start();
    let guest = dom0.guest("guest");
    let folder = dom0.folder.path();
    let fifo = folder.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let socket = folder.join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let dangling = folder.join("dangling");
    std::os::unix::fs::symlink(folder.join("nothing"), &dangling).unwrap();
    let circle = folder.join("circle");
    std::os::unix::fs::symlink(&circle, &circle).unwrap();
    for access in ["r", "w", "w!"] {
        let check = |path: &Path, words: &[&str]| {
            let named = path.display().to_string();
            let words: Vec<&str> = words.iter().copied().chain([named.as_str()]).collect();
            refused(&dom0, &guest, &spec(path, "xvda", access), &words);
        };
        check(&folder.join("none.img"), &["no such file", "truncate -s"]);
        check(&folder.join("no/such/folder.img"), &["no such file"]);
        check(folder, &["is a directory"]);
        check(&dom0.image("empty.img", 0), &["holds 0 bytes", "truncate -s"]);
        check(&dom0.image("small.img", 511), &["holds 511 bytes"]);
        check(&dom0.image("a file.img", 4096).join("below"), &["Not a directory"]);
        check(&fifo, &["neither a regular file nor a block device"]);
        check(&socket, &["neither a regular file nor a block device"]);
        check(Path::new("/dev/null"), &["neither a regular file nor a block device"]);
        check(Path::new("/dev/zero"), &["neither a regular file nor a block device"]);
        check(&dangling, &["no such file"]);
        check(&circle, &["symbolic links"]);
    }
    // Nothing of all that stands in the way of a good one.
    dom0.attach(&guest, &spec(&dom0.image("good.img", 4096), "xvda", "w")).unwrap();
    dom0.detach(&guest, "xvda");
    assert_eq!(traces(&dom0, Guest::domid(&*guest)), [""; 0]);
}

/// Root may open everything, so the thread that attaches looks at files as another user while it does.
#[test]
fn files_of_other_users() {
    struct AsNobody(Uid);
    impl AsNobody {
        fn begin() -> Self {
            Self(setfsuid(Uid::from_raw(65534)))
        }
    }
    impl Drop for AsNobody {
        fn drop(&mut self) {
            setfsuid(self.0);
        }
    }

    let dom0 = Dom0::start();
    let guest = dom0.guest("guest");
    let image = dom0.image("secret.img", 4096);
    let mode = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    mode(dom0.folder.path(), 0o755);
    mode(&image, 0o000);
    let nobody = AsNobody::begin();
    match File::open(&image) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {}
        outcome => {
            eprintln!("NOT TESTED: files_of_other_users: a file of mode 000 can be opened here: {outcome:?}");
            return;
        }
    }
    refused(
        &dom0,
        &guest,
        &spec(&image, "xvda", "r"),
        &["secret.img", "permission denied", "reading", "owner and mode"],
    );
    refused(&dom0, &guest, &spec(&image, "xvda", "w"), &["secret.img", "permission denied", "writing"]);
    drop(nobody);
    mode(&image, 0o444);
    let nobody = AsNobody::begin();
    refused(&dom0, &guest, &spec(&image, "xvda", "w"), &["permission denied", "writing"]);
    dom0.attach(&guest, &spec(&image, "xvda", "r")).unwrap();
    drop(nobody);
    dom0.detach(&guest, "xvda");
    mode(dom0.folder.path(), 0o000);
    let nobody = AsNobody::begin();
    refused(&dom0, &guest, &spec(&image, "xvda", "r"), &["permission denied", "folders above"]);
    drop(nobody);
    mode(dom0.folder.path(), 0o755);
}

#[test]
fn disks_in_use() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let link = dom0.folder.path().join("link.img");
    std::fs::hard_link(&image, &link).unwrap();
    let mut disk = dom0.connected(&image, "w", &Options::default());
    let (same, other) = (disk.guest.clone(), dom0.guest("other"));
    for path in [&image, &link] {
        for access in ["r", "w", "w!"] {
            for (guest, vdev) in [(&same, "xvdb"), (&other, "xvda")] {
                refused(&dom0, guest, &spec(path, vdev, access), &["has it open", "detach it there first"]);
            }
        }
    }
    works(disk.queue());
    disk.close();
    dom0.detach(&same, "xvda");
    // A reader is no obstacle to readers, only to writers.
    let reader = dom0.connected(&image, "r", &Options::default());
    refused(&dom0, &other, &spec(&image, "xvda", "w"), &["written alone", "has it open"]);
    dom0.attach(&other, &spec(&image, "xvda", "r")).unwrap();
    dom0.detach(&other, "xvda");
    reader.close();
}

#[test]
fn a_vdev_that_is_taken() {
    let dom0 = Dom0::start();
    let (image, other) = (dom0.image("disk.img", 1 << 20), dom0.image("other.img", 1 << 20));
    let mut disk = dom0.connected(&image, "w", &Options::default());
    for name in ["xvda", "51712", "d0"] {
        refused(&dom0, &disk.guest.clone(), &spec(&other, name, "w"), &["has a disk", "already", "detach it first"]);
    }
    works(disk.queue());
    let guest = disk.guest.clone();
    disk.close();
    dom0.detach(&guest, "xvda");
    dom0.attach(&guest, &spec(&other, "xvda", "w")).unwrap();
}

#[test]
fn a_domain_that_does_not_exist() {
    let dom0 = Dom0::start();
    let guest = dom0.guest("guest");
    let image = dom0.image("disk.img", 1 << 20);
    let disk: DiskSpec = spec(&image, "xvda", "w").parse().unwrap();
    for domid in [DomId(999), DomId(32000)] {
        let attach = || toolstack::attach(&dom0.store, DomId(0), domid, &disk, Duration::ZERO);
        let error = attach().expect_err("no such domain").to_string();
        assert!(error.contains(&format!("no domain \"{domid}\"")) && error.contains("1 (guest)"), "{error}");
        assert_eq!(traces(&dom0, domid), [""; 0]);
        assert!(dom0.store.directory_opt(&domid.home()).unwrap().is_none(), "the home of a domain that is not there");
    }
    // One that was there.
    let gone = Guest::domid(&*guest);
    dom0.machine.destroy(gone).unwrap();
    let error = toolstack::attach(&dom0.store, DomId(0), gone, &disk, Duration::ZERO).expect_err("gone").to_string();
    assert!(error.contains("no domain"), "{error}");
    assert!(dom0.store.directory_opt(&gone.home()).unwrap().is_none());
    let named = find_domain(&dom0.store, "nobody").expect_err("no such name").to_string();
    assert!(named.contains("no domain \"nobody\"") && named.contains("Domain-0"), "{named}");
}

/// The image is gone between the look of who attaches and the look of the backend: seen here by writing what the
/// toolstack writes, without its look.
#[test]
fn an_image_that_vanishes_before_the_backend_opens_it() {
    use xenstore_client::xenbus::toolstack::{DESTROY_TIMEOUT, DeviceAddress, add_device, remove_device};

    let mut scene = Scene::new();
    let device =
        DeviceAddress { kind: "vbd", frontend_kind: "vbd", backend: DomId(0), frontend: scene.domid(), devid: XVDA };
    for (params, why) in
        [("/no/such.img", "no such file"), ("/", "is a directory"), ("/dev/null", "neither"), ("", "params")]
    {
        let keys = [("params", params), ("mode", "w"), ("hotplug-status", "connected")];
        add_device(&scene.dom0.store, &device, &keys, &[]).unwrap();
        scene.gave_up(why);
        scene.neighbour_works();
        remove_device(&scene.dom0.store, &device, DESTROY_TIMEOUT, false, || Ok(())).unwrap();
    }
    scene.attach("w");
    let mut disk = scene.connect(&Options::default());
    works(disk.queue());
    scene.close(disk);
}

#[test]
fn a_file_that_is_cut_off_gives_errors() {
    for persistent in [true, false] {
        let (mut scene, mut disk) = Scene::connected("w", &Options { persistent, ..Options::default() });
        let queue = disk.queue();
        let gref = queue.data_refs()[0];
        let read = |queue: &mut _, sector| ask(queue, &direct(op::READ, 7, sector, &[whole(gref)]));
        works(queue);
        let file = File::options().write(true).open(scene.image()).unwrap();
        file.set_len(DISK / 2 + 1024).unwrap();
        assert_eq!(read(queue, 0), 0);
        assert_eq!(read(queue, SECTORS / 2 - 8), 0);
        assert_eq!(read(queue, SECTORS / 2), -1, "two sectors are there, six are not");
        assert_eq!(read(queue, SECTORS - 8), -1);
        file.set_len(0).unwrap();
        assert_eq!(read(queue, 0), -1);
        assert_eq!(ask(queue, &direct(op::FLUSH_DISKCACHE, 7, 0, &[])), 0);
        scene.neighbour_works();
        // What is written makes the file grow again, and can be read.
        assert_eq!(ask(queue, &direct(op::WRITE, 7, 16, &[whole(gref)])), 0);
        assert_eq!(read(queue, 16), 0);
        assert_eq!(read(queue, 24), -1);
        assert_eq!(std::fs::metadata(scene.image()).unwrap().len(), 16 * 512 + PAGE_SIZE as u64);
        file.set_len(DISK).unwrap();
        assert_eq!(read(queue, SECTORS - 8), 0);
        scene.close(disk);
    }
}

#[test]
fn a_file_that_is_deleted_or_replaced_serves_on() {
    let (mut scene, mut disk) = Scene::connected("w", &Options::default());
    let image = scene.image();
    let old = File::open(&image).unwrap();
    std::fs::remove_file(&image).unwrap();
    works(disk.queue());
    // A new file under the name is another disk.
    scene.dom0.image("hostile.img", 512);
    let gref = disk.queue().data_refs()[0];
    disk.queue().data().copy_in(0, &[0x44; PAGE_SIZE]);
    assert_eq!(ask(disk.queue(), &direct(op::WRITE, 7, SECTORS - 8, &[whole(gref)])), 0);
    let mut last = [0; PAGE_SIZE];
    old.read_exact_at(&mut last, DISK - PAGE_SIZE as u64).unwrap();
    assert!(last == [0x44; PAGE_SIZE] && std::fs::metadata(&image).unwrap().size() == 512);
    std::fs::remove_file(&image).unwrap();
    scene.neighbour_works();
    disk.close();
    // Attached anew, it is the name that counts.
    scene.dom0.detach(&scene.hostile, "xvda");
    refused(&scene.dom0, &scene.hostile, &spec(&image, "xvda", "w"), &["no such file"]);
    scene.end();
}

/// A disk that was refused in the middle, by the backend itself, can be attached again at once, many times over.
#[test]
fn attaching_again_and_again() {
    let dom0 = Dom0::start();
    let guest = dom0.guest("guest");
    let image = dom0.image("disk.img", 1 << 20);
    for round in 0..20 {
        refused(&dom0, &guest, &spec(&dom0.folder.path().join("none.img"), "xvda", "w"), &["no such file"]);
        dom0.attach(&guest, &spec(&image, "xvda", "w")).unwrap();
        if round % 2 == 0 {
            let mut front = Frontend::connect(guest.clone(), XVDA, &Options::default()).unwrap();
            let mut queues = front.take_queues();
            works(&mut queues[0]);
            front.close(queues).unwrap();
        }
        dom0.detach(&guest, "xvda");
    }
    until("unmapping", || dom0.machine.domains().iter().all(|domain| domain.mapped == 0));
}
