//! Processes that come, go and die.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use system_tests::{Dom0, PATIENCE, at_rest, fails, have, program, quick, run};

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn threads(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().count()
}

/// How many threads of a process are not stopped (proc(5): state T). A signal that stops a process takes its time, and
/// its threads go on meanwhile.
fn going_on(pid: u32) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let stats = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap());
    stats.filter(|stat| !stat.rsplit(')').next().unwrap().starts_with(" T")).count()
}

/// Polls for a count to come back to what it was.
fn returns_to(what: &str, expected: usize, count: impl Fn() -> usize) {
    let began = Instant::now();
    while count() != expected {
        assert!(began.elapsed() < PATIENCE, "{what}: {} instead of {expected}", count());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A guest is killed in the middle of a load: the other guest does not notice, and everything the dead one held comes
/// back, its image included.
#[test]
fn a_guest_killed_under_load_leaves_nothing() {
    if !have("fio", "a guest killed under load") {
        return;
    }
    let dom0 = Dom0::start();
    let (image, other) = (dom0.image("disk.img", 64 << 20), dom0.image("other.img", 64 << 20));
    let survivor = dom0.guest_with("survivor", &other, "w", &[]);
    let (files, tasks) = at_rest(|| (open_files(dom0.blkback.pid()), threads(dom0.blkback.pid())));
    let load = |uri: &str, seconds: u32| {
        let mut fio = Command::new("fio");
        fio.args(["--name=load", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=64m"])
            .args(["--time_based", &format!("--runtime={seconds}"), &format!("--uri={uri}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        fio
    };
    let rounds = if quick() { 2 } else { 5 };
    for round in 0..rounds {
        let mut victim = dom0.guest_with(&format!("victim{round}"), &image, "w", &["--queues", "2"]);
        let mut fio = load(&victim.uri(), 30).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        victim.process.signal(Signal::SIGKILL);
        fio.kill().unwrap();
        fio.wait().unwrap();
        returns_to("threads of blkback", tasks, || threads(dom0.blkback.pid()));
        returns_to("descriptors of blkback", files, || open_files(dom0.blkback.pid()));
    }
    assert!(load(&survivor.uri(), 1).status().unwrap().success(), "the other guest's disk");
    let listed = run(Command::new(program("emu-xen")).args(["list", "--dir"]).arg(dom0.dir()));
    assert!(!listed.contains("victim"), "{listed}");
    survivor.detach(&dom0);
}

/// blkback is told to stop while a guest uses a disk: the guest hears of it, blkback ends in order, and another one
/// takes the disks up again.
#[test]
fn blkback_stops_in_order() {
    let mut dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let guest = dom0.guest_with("guest", &image, "w", &[]);
    dom0.blkback.signal(Signal::SIGTERM);
    guest.process.expect("is gone");
    let hypervisor = dom0.hypervisor();
    dom0.blkback = system_tests::Process::start("blkback", ["serve", "--hypervisor", &hypervisor]);
    dom0.blkback.expect("serving");
    run(&mut dom0.blkback(["detach", "guest", "xvda"]));
    run(&mut dom0.blkback(["attach", "guest", &format!("{},raw,xvda,w", image.display()), "--wait", "60"]));
    guest.process.expect("is connected");
}

/// A XenStore that hangs keeps nobody: a server that is told to stop asks it a last thing, waits ten seconds, says so and
/// fails.
#[test]
fn a_server_ends_though_its_store_is_stuck() {
    let mut dom0 = Dom0::start();
    let hypervisor = dom0.hypervisor();
    let mut netback = system_tests::Process::start("netback", ["serve", "--hypervisor", &hypervisor]);
    netback.expect("serving");
    dom0.emu_xen.send(Signal::SIGSTOP);
    returns_to("threads of the store that go on", 0, || going_on(dom0.emu_xen.pid()));
    for server in [&mut dom0.blkback, &mut netback] {
        server.send(Signal::SIGTERM);
        let status = server.wait();
        assert_eq!(status.and_then(|status| status.code()), Some(1), "{status:?}");
        let log = server.log();
        assert!(log.contains("XenStore did not answer") && log.contains("connection to xenstore is closed"), "{log}");
    }
    dom0.emu_xen.send(Signal::SIGCONT);
}

/// Two that answer the same rings would be the end of the guests' data.
#[test]
fn a_second_blkback_is_refused() {
    let dom0 = Dom0::start();
    let said = fails(&mut dom0.blkback(["serve"]));
    let first = format!("another blkback serves this domain already (process {})", dom0.blkback.pid());
    assert!(said.contains(&first), "{said}");
}

#[test]
fn the_commands_say_what_they_did() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let guest = dom0.guest("web", &[]);
    let said = run(&mut dom0.blkback(["attach", "web", &format!("file:{}", image.display()), "/dev/xvda", "w"]));
    assert!(said.contains("xvda (51712) of domain"), "{said}");
    guest.process.expect("is connected");
    let listed = run(&mut dom0.blkback(["list", "web"]));
    let mut lines = listed.lines();
    assert_eq!(lines.next(), Some("Vdev  BE  handle state evt-ch ring-ref BE-path"));
    let row: Vec<&str> = lines.next().expect("a row").split_whitespace().collect();
    assert_eq!((row[0], row[1], row[2], row[3]), ("51712", "0", &*guest.domid, "4"));
    assert_eq!(row[6], format!("/local/domain/0/backend/vbd/{}/51712", guest.domid));
    assert!(run(&mut dom0.blkback(["detach", &guest.domid, "/dev/xvda"])).contains("is detached"));
}

#[test]
fn mistakes_are_explained() {
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let image = image.display();
    let _guest = dom0.guest("web", &[]);
    let attach = |spec: &str| fails(&mut dom0.blkback(["attach", "web", spec]));
    for (spec, reason) in [
        (format!("{image},raw,xvda,rwx"), "^"),
        (format!("{image},raw,xvqa,rw"), "^"),
        (format!("{image},vhdx,xvda,rw"), "^"),
        (format!("{image},qcow2,xvda,rw"), "qemu-nbd"),
        ("/no/such.img,raw,xvda,rw".to_owned(), "no such file"),
        (format!("{},raw,xvda,rw", dom0.dir().display()), "directory"),
        ("/dev/null,raw,xvda,rw".to_owned(), "neither a regular file"),
        (format!("{},raw,xvda,rw", dom0.image("empty.img", 0).display()), "less than one sector"),
    ] {
        let said = attach(&spec);
        assert!(said.contains(reason), "{spec}: {said}");
    }
    let said = fails(&mut dom0.blkback(["attach", "nobody", &format!("{image},raw,xvda,rw")]));
    assert!(said.contains("no domain \"nobody\"") && said.contains("(web)"), "{said}");
    let said = fails(&mut dom0.blkback(["detach", "web", "xvda"]));
    assert!(said.contains("has no disk xvda"), "{said}");
    let said = fails(Command::new(program("blkback")).args(["list", "0", "--hypervisor", "emu:/no/such/machine"]));
    assert!(said.contains("/no/such/machine"), "{said}");
    let said = fails(Command::new(program("blkback")).args(["list", "0", "--hypervisor", "kvm"]));
    assert!(said.contains("emu:DIR"), "{said}");
}

#[test]
fn a_file_that_may_not_be_read_is_refused() {
    use std::os::unix::process::CommandExt;

    if !nix::unistd::Uid::effective().is_root() {
        println!("NOT TESTED: an unreadable image: only root can become another user");
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let _guest = dom0.guest("web", &[]);
    // Everybody may join the machine and walk to the image, but nobody may read it.
    for path in [dom0.dir().parent().unwrap().to_owned(), dom0.dir()] {
        run(Command::new("chmod").arg("755").arg(path));
    }
    for entry in std::fs::read_dir(dom0.dir()).unwrap().flatten() {
        run(Command::new("chmod").arg("666").arg(entry.path()));
    }
    run(Command::new("chmod").arg("000").arg(&image));
    let reachable = |path: &Path| path.ancestors().all(|part| !part.starts_with("/root"));
    if !reachable(&program("blkback")) {
        println!("NOT TESTED: an unreadable image: other users cannot reach {}", program("blkback").display());
        return;
    }
    let mut command = dom0.blkback(["attach", "web", &format!("{},raw,xvda,w", image.display())]);
    let said = fails(command.uid(65534).gid(65534));
    assert!(said.contains("permission denied"), "{said}");
}

/// The kernel's backend takes every disk of backend/vbd; those of backendtype=tap it does not know.
#[test]
fn beside_xen_blkback_only_tap_disks_are_served() {
    let mut dom0 = Dom0::start();
    let driver = dom0.dir().join("xen-backend/drivers/vbd");
    let _guest = dom0.guest("web", &[]);
    std::fs::create_dir_all(&driver).unwrap();
    let said = fails(&mut dom0.blkback(["serve"]));
    assert!(said.contains("modprobe -r xen-blkback") && said.contains("--only vbd3"), "{said}");
    let hypervisor = dom0.hypervisor();
    let began = Instant::now();
    // Loaded beside one that runs: it says so.
    let tap_only = ["serve", "--hypervisor", &hypervisor, "--only", "vbd3"];
    let log = loop {
        std::thread::sleep(Duration::from_millis(1500));
        let log = std::mem::replace(&mut dom0.blkback, system_tests::Process::start("blkback", tap_only)).stop();
        if log.contains("has been loaded beside this process") {
            break log;
        }
        // The machine was too busy for its thread to look.
        assert!(began.elapsed() < PATIENCE, "{log}");
        std::fs::remove_dir(&driver).unwrap();
        dom0.blkback = system_tests::Process::start("blkback", ["serve", "--hypervisor", &hypervisor]);
        dom0.blkback.expect("serving");
        std::fs::create_dir_all(&driver).unwrap();
    };
    assert!(log.contains("modprobe -r xen-blkback"), "{log}");
    let serving = dom0.blkback.expect("serving");
    assert!(serving.contains("backend/vbd3") && !serving.contains("backend/vbd "), "{serving}");
    // A disk of backend/vbd is nobody's now.
    let image = dom0.image("disk.img", 1 << 20);
    let said = fails(&mut dom0.blkback(["attach", "web", &format!("{},raw,xvda,w", image.display())]));
    assert!(said.contains("no backend took the disk up"), "{said}");
}
