//! The broker: a thread that lets other processes sit at the machine.
//!
//! A connection is a seat. Messages come one at a time and are answered at once; descriptors that somebody sends
//! along are thrown away by the kernel, because no buffer for them is offered. When the connection closes, for
//! whatever reason, the seat is gone and with it its maps and ports, and a guest's domain.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::call::{Answer, MESSAGE_MAX, Refusal, Request};
use super::link::{SOCKET, send_answer};
use super::machine::Machine;
use super::memfd;
use super::state::{Limits, SeatId};
use crate::{Error, Result};

const STORE_SOCKET: &str = "xenstored.sock";
const LOCK: &str = "lock";

/// A machine that other processes join. Dropping it ends the machine: its sockets go, its members lose their seats.
#[derive(Debug)]
pub struct Running {
    machine: Machine,
    dir: PathBuf,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
    /// Held to the end: whoever has it owns the directory.
    _lock: OwnedFd,
}

impl Machine {
    /// Starts a machine in `dir`, which is created for this user alone if need be. Other processes join it there;
    /// dom0's programs find XenStore at `dir/xenstored.sock`.
    ///
    /// # Errors
    /// When another machine lives there, or the directory cannot be used.
    pub fn start(dir: impl AsRef<Path>, limits: Limits) -> Result<Running> {
        let dir = dir.as_ref().to_path_buf();
        let lock = claim(&dir)?;
        // Of a machine that was killed: nobody listens there, since we hold the lock. The store replaces its own.
        remove_socket(&dir.join(SOCKET))?;
        let machine = Self::listening(limits, &dir.join(STORE_SOCKET))?;
        let path = dir.join(SOCKET);
        let listener = listen(&path).map_err(|error| Error::io(format!("listening at {}", path.display()), error))?;
        let failed = |error| Error::io("starting the broker", error);
        let stop = memfd::eventfd().map_err(failed)?;
        let stopped = stop.try_clone().map_err(failed)?;
        let mut broker = Broker { machine: machine.clone(), listener, stop: stopped, members: Vec::new() };
        let thread = std::thread::Builder::new()
            .name("emu-xen broker".to_owned())
            .spawn(move || {
                if let Err(error) = broker.serve() {
                    tracing::error!(%error, "the broker ended");
                }
            })
            .map_err(failed)?;
        Ok(Running { machine, dir, stop, thread: Some(thread), _lock: lock })
    }
}

impl Running {
    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Where it lives.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&self.stop, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot stop the broker");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the broker panicked");
        }
        if let Err(error) = remove_socket(&self.dir.join(SOCKET)) {
            tracing::warn!(%error, "the machine's socket stays");
        }
        // Although handles of the machine may still be about: the directory is free from here on.
        self.machine.end_store();
    }
}

/// Takes the directory for us. A lock, and not the sockets, says whether somebody lives there: it goes with its
/// process, however that ends.
fn claim(dir: &Path) -> Result<OwnedFd> {
    match rustix::fs::mkdir(dir, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(Error::io(format!("creating {}", dir.display()), error)),
    }
    let path = dir.join(LOCK);
    let lock = rustix::fs::open(&path, OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
        .map_err(|error| Error::io(format!("opening {}", path.display()), error))?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(Errno::WOULDBLOCK) => Err(Error::Invalid(format!(
            "another machine lives in {}: stop it, or choose another directory",
            dir.display()
        ))),
        Err(error) => Err(Error::io(format!("locking {}", path.display()), error)),
    }
}

fn remove_socket(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("removing {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

fn listen(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 128)?;
    Ok(socket)
}

struct Broker {
    machine: Machine,
    listener: OwnedFd,
    stop: OwnedFd,
    members: Vec<Connection>,
}

struct Connection {
    socket: OwnedFd,
    /// None until the first message has asked for one.
    seat: Option<SeatId>,
}

impl Broker {
    fn serve(&mut self) -> io::Result<()> {
        let mut text = vec![0; MESSAGE_MAX];
        loop {
            let watched = [&self.stop, &self.listener].into_iter().chain(self.members.iter().map(|m| &m.socket));
            let mut polled: Vec<PollFd<'_>> = watched.map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
            match rustix::event::poll(&mut polled, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                // Members that are still there see their connections close.
                return Ok(());
            }
            // From the back, so that removing one does not move those still to be looked at.
            for at in (0..self.members.len()).rev() {
                if ready[at + 2] && !self.members[at].turn(&self.machine, &mut text) {
                    let gone = self.members.swap_remove(at);
                    if let Some(seat) = gone.seat {
                        self.machine.leave(seat);
                    }
                }
            }
            if ready[1] {
                self.accept()?;
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => self.members.push(Connection { socket, seat: None }),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => {
                // The connection stays in the queue and poll would report it without pause: breathe.
                tracing::warn!(%error, "no descriptor for another member");
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

impl Connection {
    /// Answers one message; false when the connection is to be closed.
    fn turn(&mut self, machine: &Machine, text: &mut [u8]) -> bool {
        let len = match rustix::net::recv(&self.socket, &mut *text, RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
            // TRUNC makes the second number the message's real length.
            Ok((_, len)) => len,
            Err(Errno::AGAIN | Errno::INTR) => return true,
            Err(_) => return false,
        };
        let request = match text.get(..len) {
            Some([]) => return false,
            Some(message) => serde_json::from_slice(message),
            None => {
                tracing::warn!(len, "a message longer than any question; its sender is thrown out");
                return false;
            }
        };
        match request {
            Ok(request) => {
                let answer = self.answer(machine, request);
                send_answer(&self.socket, &answer).is_ok()
            }
            Err(error) => {
                tracing::warn!(%error, "a malformed message; its sender is thrown out");
                false
            }
        }
    }

    fn answer(&mut self, machine: &Machine, request: Request) -> Result<Answer, Refusal> {
        match (self.seat, request) {
            (None, Request::Join(join)) => {
                let (seat, answer) = machine.join(join)?;
                self.seat = Some(seat);
                Ok(answer)
            }
            (None, _) => Err(Refusal::invalid("the first message has to be a join")),
            (Some(seat), request) => machine.call(seat, request),
        }
    }
}
