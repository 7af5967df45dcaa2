//! NBD servers that hang, lie and dawdle. They are played here; what they do to their own disk is theirs, but the guest
//! gets rid of it, and no other disk notices.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blkback::abi::op;
use blkback::front::{Options, Piece};
use blkback::image::Image;
use blkback::nbd::protocol::*;
use blkback::spec::Access;
use common::{Dom0, until};
use hypervisor::Guest;
use xenstore_client::Store;

const SIZE: u64 = 64 << 20;

/// What a server does once it has been asked for its export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// Takes requests, and answers none.
    Swallow,
    /// Does not even read them.
    Hang,
    /// Says that requests are multiples of this.
    Block(u32),
    /// Says something that nobody asked for, again and again, and never comes to an end.
    Dawdle,
}

/// A server of this process, and how many bytes of requests it took.
struct Server {
    socket: PathBuf,
    taken: Arc<AtomicUsize>,
}

impl Server {
    fn start(folder: &Path, then: Then) -> Self {
        let socket = folder.join("hostile.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let taken = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&taken);
        // Its threads end with the process, as those of a server that hangs do.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let counted = Arc::clone(&counted);
                // That the client leaves is what the tests want.
                std::thread::spawn(move || drop(serve(stream, then, &counted)));
            }
        });
        Self { socket, taken }
    }

    fn target(&self) -> PathBuf {
        format!("nbd:unix:{}", self.socket.display()).into()
    }

    fn taken(&self) -> usize {
        self.taken.load(Ordering::Acquire)
    }
}

fn serve(mut stream: UnixStream, then: Then, taken: &AtomicUsize) -> io::Result<()> {
    stream.write_all(&greeting(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES))?;
    stream.read_exact(&mut [0; 4])?;
    let mut header = [0; OPTION_SIZE];
    stream.read_exact(&mut header)?;
    let header = OptionHeader::decode(&header).map_err(io::Error::other)?;
    stream.read_exact(&mut vec![0; header.length as usize])?;
    let mut said = Vec::new();
    let export = NBD_INFO_EXPORT.to_be_bytes();
    let flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH;
    put_option_reply(&mut said, NBD_OPT_GO, NBD_REP_INFO, &[&export, &SIZE.to_be_bytes(), &flags.to_be_bytes()]);
    if let Then::Block(block) = then {
        let (kind, most) = (NBD_INFO_BLOCK_SIZE.to_be_bytes(), (1u32 << 25).to_be_bytes());
        put_option_reply(&mut said, NBD_OPT_GO, NBD_REP_INFO, &[&kind, &block.to_be_bytes(), &most, &most]);
    }
    if then == Then::Dawdle {
        let mut name = Vec::new();
        put_option_reply(&mut name, NBD_OPT_GO, NBD_REP_INFO, &[&NBD_INFO_NAME.to_be_bytes(), &[b'x'; 1000]]);
        loop {
            for byte in &name {
                stream.write_all(&[*byte])?;
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }
    put_option_reply(&mut said, NBD_OPT_GO, NBD_REP_ACK, &[]);
    stream.write_all(&said)?;
    if then == Then::Swallow {
        loop {
            match stream.read(&mut [0; 1 << 16])? {
                0 => return Ok(()),
                bytes => taken.fetch_add(bytes, Ordering::AcqRel),
            };
        }
    }
    loop {
        std::thread::park();
    }
}

/// Reads, writes and a flush that the server never answers; many, so that its socket is full if it does not read.
fn ask(queue: &mut blkback::front::Queue) {
    let pieces =
        |first: u32| -> Vec<Piece> { (first..first + 8).map(|page| Piece { page, first: 0, last: 7 }).collect() };
    for number in 0..24u64 {
        queue.submit(op::WRITE, number * 64, &pieces(8), number);
    }
    queue.submit(op::READ, 0, &pieces(0), 30);
    queue.submit(op::FLUSH_DISKCACHE, 0, &[], 31);
    queue.publish().unwrap();
}

/// The disk of a server that hangs can be taken away: what it owes is answered or withheld, nothing stays mapped, and the
/// connection is closed.
#[test]
fn a_hung_server_holds_up_no_detach() {
    for then in [Then::Swallow, Then::Hang] {
        let dom0 = Dom0::start();
        let server = Server::start(dom0.folder.path(), then);
        let mut disk = dom0.connected(&server.target(), "w", &Options::default());
        ask(disk.queue());
        if then == Then::Swallow {
            until("the server has the requests", || server.taken() > 24 * 8 * 4096);
        }
        let guest = disk.guest.clone();
        // Fails if a grant is still in use.
        disk.close();
        dom0.detach(&guest, "xvda");
    }
}

/// The same for a guest that is destroyed: nothing of it stays.
#[test]
fn a_hung_server_keeps_no_dead_domain() {
    let dom0 = Dom0::start();
    let server = Server::start(dom0.folder.path(), Then::Hang);
    let mut disk = dom0.connected(&server.target(), "w", &Options::default());
    ask(disk.queue());
    let (domid, backend) = (Guest::domid(&*disk.guest), disk.front.backend_path().to_owned());
    dom0.machine.destroy(domid).unwrap();
    until("the backend is through with it", || {
        let state = dom0.store.read_opt(&format!("{backend}/state")).unwrap();
        state.is_none_or(|state| state == "6")
    });
    until("everything is unmapped", || {
        let counters = dom0.machine.counters();
        counters.maps == counters.unmaps
    });
}

/// What cannot be is refused with a sentence, and nothing else ends by it.
#[test]
fn servers_that_lie_are_refused() {
    for (block, reason) in [(64 << 20, "67108864"), (1 << 17, "131072"), (3000, "3000")] {
        let dom0 = Dom0::start();
        let server = Server::start(dom0.folder.path(), Then::Block(block));
        let error = Image::open(&server.target(), Access::Write).unwrap_err().to_string();
        assert!(error.contains("multiples") && error.contains(reason), "{error}");
        let guest = dom0.guest("guest");
        let refused = dom0.attach(&guest, &format!("{},raw,xvda,w", server.target().display())).unwrap_err();
        assert!(refused.to_string().contains("multiples"), "{refused}");
        // The control thread is as well as before.
        let image = dom0.image("disk.img", 1 << 20);
        dom0.connected(&image, "w", &Options::default()).close();
    }
    let dom0 = Dom0::start();
    let server = Server::start(dom0.folder.path(), Then::Block(1 << 16));
    let image = Image::open(&server.target(), Access::Write).unwrap();
    assert_eq!((image.unit, image.sectors()), (1 << 16, SIZE / 512));
}

#[test]
fn servers_that_dawdle_are_given_up() {
    let dom0 = Dom0::start();
    let server = Server::start(dom0.folder.path(), Then::Dawdle);
    let error = Image::check(&server.target(), Access::Write).unwrap_err().to_string();
    assert!(error.contains("does not come to an end"), "{error}");
    // One that does not accept, and before whose door others wait already.
    let path = dom0.folder.path().join("shut.sock");
    let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let _waits = UnixStream::connect(&path).unwrap();
    let shut: PathBuf = format!("nbd:unix:{}", path.display()).into();
    let error = Image::check(&shut, Access::Write).unwrap_err().to_string();
    assert!(error.contains("accepts no connection"), "{error}");
}
