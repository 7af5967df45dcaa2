//! Who may write: one image under all its names, and everybody else on the machine who uses it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blkback::image::Image;
use blkback::spec::Access::{self, ReadOnly, SharedWrite, Write};
use common::LoopDevice;

const ALL: [Access; 3] = [ReadOnly, Write, SharedWrite];

fn image(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
    path
}

fn refused(path: &Path, access: Access) -> String {
    let opened = Image::open(path, access);
    let checked = Image::check(path, access).expect_err("what cannot be opened is refused beforehand").to_string();
    let opened = opened.expect_err(&format!("{} as {access:?}", path.display())).to_string();
    assert_eq!(opened, checked);
    opened
}

fn run(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
}

/// One test at a time: what one of them forks holds all of this process's descriptors, and their locks, until it execs.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Undone when the test ends, however it ends.
struct Undo(&'static str, Vec<String>);

impl Drop for Undo {
    fn drop(&mut self) {
        let args: Vec<&str> = self.1.iter().map(String::as_str).collect();
        assert!(run(self.0, &args) || std::thread::panicking(), "{} {args:?}", self.0);
    }
}

#[test]
fn every_name_of_a_file_is_the_same_file() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img");
    let _held = Image::open(&path, Write).unwrap();
    let (soft, hard) = (dir.path().join("soft.img"), dir.path().join("hard.img"));
    std::os::unix::fs::symlink(&path, &soft).unwrap();
    std::fs::hard_link(&path, &hard).unwrap();
    for alias in [&path, &soft, &hard] {
        for access in ALL {
            assert!(refused(alias, access).contains("detach it there first"));
        }
    }
    let bound = dir.path().join("bound");
    std::fs::create_dir(&bound).unwrap();
    let (from, to) = (dir.path().to_str().unwrap(), bound.to_str().unwrap());
    if !run("mount", &["--bind", from, to]) {
        println!("NOT TESTED: an image under a bind mount: mounting is not allowed here");
        return;
    }
    let _undo = Undo("umount", vec![to.to_owned()]);
    refused(&bound.join("disk.img"), Write);
}

/// Of those that come at the same moment exactly one may write, again and again.
#[test]
fn twenty_at_once() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img");
    for round in 0..20 {
        let start = std::sync::Barrier::new(20);
        let won: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..20)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        Image::open(&path, Write).ok()
                    })
                })
                .collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(won.len(), 1, "round {round}");
    }
}

#[test]
fn a_loop_device_over_a_file() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img");
    let Some(device) = LoopDevice::on(&path, 512) else {
        println!("NOT TESTED: images under loop devices: there are none here");
        return;
    };
    let node = Path::new(device.path());
    // The file, while the device is there: it may write, and it caches.
    for access in ALL {
        let text = refused(&path, access);
        assert!(text.contains(device.path()) && text.contains("losetup -d"), "{text}");
    }
    // The device itself is served like any other; then it is claimed, and so is the file under it.
    for first in ALL {
        let held = Image::open(node, first).unwrap();
        for second in ALL {
            let fits = matches!((first, second), (ReadOnly, ReadOnly) | (SharedWrite, SharedWrite));
            let outcome = Image::open(node, second);
            assert_eq!(outcome.is_ok(), fits, "{first:?} then {second:?}: {outcome:?}");
        }
        drop(held);
    }
}

#[test]
fn a_loop_device_over_a_file_that_is_served() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img");
    let _held = Image::open(&path, Write).unwrap();
    let Some(device) = LoopDevice::on(&path, 512) else {
        println!("NOT TESTED: images under loop devices: there are none here");
        return;
    };
    for access in ALL {
        let text = refused(Path::new(device.path()), access);
        assert!(text.contains("is a loop device over"), "{text}");
    }
}

#[test]
fn what_is_mounted_here() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img");
    let place = dir.path().join("place");
    std::fs::create_dir(&place).unwrap();
    let made = run("mkfs.ext4", &["-q", path.to_str().unwrap()]);
    let Some(device) = LoopDevice::on(&path, 512).filter(|_| made) else {
        println!("NOT TESTED: mounted disks: there are no loop devices here, or no mkfs.ext4");
        return;
    };
    for (options, forbidden) in [("rw", &ALL[..]), ("ro,noload", &[Write, SharedWrite][..])] {
        if !run("mount", &["-o", options, device.path(), place.to_str().unwrap()]) {
            println!("NOT TESTED: mounted disks: mounting is not allowed here");
            return;
        }
        let _undo = Undo("umount", vec![place.to_str().unwrap().to_owned()]);
        for access in ALL {
            if forbidden.contains(&access) {
                let text = refused(Path::new(device.path()), access);
                assert!(text.contains("mounted at") && text.contains("umount"), "{options} {access:?}: {text}");
            } else {
                Image::open(Path::new(device.path()), access).unwrap();
            }
        }
    }
}

/// A btrfs over two devices: mountinfo shows neither of them.
#[test]
fn what_is_mounted_as_btrfs() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("place");
    std::fs::create_dir(&place).unwrap();
    let devices: Vec<_> = ["one.img", "two.img"]
        .into_iter()
        .map(|name| {
            let path = dir.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(128 << 20).unwrap();
            LoopDevice::on(&path, 512)
        })
        .collect();
    let [Some(one), Some(two)] = &devices[..] else {
        println!("NOT TESTED: btrfs: there are no loop devices here");
        return;
    };
    let place = place.to_str().unwrap();
    if !run("mkfs.btrfs", &["-q", "-d", "single", "-m", "single", one.path(), two.path()])
        || !run("mount", &["-t", "btrfs", one.path(), place])
    {
        println!("NOT TESTED: btrfs: there is no mkfs.btrfs, or the kernel cannot mount it here");
        return;
    }
    let _undo = Undo("umount", vec![place.to_owned()]);
    for device in [one, two] {
        for access in ALL {
            let text = refused(Path::new(device.path()), access);
            // The kernel's own claim comes first for `w`, and its words are replaced by who it is.
            assert!(text.contains("mounted at") && text.contains(place), "{} {access:?}: {text}", device.path());
        }
    }
}

/// Two partitions go to two guests; the whole disk to nobody else meanwhile, and the other way round.
#[test]
fn partitions_of_a_disk() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img");
    let Some(device) = LoopDevice::on(&path, 512) else {
        println!("NOT TESTED: partitions: there are no loop devices here");
        return;
    };
    let mut undo = Vec::new();
    for (number, start) in [("1", "2048"), ("2", "10240")] {
        if !run("addpart", &[device.path(), number, start, "8192"]) {
            println!("NOT TESTED: partitions: addpart cannot make any here");
            return;
        }
        undo.push(Undo("delpart", vec![device.path().to_owned(), number.to_owned()]));
    }
    let whole = PathBuf::from(device.path());
    let part = |number: u32| PathBuf::from(format!("{}p{number}", device.path()));
    if !part(1).exists() {
        println!("NOT TESTED: partitions: nobody makes nodes for them in /dev");
        return;
    }
    for first in ALL {
        for second in ALL {
            let one = Image::open(&part(1), first).unwrap();
            let two = Image::open(&part(2), second).unwrap();
            let fits = |access| {
                access == ReadOnly && (first, second) == (ReadOnly, ReadOnly)
                    || access == SharedWrite && (first, second) == (SharedWrite, SharedWrite)
            };
            for access in ALL {
                let outcome = Image::open(&whole, access);
                assert_eq!(outcome.is_ok(), fits(access), "{first:?}, {second:?}, whole {access:?}: {outcome:?}");
            }
            drop((one, two));
            let whole = Image::open(&whole, first).unwrap();
            let outcome = Image::open(&part(1), second);
            let fits = matches!((first, second), (ReadOnly, ReadOnly) | (SharedWrite, SharedWrite));
            assert_eq!(outcome.is_ok(), fits, "whole {first:?}, part {second:?}: {outcome:?}");
            drop(whole);
        }
    }
}

/// QEMU's tools see us, and we see them.
#[test]
fn qemu_and_we() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk.img");
    let write = |path: &Path| {
        let command = ["-f", "raw", "-c", "write 0 4k", path.to_str().unwrap()];
        let output = Command::new("qemu-io").args(command).output().ok()?;
        Some(output.status.success() && !String::from_utf8_lossy(&output.stderr).contains("lock"))
    };
    let Some(free) = write(&path) else {
        println!("NOT TESTED: QEMU's locks: qemu-io is not installed");
        return;
    };
    assert!(free);
    let held = Image::open(&path, Write).unwrap();
    assert_eq!(write(&path), Some(false), "qemu-io writes to a disk that a guest has");
    drop(held);
    let socket = dir.path().join("socket");
    let mut server = Command::new("qemu-nbd")
        .args(["-t", "-f", "raw", "-k", socket.to_str().unwrap(), path.to_str().unwrap()])
        .spawn()
        .unwrap();
    // It listens before it opens the image.
    common::until("qemu-nbd has it", || Image::check_now(&path, Write).is_err());
    // It shares what it serves with others that say they share: so w! is not in its way.
    let outcomes =
        [ReadOnly, Write].map(|access| Image::open(&path, access).map(drop).map_err(|error| error.to_string()));
    server.kill().unwrap();
    server.wait().unwrap();
    for outcome in outcomes {
        assert!(outcome.unwrap_err().contains("qemu-nbd"), "the refusal names the holder");
    }
}
