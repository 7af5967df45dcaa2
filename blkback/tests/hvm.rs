//! Guests whose device model uses the same image as their vbd: who has it when, and who never gets it.
//!
//! The device model is a QEMU whose machine never starts: it opens and closes images as it is told, as a guest's disk and
//! with the locks for that. Programs of others are `qemu-io`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use blkback::abi::op;
use blkback::device::{ON_HOLD, YIELDED};
use blkback::front::{Frontend, Options, Piece};
use common::{Disk, Dom0, XVDA, outcomes, status, until};
use hypervisor::Guest;
use hypervisor::emu::GuestSeat;
use xenstore_client::Store;

const PAGE: [Piece; 1] = [Piece { page: 0, first: 0, last: 7 }];

const QEMU: &str = "qemu-system-x86_64";

/// Whether QEMU is here.
fn have_qemu(what: &str) -> bool {
    let found = [QEMU, "qemu-io"]
        .iter()
        .all(|tool| Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success()));
    if !found {
        println!("NOT TESTED: {what}: {QEMU} and qemu-io are not installed (qemu-system-x86, qemu-utils)");
    }
    found
}

/// A process in the role of a guest's device model.
struct DeviceModel {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl DeviceModel {
    /// Starts it, and says so to the toolstack's store, as libxl does.
    fn start(dom0: &Dom0, guest: &GuestSeat) -> Self {
        let mut model = Self::stranger();
        let key = format!("{}/image/device-model-pid", home(guest));
        dom0.store.write(&key, &model.process.id().to_string()).unwrap();
        model.tell(r#"{"execute":"query-version"}"#).unwrap();
        model
    }

    /// The same of a guest that is none of ours.
    fn stranger() -> Self {
        let mut process = Command::new(QEMU)
            .args(["-S", "-M", "pc,accel=tcg", "-m", "16", "-nodefaults", "-display", "none"])
            .args(["-device", "lsi53c895a", "-qmp", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        let mut model = Self { process, input, output };
        model.tell(r#"{"execute":"qmp_capabilities"}"#).unwrap();
        model
    }

    fn tell(&mut self, command: &str) -> Result<(), String> {
        writeln!(self.input, "{}", command.replace('\n', " ")).unwrap();
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "it ended at {command}");
            if line.contains("\"error\"") {
                return Err(line);
            }
            if line.contains("\"return\"") {
                return Ok(());
            }
        }
    }

    /// Opens an image as a guest's disk.
    fn plug(&mut self, image: &Path) -> Result<(), String> {
        let image = image.display();
        self.tell(&format!(
            r#"{{"execute":"blockdev-add","arguments":{{"node-name":"image","driver":"raw",
                "file":{{"driver":"file","filename":"{image}"}}}}}}"#
        ))?;
        let device = r#"{"execute":"device_add","arguments":{"driver":"scsi-hd","id":"disk","drive":"image"}}"#;
        self.tell(device).inspect_err(|_| self.close().unwrap())
    }

    fn close(&mut self) -> Result<(), String> {
        self.tell(r#"{"execute":"blockdev-del","arguments":{"node-name":"image"}}"#)
    }

    /// Lets go of the locks and keeps the image open, as when the guest has been saved.
    fn inactivate(&mut self) {
        self.tell(r#"{"execute":"device_del","arguments":{"id":"disk"}}"#).unwrap();
    }

    /// Closes the image, as when the guest's kernel unplugs the emulated disks.
    fn unplug(&mut self) {
        self.inactivate();
        until("the device model closes the image", || self.close().is_ok());
    }
}

impl Drop for DeviceModel {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// A program of somebody else writes to an image; whether it could.
fn writes(image: &Path) -> bool {
    let output = Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 99 1k 512"]).arg(image).output().unwrap();
    assert!(output.status.success() || String::from_utf8_lossy(&output.stderr).contains("lock"), "{output:?}");
    output.status.success()
}

fn home(guest: &GuestSeat) -> String {
    Guest::domid(guest).home()
}

fn hvm(dom0: &Dom0, name: &str) -> Arc<GuestSeat> {
    let guest = dom0.guest(name);
    dom0.store.write(&format!("/libxl/{}/type", Guest::domid(&*guest)), "hvm").unwrap();
    guest
}

fn attach(dom0: &Dom0, guest: &GuestSeat, image: &Path, access: &str) -> Result<(), String> {
    let spec = format!("{},raw,xvda,{access}", image.display());
    dom0.attach(guest, &spec).map(drop).map_err(|error| error.to_string())
}

/// Neither another guest nor another program gets the image.
fn nobody_else_gets(dom0: &Dom0, image: &Path, when: &str) {
    for access in ["w", "r", "w!"] {
        let error = attach(dom0, &dom0.guest("another"), image, access).expect_err(when);
        assert!(error.contains("cannot be"), "{when}: {error}");
    }
    attach(dom0, &hvm(dom0, "another-hvm"), image, "w").expect_err(when);
    assert!(!writes(image), "qemu-io has written {when}");
}

fn backend(guest: &GuestSeat) -> String {
    format!("/local/domain/0/backend/vbd/{}/{XVDA}", Guest::domid(guest))
}

fn key(dom0: &Dom0, guest: &GuestSeat, key: &str) -> Option<String> {
    dom0.store.read_opt(&format!("{}/{key}", backend(guest))).unwrap()
}

fn connect(guest: &Arc<GuestSeat>) -> Result<Disk, String> {
    let mut front = Frontend::connect(guest.clone(), XVDA, &Options::default()).map_err(|error| error.to_string())?;
    let queues = front.take_queues();
    Ok(Disk { guest: guest.clone(), front, queues })
}

/// The guest's driver comes; it may have to wait.
fn connecting(guest: &Arc<GuestSeat>) -> JoinHandle<Result<Disk, String>> {
    let guest = guest.clone();
    std::thread::spawn(move || connect(&guest))
}

fn write(disk: &mut Disk, byte: u8) -> i16 {
    disk.queue().data().copy_in(0, &[byte; 4096]);
    disk.queue().submit(op::WRITE, 0, &PAGE, 1);
    status(disk.queue())
}

fn read(disk: &mut Disk) -> u8 {
    disk.queue().submit(op::READ, 0, &PAGE, 1);
    assert_eq!(status(disk.queue()), 0);
    let mut byte = [0];
    disk.queue().data().copy_out(0, &mut byte);
    byte[0]
}

fn leave(dom0: &Dom0, disk: Disk) {
    let guest = disk.guest.clone();
    disk.close();
    dom0.detach(&guest, "xvda");
}

/// The ordinary life: emulated disk, unplug, PV driver.
#[test]
fn an_hvm_guest_boots_from_its_emulated_disk() {
    if !have_qemu("an HVM guest's disk") {
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let guest = hvm(&dom0, "guest");
    let mut model = DeviceModel::start(&dom0, &guest);
    attach(&dom0, &guest, &image, "w").unwrap();
    // Before the device model has come: other disks are refused; other programs are not, because it would be as well.
    attach(&dom0, &dom0.guest("another"), &image, "w").unwrap_err();
    model.plug(&image).unwrap();
    nobody_else_gets(&dom0, &image, "while the device model has it");
    model.unplug();
    // At once, not when the guest's driver comes: seconds lie between.
    until("the disk is kept from other programs", || !writes(&image));
    nobody_else_gets(&dom0, &image, "after the unplug");
    let mut disk = connect(&guest).unwrap();
    assert_eq!((write(&mut disk, 5), read(&mut disk)), (0, 5));
    nobody_else_gets(&dom0, &image, "while it is connected");
    leave(&dom0, disk);
    assert!(writes(&image), "it is free");
}

/// `xen_emul_unplug=unnecessary` with `xvda`: both disks are live.
#[test]
fn a_driver_that_comes_while_the_emulated_disk_is_live_waits() {
    if !have_qemu("a driver beside an emulated disk") {
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let guest = hvm(&dom0, "guest");
    let mut model = DeviceModel::start(&dom0, &guest);
    attach(&dom0, &guest, &image, "w").unwrap();
    model.plug(&image).unwrap();
    let state = format!("{}/device/vbd/{XVDA}/state", home(&guest));
    dom0.store.write(&state, "3").unwrap();
    until("it says why it waits", || key(&dom0, &guest, ON_HOLD).is_some_and(|said| said.contains("device model")));
    assert_eq!(key(&dom0, &guest, "state").as_deref(), Some("2"));
    let listed = blkback::toolstack::list(&dom0.store, Guest::domid(&*guest), None).unwrap();
    assert!(listed.contains("emulated disk is in use"), "{listed}");
    nobody_else_gets(&dom0, &image, "while both wait");
    // It starts over, waits again, and is served in the end.
    dom0.store.write(&state, "1").unwrap();
    let driver = connecting(&guest);
    until("the driver is there", || dom0.store.read_opt(&state).unwrap().as_deref() == Some("3"));
    assert_eq!(key(&dom0, &guest, "state").as_deref(), Some("2"));
    model.unplug();
    let mut disk = driver.join().unwrap().unwrap();
    until("all is well", || key(&dom0, &guest, ON_HOLD).is_none());
    assert_eq!((write(&mut disk, 5), read(&mut disk)), (0, 5));
    nobody_else_gets(&dom0, &image, "while it is connected");
    leave(&dom0, disk);
}

/// UEFI's driver waits for its backend for ever: it is told no, and the guest's kernel comes later.
#[test]
fn a_uefi_firmware_boots_from_the_emulated_disk() {
    if !have_qemu("a UEFI guest's disk") {
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let guest = hvm(&dom0, "guest");
    dom0.store.write(&format!("{}/hvmloader/bios", home(&guest)), "ovmf").unwrap();
    let mut model = DeviceModel::start(&dom0, &guest);
    attach(&dom0, &guest, &image, "w").unwrap();
    model.plug(&image).unwrap();
    let error = connect(&guest).err().unwrap();
    assert!(error.contains("emulated disk is in use"), "{error}");
    nobody_else_gets(&dom0, &image, "after the firmware was refused");
    model.unplug();
    // As Linux does with what the firmware has left (xenbus_reset_frontend).
    let state = format!("{}/device/vbd/{XVDA}/state", home(&guest));
    dom0.store.write(&state, "6").unwrap();
    until("the backend closes", || key(&dom0, &guest, "state").as_deref() == Some("6"));
    dom0.store.write(&state, "1").unwrap();
    let mut disk = connect(&guest).unwrap();
    assert_eq!((write(&mut disk, 5), read(&mut disk)), (0, 5));
    leave(&dom0, disk);
}

/// A guest without PV drivers.
#[test]
fn an_emulated_disk_may_stay_for_ever() {
    if !have_qemu("a guest without PV drivers") {
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let guest = hvm(&dom0, "guest");
    let mut model = DeviceModel::start(&dom0, &guest);
    attach(&dom0, &guest, &image, "w").unwrap();
    model.plug(&image).unwrap();
    nobody_else_gets(&dom0, &image, "while the device model has it");
    assert_eq!(key(&dom0, &guest, "state").as_deref(), Some("2"));
    assert_eq!(key(&dom0, &guest, "error"), None);
    dom0.machine.destroy(Guest::domid(&*guest)).unwrap();
    drop(model);
    until("the image is free", || writes(&image));
}

/// The backend is restarted while the device model has the image.
#[test]
fn a_new_backend_finds_the_device_model() {
    if !have_qemu("a backend that is restarted beside a device model") {
        return;
    }
    let mut dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let guest = hvm(&dom0, "guest");
    let mut model = DeviceModel::start(&dom0, &guest);
    attach(&dom0, &guest, &image, "w").unwrap();
    model.plug(&image).unwrap();
    // Written anew by whoever opens the image.
    dom0.store.rm_if_exists(&format!("{}/sectors", backend(&guest))).unwrap();
    dom0.restart();
    until("it is open again", || key(&dom0, &guest, "sectors").is_some());
    nobody_else_gets(&dom0, &image, "after the restart");
    model.unplug();
    until("the disk is kept from other programs", || !writes(&image));
    let mut disk = connect(&guest).unwrap();
    assert_eq!((write(&mut disk, 5), read(&mut disk)), (0, 5));
    leave(&dom0, disk);
}

/// Somebody comes in where nobody can keep him out: then the guest's driver is refused, and told who.
#[test]
fn who_comes_before_the_device_model_is_named() {
    if !have_qemu("a stranger on an HVM guest's disk") {
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let guest = hvm(&dom0, "guest");
    attach(&dom0, &guest, &image, "w").unwrap();
    let mut stranger = DeviceModel::stranger();
    stranger.plug(&image).unwrap();
    let mut model = DeviceModel::start(&dom0, &guest);
    let error = connect(&guest).err().unwrap();
    let who = format!("process {}", stranger.process.id());
    assert!(error.contains(&who) && error.contains("detach it there first"), "{error}");
    stranger.unplug();
    // It was as if it had come before.
    model.plug(&image).unwrap();
    nobody_else_gets(&dom0, &image, "while the device model has it");
}

/// Without the toolstack's word that it is an HVM guest, the disk is the vbd's alone from the beginning.
#[test]
fn a_guest_of_unknown_kind_has_its_disk_alone() {
    if !have_qemu("a guest of unknown kind") {
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let guest = dom0.guest("unknown");
    attach(&dom0, &guest, &image, "w").unwrap();
    nobody_else_gets(&dom0, &image, "once it is attached");
    let mut model = DeviceModel::stranger();
    let error = model.plug(&image).unwrap_err();
    assert!(error.contains("lock"), "{error}");
}

/// A connected HVM guest, and the domain that it becomes, attached, with the device model that the toolstack starts.
fn migrating(dom0: &Dom0, image: &Path) -> (Disk, Arc<GuestSeat>, DeviceModel) {
    let guest = hvm(dom0, "guest");
    attach(dom0, &guest, image, "w").unwrap();
    let mut old = connect(&guest).unwrap();
    assert_eq!(write(&mut old, 1), 0);
    let arriving = hvm(dom0, "guest--incoming");
    attach(dom0, &arriving, image, "w").unwrap();
    let number = Guest::domid(&*arriving).to_string();
    assert_eq!(key(dom0, &guest, YIELDED), Some(number), "it has made way when the toolstack goes on");
    let model = DeviceModel::start(dom0, &arriving);
    (old, arriving, model)
}

#[test]
fn an_hvm_guest_migrates() {
    if !have_qemu("an HVM guest that migrates") {
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let (mut old, arriving, mut model) = migrating(&dom0, &image);
    assert_eq!(key(&dom0, &old.guest, "state").as_deref(), Some("4"));
    model.plug(&image).unwrap();
    nobody_else_gets(&dom0, &image, "while both domains are there");
    // The departing one is suspended. If it were not, nothing of it would be written.
    old.queue().data().copy_in(0, &[9; 4096]);
    old.queue().submit(op::WRITE, 0, &PAGE, 1);
    old.queue().publish().unwrap();
    assert!(!old.queue().wait(None, Duration::from_millis(300)).unwrap());
    model.unplug();
    until("the disk is kept from other programs", || !writes(&image));
    let mut new = connect(&arriving).unwrap();
    new.queue().submit(op::READ, 0, &PAGE, 5);
    new.queue().publish().unwrap();
    nobody_else_gets(&dom0, &image, "after the unplug");
    dom0.machine.destroy(Guest::domid(&*old.guest)).unwrap();
    assert_eq!(outcomes(new.queue(), 1)[0].status, 0);
    assert_eq!(read(&mut new), 1);
    assert_eq!((write(&mut new, 3), read(&mut new)), (0, 3));
    nobody_else_gets(&dom0, &image, "after the migration");
    leave(&dom0, new);
}

/// The migration fails, and the guest is resumed where it was: with what it has written meanwhile.
#[test]
fn a_failed_migration_of_an_hvm_guest_is_undone() {
    if !have_qemu("an HVM guest whose migration fails") {
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    for opens in [true, false] {
        let (mut old, arriving, mut model) = migrating(&dom0, &image);
        if opens {
            model.plug(&image).unwrap();
        }
        old.queue().data().copy_in(0, &[9; 4096]);
        old.queue().submit(op::WRITE, 0, &PAGE, 1);
        old.queue().publish().unwrap();
        assert!(!old.queue().wait(None, Duration::from_millis(300)).unwrap());
        dom0.machine.destroy(Guest::domid(&*arriving)).unwrap();
        drop(model);
        assert_eq!(outcomes(old.queue(), 1)[0].status, 0, "the write that waited");
        assert_eq!((read(&mut old), write(&mut old, 7), read(&mut old)), (9, 0, 7));
        until("all is well", || key(&dom0, &old.guest, ON_HOLD).is_none() && key(&dom0, &old.guest, YIELDED).is_none());
        nobody_else_gets(&dom0, &image, "after the failed migration");
        leave(&dom0, old);
    }
}

/// A guest without PV drivers migrates: its two device models give the image from one to the other.
#[test]
fn a_guest_without_drivers_migrates() {
    if !have_qemu("a guest without PV drivers that migrates") {
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let guest = hvm(&dom0, "guest");
    let mut model = DeviceModel::start(&dom0, &guest);
    attach(&dom0, &guest, &image, "w").unwrap();
    model.plug(&image).unwrap();
    let arriving = hvm(&dom0, "guest--incoming");
    attach(&dom0, &arriving, &image, "w").unwrap();
    let mut next = DeviceModel::start(&dom0, &arriving);
    // QEMU lets go of its locks when the guest has been saved, and takes them where it is restored.
    model.inactivate();
    until("the next one has it", || next.plug(&image).is_ok());
    nobody_else_gets(&dom0, &image, "while both domains are there");
    dom0.machine.destroy(Guest::domid(&*guest)).unwrap();
    drop(model);
    until("the arriving guest's disk has it reserved", || key(&dom0, &arriving, ON_HOLD).is_none());
    nobody_else_gets(&dom0, &image, "after the migration");
    assert_eq!(key(&dom0, &arriving, "state").as_deref(), Some("2"));
}
