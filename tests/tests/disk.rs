//! A disk from the administrator's command line to the file, with real programs as the guest's applications.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::process::Command;

use system_tests::{Dom0, have, quick, run};

fn size() -> u64 {
    if quick() { 32 << 20 } else { 256 << 20 }
}

/// Random data with holes between.
fn fill(path: &Path, bytes: u64) {
    use std::io::{Read, Seek, SeekFrom, Write};

    let mut random = std::fs::File::open("/dev/urandom").unwrap();
    let mut file = std::fs::File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    let mut chunk = vec![0; 1 << 20];
    for at in (0..bytes).step_by(2 << 20) {
        random.read_exact(&mut chunk).unwrap();
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(&chunk).unwrap();
    }
}

#[test]
fn qemu_img_copies_an_image_in_and_out() {
    if !have("qemu-img", "copying an image through the guest") {
        return;
    }
    let dom0 = Dom0::start();
    let (original, copy) = (dom0.path("original.img"), dom0.path("copy.img"));
    fill(&original, size());
    for (round, further) in
        [&["--queues", "2"][..], &["--no-persistent", "--protocol", "x86_32-abi"]].iter().enumerate()
    {
        let image = dom0.image(&format!("{round}.img"), size());
        let guest = dom0.guest_with(&format!("guest{round}"), &image, "w", further);
        let convert = |args: [&str; 2]| {
            run(Command::new("qemu-img").args(["convert", "-n", "-f", "raw", "-O", "raw"]).args(args));
        };
        convert([original.to_str().unwrap(), &guest.uri()]);
        std::fs::File::create(&copy).and_then(|file| file.set_len(size())).unwrap();
        convert([&guest.uri(), copy.to_str().unwrap()]);
        run(Command::new("cmp").arg(&original).arg(&copy));
        guest.detach(&dom0);
        run(Command::new("cmp").arg(&original).arg(&image));
    }
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !have("fio", "verified random writes through the guest") {
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", size());
    for (name, further) in [
        ("plain", &[][..]),
        ("copies", &["--no-persistent"]),
        ("wide", &["--ring-order", "4", "--queues", "2"]),
        ("old", &["--protocol", "x86_32-abi", "--ring-order", "2"]),
    ] {
        let guest = dom0.guest_with(name, &image, "w", further);
        let job = ["--rw=randrw", "--bsrange=512-128k", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1"];
        run(Command::new("fio")
            .args(["--name=verify", "--verify_state_save=0", "--ioengine=nbd", "--randrepeat=0", "--fsync=64"])
            .args(job)
            .arg(format!("--size={}", size() / 4))
            .arg(format!("--uri={}", guest.uri())));
        guest.detach(&dom0);
    }
}

#[test]
fn mkfs_through_the_guest_leaves_a_clean_file_system() {
    let tools = ["nbdfuse", "mkfs.ext4", "e2fsck", "fusermount3"];
    if !tools.iter().all(|tool| have(tool, "a file system made through the guest")) {
        return;
    }
    if !Path::new("/dev/fuse").exists() {
        println!("NOT TESTED: a file system made through the guest: this kernel has no /dev/fuse");
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", size());
    let guest = dom0.guest_with("guest", &image, "w", &[]);
    let mount = dom0.path("mount");
    std::fs::create_dir(&mount).unwrap();
    let mut fuse = Command::new("nbdfuse").arg(&mount).arg(guest.uri()).spawn().unwrap();
    let disk = mount.join("nbd");
    for _ in 0..500 {
        if disk.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-E", "discard"]).arg(&disk));
    let files = dom0.path("files");
    std::fs::create_dir(&files).unwrap();
    std::fs::write(files.join("hello"), "written before the file system was made\n").unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&files).arg(&disk));
    run(Command::new("fusermount3").arg("-u").arg(&mount));
    fuse.wait().unwrap();
    guest.detach(&dom0);
    let report = run(Command::new("e2fsck").arg("-fn").arg(&image));
    assert!(!report.contains("WARNING"), "{report}");
    let hello = run(Command::new("debugfs").args(["-R", "cat /hello"]).arg(&image));
    assert!(hello.contains("written before"), "{hello}");
}

#[test]
fn qemu_io_reads_writes_discards_and_flushes() {
    if !have("qemu-io", "single commands through the guest") {
        return;
    }
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 64 << 20);
    let guest = dom0.guest_with("guest", &image, "w", &[]);
    let script = [
        "write -P 0x5a 512 1536",
        "write -f -P 0xa5 1048576 1048576",
        "flush",
        "read -P 0x5a 512 1536",
        "read -P 0xa5 1048576 1048576",
        "write -z 1052672 8192",
        "read -P 0 1052672 8192",
        "read -P 0xa5 1060864 4096",
        "discard 1048576 524288",
        "flush",
        "read -P 0 0 512",
        "read -P 0xa5 1572864 524288",
    ];
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw", "-t", "none"]);
    for line in script {
        command.args(["-c", line]);
    }
    let said = run(command.arg(guest.uri()));
    assert!(!said.contains("Pattern verification failed") && !said.to_lowercase().contains("error"), "{said}");
    guest.detach(&dom0);

    let guest = dom0.guest_with("reader", &image, "r", &[]);
    let said = Command::new("qemu-io")
        .args(["-r", "-f", "raw", "-c", "read -P 0x5a 512 1536"])
        .arg(guest.uri())
        .output()
        .unwrap();
    assert!(said.status.success(), "{said:?}");
    guest.detach(&dom0);
}
