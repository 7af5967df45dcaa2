//! Pairs of sockets in the place of taps, and taps in a namespace of the test's own.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use netback::tap::{Tap, TapError, Taps};
use netback::vnet::Offload;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::PATIENCE;

/// By name and queue.
type Ends = HashMap<(String, u32), Arc<End>>;

/// Where the sockets' other ends are kept.
#[derive(Debug, Clone, Default)]
pub struct PairTaps(Arc<Mutex<Ends>>);

impl PairTaps {
    /// The network's side of a tap's queue.
    pub fn end(&self, name: &str, queue: u32) -> Arc<End> {
        let ends = self.0.lock().unwrap();
        ends.get(&(name.to_owned(), queue)).unwrap_or_else(|| panic!("no tap {name}, queue {queue}")).clone()
    }
}

impl Taps for PairTaps {
    fn open(&self, name: &str, queue: u32) -> Result<Tap, TapError> {
        let failed = |source: std::io::Error| TapError { what: "socketpair", name: name.to_owned(), source };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|error| failed(error.into()))?;
        self.0.lock().unwrap().insert((name.to_owned(), queue), Arc::new(End(theirs)));
        Tap::from_fd(ours).map_err(failed)
    }
}

/// The network's side.
#[derive(Debug)]
pub struct End(OwnedFd);

impl End {
    fn poll(&self, flags: PollFlags, patience: Duration) -> bool {
        let mut fds = [PollFd::new(&self.0, flags)];
        let limit = rustix::event::Timespec::try_from(patience).unwrap();
        poll(&mut fds, Some(&limit)).unwrap() > 0
    }

    /// The next frame from the guest, with its header; none when none comes in `patience`.
    pub fn next(&self, patience: Duration) -> Option<(Offload, Vec<u8>)> {
        let mut buffer = vec![0; 70_000];
        let began = Instant::now();
        loop {
            match recv(&self.0, &mut buffer[..], RecvFlags::empty()) {
                Ok((len, _)) => {
                    assert!(len >= Offload::SIZE, "a write of {len} bytes to the tap");
                    let header = buffer[..Offload::SIZE].try_into().unwrap();
                    return Some((Offload::decode(&header).unwrap(), buffer[Offload::SIZE..len].to_vec()));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let left = patience.saturating_sub(began.elapsed());
                    if left.is_zero() || !self.poll(PollFlags::IN, left) {
                        return None;
                    }
                }
                Err(error) => panic!("the tap's other end: {error}"),
            }
        }
    }

    /// The next frame, which must come.
    pub fn packet(&self) -> (Offload, Vec<u8>) {
        self.next(PATIENCE).expect("a frame at the tap")
    }

    /// The bytes of the next frame.
    pub fn frame(&self) -> Vec<u8> {
        self.packet().1
    }

    /// Nothing has come. The caller has seen an answer to what was sent, so nothing is on its way either.
    pub fn is_quiet(&self) -> bool {
        self.next(Duration::ZERO).is_none()
    }

    /// Sends a frame to the guest, which goes without any offload.
    pub fn send(&self, frame: &[u8]) {
        self.send_as(&Offload::NONE, frame);
    }

    /// Sends a frame to the guest.
    pub fn send_as(&self, offload: &Offload, frame: &[u8]) {
        let began = Instant::now();
        while !self.try_send(offload, frame) {
            assert!(began.elapsed() < PATIENCE, "no room in the tap");
            self.poll(PollFlags::OUT, Duration::from_millis(100));
        }
    }

    /// Sends a frame if there is room for it, and a tap at all.
    pub fn send_if_there(&self, frame: &[u8]) {
        let message = [&Offload::NONE.encode()[..], frame].concat();
        // Full or gone: that is what this is for.
        let _ = send(self.0.as_fd(), &message, SendFlags::NOSIGNAL);
    }

    /// Sends a frame if there is room for it.
    pub fn try_send(&self, offload: &Offload, frame: &[u8]) -> bool {
        let message = [&offload.encode()[..], frame].concat();
        match send(self.0.as_fd(), &message, SendFlags::NOSIGNAL) {
            Ok(len) => len == message.len(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("the tap's other end: {error}"),
        }
    }
}

/// Gives the calling thread, and those it starts, a network of their own. False, and a line that says so, where that is
/// not allowed.
pub fn own_network(what: &str) -> bool {
    match nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        Ok(()) => true,
        Err(error) => {
            println!("NOT TESTED: {what}: a network namespace cannot be made ({error}); run as root");
            false
        }
    }
}

/// Runs `ip` in the calling thread's network. None when there is no such program.
pub fn ip(arguments: &str) -> Option<String> {
    let output = std::process::Command::new("ip").args(arguments.split(' ')).output().ok()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "ip {arguments}: {said}");
    Some(String::from_utf8(output.stdout).unwrap())
}
