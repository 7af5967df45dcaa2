//! Disks on NBD servers, real ones: qemu-nbd and nbdkit. They die, they forget, they come back; the guest waits.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use blkback::abi::op;
use blkback::drive;
use blkback::front::{Frontend, Options, Piece, Queue};
use blkback::vdev::Vdev;
use common::{Dom0, XVDA, outcomes, status, until};
use xenstore_client::Store;

/// A server that ends with the test.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// `None` where it is not installed.
    fn start(program: &str, args: &[&str], socket: &Path) -> Option<Self> {
        // What a killed one left behind.
        let _ = std::fs::remove_file(socket);
        let child = Command::new(program).args(args).stdout(Stdio::null()).spawn().ok()?;
        until("the server listens", || std::os::unix::net::UnixStream::connect(socket).is_ok());
        Some(Self { child, socket: socket.to_owned() })
    }

    fn qemu(image: &Path, socket: &Path, further: &[&str]) -> Option<Self> {
        let mut args = vec!["-t", "-f", "raw", "-e", "8", "-x", "disk", "-k", socket.to_str().unwrap()];
        args.extend(further);
        args.push(image.to_str().unwrap());
        let server = Self::start("qemu-nbd", &args, socket);
        if server.is_none() {
            println!("NOT TESTED: disks on qemu-nbd: it is not installed");
        }
        server
    }

    /// A server that keeps what is not flushed in memory.
    fn forgetful(image: &Path, socket: &Path) -> Option<Self> {
        let args = [
            "-f",
            "--filter=cache",
            "-U",
            socket.to_str().unwrap(),
            "file",
            image.to_str().unwrap(),
            "cache=writeback",
        ];
        let server = Self::start("nbdkit", &args, socket);
        if server.is_none() {
            println!("NOT TESTED: disks on a server that forgets: nbdkit is not installed");
        }
        server
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::fs::remove_file(&self.socket).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be dead already, and that is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn stamp(queue: &mut Queue, page: u32, value: u8) -> Piece {
    queue.data().copy_in(page as usize * 4096, &[value; 4096]);
    Piece { page, first: 0, last: 7 }
}

fn write(queue: &mut Queue, sector: u64, value: u8) {
    let piece = stamp(queue, 0, value);
    queue.submit(op::WRITE, sector, &[piece], 1);
    assert_eq!(status(queue), 0);
}

fn flush(queue: &mut Queue) {
    queue.submit(op::FLUSH_DISKCACHE, 0, &[], 2);
    assert_eq!(status(queue), 0);
}

fn read(queue: &mut Queue, sector: u64) -> u8 {
    queue.submit(op::READ, sector, &[Piece { page: 1, first: 0, last: 7 }], 3);
    assert_eq!(status(queue), 0);
    let mut bytes = [0; 4096];
    queue.data().copy_out(4096, &mut bytes);
    assert!(bytes.iter().all(|&byte| byte == bytes[0]), "one write's bytes");
    bytes[0]
}

fn image(dom0: &Dom0) -> (PathBuf, PathBuf) {
    (dom0.image("disk.img", 8 << 20), dom0.folder.path().join("server.sock"))
}

fn target(socket: &Path, export: &str) -> PathBuf {
    format!("nbd:unix:{}{export}", socket.display()).into()
}

#[test]
fn a_disk_on_qemu_nbd() {
    let dom0 = Dom0::start();
    let (image, socket) = image(&dom0);
    let Some(server) = Server::qemu(&image, &socket, &["--discard=unmap"]) else { return };
    let options = Options { queues: 2, pool_pages: 256, ..Options::default() };
    let mut disk = dom0.connected(&target(&socket, ":disk"), "w", &options);
    assert_eq!((disk.front.disk().sectors, disk.front.disk().sector_size), (16384, 512));
    assert!(disk.front.disk().discard);
    for queue in &mut disk.queues {
        for (number, sector) in (0..64u64).map(|number| (number as u8, number * 8)) {
            write(queue, sector, number + 1);
        }
        flush(queue);
        for (number, sector) in (0..64u64).map(|number| (number as u8, number * 8)) {
            assert_eq!(read(queue, sector), number + 1);
        }
        // Small, large, and many at once.
        let piece = stamp(queue, 2, 0x77);
        queue.submit(op::WRITE, 9, &[Piece { first: 1, last: 1, ..piece }], 4);
        assert_eq!(status(queue), 0);
        let pieces: Vec<_> = (0..200).map(|page| stamp(queue, page, 0x55)).collect();
        for number in 0..8 {
            queue.submit(op::WRITE, 2048 + number * 1600, &pieces, number);
        }
        assert!(outcomes(queue, 8).iter().all(|done| done.status == 0));
        flush(queue);
    }
    let file = std::fs::read(&image).unwrap();
    assert_eq!((file[9 * 512], file[10 * 512], file[2048 * 512]), (0x77, 2, 0x55));
    disk.queue().submit_discard(0, 2048, 5);
    assert_eq!(status(disk.queue()), 0);
    // The server said how large it is once; the command says so, rather than that nothing has changed.
    let (vdev, domid) = (Vdev::parse("xvda").unwrap(), hypervisor::Guest::domid(&*disk.guest));
    let error = drive::resize(&dom0.store, hypervisor::DomId::DOM0, domid, vdev).unwrap_err().to_string();
    assert!(error.contains("keeps its 16384 sectors"), "{error}");
    disk.close();
    drop(server);
}

#[test]
fn mistakes_are_said() {
    let dom0 = Dom0::start();
    let (image, socket) = image(&dom0);
    let guest = dom0.guest("guest");
    let attach = |what: &str| dom0.attach(&guest, what).unwrap_err().to_string();
    let text = attach(&format!("{},,xvda,w", target(&socket, "").display()));
    assert!(text.contains("the NBD server cannot be reached"), "{text}");
    let Some(_server) = Server::qemu(&image, &socket, &["-r"]) else { return };
    let text = attach(&format!("{},,xvda,w", target(&socket, ":nothing").display()));
    assert!(text.contains("no such export"), "{text}");
    let text = attach(&format!("{},,xvda,w", target(&socket, ":disk").display()));
    assert!(text.contains("read-only"), "{text}");
    dom0.attach(&guest, &format!("{},,xvda,r", target(&socket, ":disk").display())).unwrap();
}

/// The server is killed in the middle, again and again. Nothing fails, and nothing that was flushed, or only answered, is
/// missing: it is written again to the next one.
#[test]
fn servers_come_and_go() {
    let dom0 = Dom0::start();
    let (image, socket) = image(&dom0);
    let Some(mut server) = Server::forgetful(&image, &socket) else { return };
    let options = Options { pool_pages: 64, ..Options::default() };
    let mut disk = dom0.connected(&target(&socket, ""), "w", &options);
    let queue = disk.queue();
    for round in 1..=6u8 {
        // Answered, and not flushed.
        for sector in 0..32u64 {
            write(queue, sector * 8, round);
        }
        if round % 3 == 0 {
            flush(queue);
            assert_eq!(std::fs::read(&image).unwrap()[0], round, "flushed is on the medium");
        }
        // In flight.
        for slot in 0..16u32 {
            let piece = stamp(queue, 16 + slot, 100 + round);
            queue.submit(op::WRITE, 4096 + u64::from(slot) * 8, &[piece], u64::from(slot));
        }
        queue.publish().unwrap();
        server.kill();
        // Asked while there is nobody to answer.
        queue.submit(op::READ, 0, &[Piece { page: 40, first: 0, last: 7 }], 99);
        queue.publish().unwrap();
        std::thread::sleep(Duration::from_millis(30));
        server = Server::forgetful(&image, &socket).unwrap();
        assert!(outcomes(queue, 17).iter().all(|done| done.status == 0), "the guest sees no error");
        for sector in 0..32u64 {
            assert_eq!(read(queue, sector * 8), round, "what was answered before the server died");
        }
        for slot in 0..16u64 {
            assert_eq!(read(queue, 4096 + slot * 8), 100 + round);
        }
        flush(queue);
        let file = std::fs::read(&image).unwrap();
        assert_eq!((file[0], file[4096 * 512]), (round, 100 + round), "a flush after it tells the truth");
    }
    disk.close();
}

/// A disk whose server is gone for good can be taken away.
#[test]
fn a_dead_server_holds_up_no_detach() {
    let dom0 = Dom0::start();
    let (image, socket) = image(&dom0);
    let Some(server) = Server::qemu(&image, &socket, &[]) else { return };
    let mut disk = dom0.connected(&target(&socket, ":disk"), "w", &Options::default());
    server.kill();
    let queue = disk.queue();
    queue.submit(op::READ, 0, &[Piece { page: 0, first: 0, last: 7 }], 1);
    queue.publish().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(queue.outcome().unwrap().is_none(), "the guest waits");
    disk.close();
}

/// A disk in a drive whose server is gone for good can be taken out, with reads of it waiting.
#[test]
fn a_disk_of_a_dead_server_is_ejected() {
    let dom0 = Dom0::start();
    let (image, socket) = image(&dom0);
    let other = dom0.image("other.iso", 1 << 20);
    let Some(server) = Server::qemu(&image, &socket, &["-r"]) else { return };
    let guest = dom0.guest("guest");
    dom0.attach(&guest, &format!("{},,xvdd:cdrom,r", target(&socket, ":disk").display())).unwrap();
    let mut front = Frontend::connect(guest.clone(), XVDA + 3 * 16, &Options::default()).unwrap();
    let mut queues = front.take_queues();
    server.kill();
    queues[0].submit(op::READ, 0, &[Piece { page: 0, first: 0, last: 7 }], 1);
    queues[0].publish().unwrap();
    let vdev = Vdev::parse("xvdd").unwrap();
    let domid = hypervisor::Guest::domid(&*guest);
    drive::change(&dom0.store, hypervisor::DomId::DOM0, domid, vdev, None).unwrap();
    let state = format!("{}/sectors", front.backend_path());
    until("the drive is empty", || dom0.store.read_opt(&state).unwrap().as_deref() == Some("0"));
    assert_eq!(outcomes(&mut queues[0], 1)[0].status, -1);
    // And two changes that come together are both made, at once.
    let path = front.backend_path().to_owned();
    for params in [other.to_str().unwrap(), ""] {
        dom0.store.write(&format!("{path}/params"), params).unwrap();
    }
    drive::change(&dom0.store, hypervisor::DomId::DOM0, domid, vdev, other.to_str()).unwrap();
    until("the drive is full", || dom0.store.read_opt(&state).unwrap().as_deref() == Some("2048"));
    front.close(queues).unwrap();
}

/// The server comes back with another disk: it is not taken for the old one.
#[test]
fn another_disk_is_not_the_same() {
    let dom0 = Dom0::start();
    let (image, socket) = image(&dom0);
    let other = dom0.image("other.img", 4 << 20);
    let Some(server) = Server::qemu(&image, &socket, &[]) else { return };
    let mut disk = dom0.connected(&target(&socket, ":disk"), "w", &Options::default());
    write(disk.queue(), 0, 7);
    server.kill();
    let impostor = Server::qemu(&other, &socket, &[]).unwrap();
    let queue = disk.queue();
    queue.submit(op::READ, 0, &[Piece { page: 0, first: 0, last: 7 }], 1);
    queue.publish().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(queue.outcome().unwrap().is_none(), "the guest waits for its own disk");
    impostor.kill();
    let _server = Server::qemu(&image, &socket, &[]).unwrap();
    assert!(outcomes(queue, 1).iter().all(|done| done.status == 0));
    assert_eq!(read(queue, 0), 7);
    disk.close();
}
