//! How a seat reaches its machine: by a call inside the process, or by a message to the broker.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use super::call::{Answer, FDS_MAX, Join, MESSAGE_MAX, Refusal, Reply, Request};
use super::machine::Machine;
use super::state::SeatId;
use crate::{Error, Result};

/// The broker's socket in the machine's directory.
pub(super) const SOCKET: &str = "hypervisor.sock";

/// A connection to the broker.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    /// Room for an answer, kept from call to call.
    answer: Vec<u8>,
}

#[derive(Debug)]
pub(super) enum Link {
    /// In the machine's own process.
    Local { machine: Machine, seat: SeatId },
    /// Through the broker; the lock keeps a question and its answer together.
    Broker(Mutex<Connection>),
}

impl Drop for Link {
    fn drop(&mut self) {
        // The broker sees its connection close; a local machine has to be told.
        if let Self::Local { machine, seat } = self {
            machine.leave(*seat);
        }
    }
}

impl Link {
    /// Takes a seat at a machine of this process.
    pub(super) fn local(machine: &Machine, join: Join) -> Result<(Self, Answer), Refusal> {
        let (seat, answer) = machine.join(join)?;
        Ok((Self::Local { machine: machine.clone(), seat }, answer))
    }

    /// Takes a seat at the machine that is served in `dir`.
    pub(super) fn broker(dir: &Path, join: Join) -> Result<(Self, Answer), Refusal> {
        let path = dir.join(SOCKET);
        let context = format!("joining the machine at {} (does emu-xen serve it?)", path.display());
        let socket = connect(&path).map_err(|error| Refusal::io(&context, &error.into()))?;
        let link = Self::Broker(Mutex::new(Connection { socket, answer: vec![0; MESSAGE_MAX] }));
        let answer = link.call(Request::Join(join))?;
        Ok((link, answer))
    }

    /// Asks, and waits for the answer.
    pub(super) fn call(&self, request: Request) -> Result<Answer, Refusal> {
        match self {
            Self::Local { machine, seat } => machine.call(*seat, request),
            Self::Broker(connection) => connection.lock().unwrap_or_else(PoisonError::into_inner).exchange(&request),
        }
    }
}

fn connect(path: &Path) -> rustix::io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

impl Connection {
    fn exchange(&mut self, request: &Request) -> Result<Answer, Refusal> {
        let lost = |error: std::io::Error| Refusal::io("talking to the machine (has emu-xen ended?)", &error);
        let question = serde_json::to_vec(request).map_err(|error| lost(error.into()))?;
        rustix::net::send(&self.socket, &question, SendFlags::NOSIGNAL).map_err(|error| lost(error.into()))?;

        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut self.answer)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )
        })
        .map_err(|error| lost(error.into()))?;
        let fds: Vec<Arc<OwnedFd>> = control
            .drain()
            .filter_map(|message| if let RecvAncillaryMessage::ScmRights(fds) = message { Some(fds) } else { None })
            .flatten()
            .map(Arc::new)
            .collect();
        if received.bytes == 0 {
            return Err(lost(rustix::io::Errno::CONNRESET.into()));
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            // The kernel had descriptors for us and this process has no room for them.
            return Err(lost(rustix::io::Errno::MFILE.into()));
        }
        let reply: Result<Reply, Refusal> =
            serde_json::from_slice(&self.answer[..received.bytes]).map_err(|error| lost(error.into()))?;
        reply.map(|reply| Answer { reply, fds })
    }
}

/// The broker's half: sends an answer with its descriptors, without ever waiting. A member asks one thing at a time
/// and always has room for the answer; one that has not is not worth waiting for.
pub(super) fn send_answer(socket: impl AsFd, answer: &Result<Answer, Refusal>) -> std::io::Result<()> {
    let (reply, fds) = match answer {
        Ok(answer) => (Ok(&answer.reply), answer.fds.as_slice()),
        Err(refusal) => (Err(refusal), &[][..]),
    };
    let text = serde_json::to_vec(&reply)?;
    let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(std::io::Error::other("an answer with too many descriptors"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(&text)], &mut control, flags)?;
    Ok(())
}

/// An answer of the wrong kind: the machine and we were not built together.
pub(super) fn unexpected(answer: &Answer) -> Error {
    Error::Invalid(format!(
        "the machine answered with {:?} and {} descriptors: is its emu-xen another version?",
        answer.reply,
        answer.fds.len()
    ))
}
