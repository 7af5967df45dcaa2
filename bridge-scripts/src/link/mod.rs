//! The kernel's network, by rtnetlink(7): reading a [`State`](crate::state::State), carrying out a
//! [`Step`](crate::step::Step).
//!
//! One socket, blocking, a request at a time: a hotplug program makes a dozen of them and ends. A socket belongs to the
//! network namespace of the thread that opened it.

mod addresses;
mod change;
mod conntrack;
mod dump;
mod filter;
mod filters_told;
mod links;
mod qdisc;
mod renames;
mod routes;
mod wire;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use rustix::io::Errno;

use wire::{Message, attrs, text, u16_at, u32_at};

pub use change::Mode;
pub use conntrack::forget_connections;
pub(crate) use dump::read_sysctl;
pub(crate) use filter::placed;
pub(crate) use filters_told::{FiltersTold, Touched};
pub use renames::{Renamed, Renames};

/// Bytes of room for one answer of the kernel. It never sends more than 32 KiB at a time in a dump.
const ROOM: usize = 64 << 10;
/// NLMSGERR_ATTR_MSG of linux/netlink.h.
const ERROR_TEXT: u16 = 1;
/// NLM_F_ACK_TLVS and NLM_F_CAPPED of linux/netlink.h.
const ACK_TLVS: u16 = 0x200;
const CAPPED: u16 = 0x100;

/// The kernel refused something, or there is no way to ask it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No socket, or it broke.
    #[error("cannot talk to the kernel about its network (rtnetlink): {0}")]
    Socket(#[source] io::Error),
    /// The kernel said no.
    #[error("the kernel refuses: {}{}", io::Error::from_raw_os_error(*.errno), .text.as_ref().map(|text| format!(" ({text})")).unwrap_or_default())]
    Kernel {
        /// Its error number.
        errno: i32,
        /// What it says about it, if anything.
        text: Option<String>,
    },
    /// A kernel that cannot filter.
    #[error(
        "this kernel cannot filter what {link} sends ({source}): it needs the modules sch_ingress and cls_bpf. Load them, or \
         say antispoof=off, and the guest may send anything"
    )]
    NoFilter {
        /// The link.
        link: String,
        /// What the kernel says.
        source: Box<Error>,
    },
    /// There is no such link.
    #[error("there is no network device {0:?}: `ip link` shows those there are")]
    NoLink(String),
    /// A dump was disturbed by changes too often.
    #[error("the network changes all the time: its state could not be read in {0} attempts")]
    Restless(usize),
    /// A sysctl cannot be read or written.
    #[error("/proc/sys/{path}: {source}")]
    Sysctl {
        /// Its path below /proc/sys.
        path: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// A step that is none of rtnetlink's. A mistake in our programs.
    #[error("not a matter of rtnetlink: {0}")]
    NotOurs(String),
}

impl Error {
    /// The kernel's error number, where it gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Kernel { errno, .. } => Some(*errno),
            Self::NoLink(_) => Some(libc::ENODEV),
            Self::NoFilter { source, .. } => source.errno(),
            Self::Sysctl { source, .. } | Self::Socket(source) => source.raw_os_error(),
            _ => None,
        }
    }
}

/// A connection to the kernel's rtnetlink.
#[derive(Debug)]
pub struct Link {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    /// Names of links by index, as far as they have been asked for.
    names: HashMap<u32, String>,
}

impl Link {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// When the kernel gives none.
    pub fn open() -> Result<Self, Error> {
        let link = Self::open_to(NETLINK_ROUTE)?;
        // With strict checks a dump can be limited to one link in the kernel.
        link.socket.set_netlink_get_strict_chk(true).map_err(Error::Socket)?;
        Ok(link)
    }

    fn open_to(protocol: isize) -> Result<Self, Error> {
        let mut socket = Socket::new(protocol).map_err(Error::Socket)?;
        socket.bind_auto().map_err(Error::Socket)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(Error::Socket)?;
        socket.set_cap_ack(true).map_err(Error::Socket)?;
        socket.set_ext_ack(true).map_err(Error::Socket)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(ROOM), names: HashMap::new() })
    }

    /// The index of a link by its name.
    fn index(&self, name: &str) -> Result<u32, Error> {
        self.find(name)?.ok_or_else(|| Error::NoLink(name.to_owned()))
    }

    /// Whether there is a link of this name.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn exists(&self, name: &str) -> Result<bool, Error> {
        Ok(self.find(name)?.is_some())
    }

    /// Whether a link is switched on; one that is not there is not.
    pub(crate) fn is_up(&mut self, name: &str) -> Result<bool, Error> {
        let Some(index) = self.find(name)? else { return Ok(false) };
        let reply = self.get(Message::new(libc::RTM_GETLINK, 0, &wire::link_header(0, index, 0, 0)))?;
        Ok(reply.as_deref().and_then(links::parse).is_some_and(|told| told.state.up))
    }

    /// The index of a link by its name, if there is one.
    fn find(&self, name: &str) -> Result<Option<u32>, Error> {
        match rustix::net::netdevice::name_to_index(self.fd(), name) {
            Ok(index) => Ok(Some(index)),
            Err(Errno::NODEV) => Ok(None),
            Err(error) => Err(Error::Socket(error.into())),
        }
    }

    /// The name of a link by its index; `None` if it has just gone.
    pub(crate) fn name(&mut self, index: u32) -> Result<Option<String>, Error> {
        if let Some(name) = self.names.get(&index) {
            return Ok(Some(name.clone()));
        }
        match rustix::net::netdevice::index_to_name(self.fd(), index) {
            Ok(name) => {
                self.names.insert(index, name.clone());
                Ok(Some(name))
            }
            Err(Errno::NODEV) => Ok(None),
            Err(error) => Err(Error::Socket(error.into())),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends a change and waits for the kernel's word on it.
    fn change(&mut self, message: Message) -> Result<(), Error> {
        let sequence = self.send(message)?;
        loop {
            self.receive()?;
            for (kind, body) in Replies::new(&self.buffer, sequence) {
                if kind == REPLY_ERROR {
                    return reply_error(body);
                }
            }
        }
    }

    /// Asks for everything of a kind. Each reply's fixed part and attributes go to `each`.
    fn dump(&mut self, request: impl Fn() -> Message, mut each: impl FnMut(&[u8])) -> Result<(), Error> {
        const ATTEMPTS: usize = 20;
        for _ in 0..ATTEMPTS {
            let sequence = self.send(request())?;
            // Kept until the end, because a dump that was disturbed is worth nothing.
            let mut bodies: Vec<Vec<u8>> = Vec::new();
            let mut disturbed = false;
            'reply: loop {
                self.receive()?;
                for (kind, body) in Replies::new(&self.buffer, sequence) {
                    match kind {
                        REPLY_DONE => {
                            let errno = u32_at(body, 0).cast_signed();
                            if errno < 0 {
                                return Err(Error::Kernel { errno: -errno, text: None });
                            }
                            break 'reply;
                        }
                        REPLY_ERROR => return reply_error(body),
                        REPLY_DISTURBED => disturbed = true,
                        _ => bodies.push(body.to_vec()),
                    }
                }
            }
            if !disturbed {
                bodies.iter().for_each(|body| each(body));
                return Ok(());
            }
        }
        Err(Error::Restless(ATTEMPTS))
    }

    /// Asks for one thing. `None` if it does not exist.
    fn get(&mut self, message: Message) -> Result<Option<Vec<u8>>, Error> {
        let sequence = self.send(message)?;
        loop {
            self.receive()?;
            // There is one reply; anything else belongs to an earlier request.
            let Some((kind, body)) = Replies::new(&self.buffer, sequence).next() else { continue };
            if kind != REPLY_ERROR {
                return Ok(Some(body.to_vec()));
            }
            return match reply_error(body) {
                Err(error) if matches!(error.errno(), Some(libc::ENODEV | libc::ENOENT)) => Ok(None),
                other => other.map(|()| None),
            };
        }
    }

    fn send(&mut self, message: Message) -> Result<u32, Error> {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let bytes = message.finish(self.sequence);
        self.socket.send(&bytes, 0).map_err(Error::Socket)?;
        Ok(self.sequence)
    }

    fn receive(&mut self) -> Result<(), Error> {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(Error::Socket(error)),
            }
        }
    }
}

const REPLY_ERROR: u16 = 2;
const REPLY_DONE: u16 = 3;
/// Not a kind of the kernel's: stands for a reply with NLM_F_DUMP_INTR, whose dump has to be asked for again.
const REPLY_DISTURBED: u16 = 0;
const DUMP_INTERRUPTED: u16 = 0x10;

/// The replies to one request in a buffer: kind, and what follows the header.
struct Replies<'a> {
    bytes: &'a [u8],
    sequence: u32,
    disturbed: bool,
}

impl<'a> Replies<'a> {
    fn new(bytes: &'a [u8], sequence: u32) -> Self {
        Self { bytes, sequence, disturbed: false }
    }
}

impl<'a> Iterator for Replies<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let length = u32_at(self.bytes, 0) as usize;
            let message = self.bytes.get(..length).filter(|message| message.len() >= 16)?;
            let (kind, flags) = (u16_at(message, 4), u16_at(message, 6));
            if flags & DUMP_INTERRUPTED != 0 && !self.disturbed && u32_at(message, 8) == self.sequence {
                self.disturbed = true;
                return Some((REPLY_DISTURBED, &[]));
            }
            self.bytes = self.bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
            if u32_at(message, 8) == self.sequence {
                // The flags of an error say whether a text follows; they are handed on in front of it.
                return Some((kind, if kind == REPLY_ERROR { &message[4..] } else { &message[16..] }));
            }
        }
    }
}

/// What an NLMSG_ERROR says; `body` begins with the kind and the flags of its header.
fn reply_error(body: &[u8]) -> Result<(), Error> {
    let (flags, errno) = (u16_at(body, 2), u32_at(body, 12).cast_signed());
    if errno == 0 {
        return Ok(());
    }
    // struct nlmsgerr: the number, then the request's header (and its body, if that was not left out), then attributes.
    let request = u32_at(body, 16) as usize;
    let skipped = if flags & CAPPED != 0 { 16 } else { request.next_multiple_of(4) };
    let tlvs = body.get(16 + skipped..).filter(|_| flags & ACK_TLVS != 0).unwrap_or(&[]);
    let said = attrs(tlvs).find(|(kind, _)| *kind == ERROR_TEXT).map(|(_, value)| text(value));
    Err(Error::Kernel { errno: -errno, text: said })
}
