//! What a seat asks of the machine: the operations that change its state, as messages.
//!
//! Inside the machine's process they are values; through the broker they travel as JSON in one SEQPACKET message
//! each way, with file descriptors beside the answer.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::counters::Slot;
use crate::{DomId, Error, GrantRef, GrantStatus, Port};

/// No message is longer, in bytes.
pub(super) const MESSAGE_MAX: usize = 64 * 1024;
/// References in one map: their frames, ten digits each and a comma, must fit into the answer.
pub(super) const MAP_MAX: usize = 4096;
/// Descriptors that come with one answer.
pub(super) const FDS_MAX: usize = 4;

const _: () = assert!(MAP_MAX * 11 + 256 <= MESSAGE_MAX);

/// A question.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) enum Request {
    /// The first on every connection: whose seat it is to be.
    Join(Join),
    /// What is needed to copy from and map pages of a domain. Descriptors: its memory, its grant table.
    Peer { domid: u16 },
    /// Maps grants of `peer`, all or none.
    Map { peer: u16, generation: u32, refs: Vec<u32>, writable: bool },
    /// Takes a map back, all of it.
    Unmap { handle: u64 },
    /// Descriptors: the channel's page, our eventfd, the peer's.
    AllocUnbound { remote: u16 },
    /// Descriptors as for `AllocUnbound`.
    Bind { remote: u16, port: u32 },
    /// Closes a port of this seat.
    Close { port: u32 },
    /// Descriptor: a stream that XenStore serves as our domain.
    Store,
    /// Destroys a domain.
    Destroy { domid: u16 },
    /// All domains.
    List,
    /// The guest is done; its domain goes with it.
    Leave,
}

/// Whose seat.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) enum Join {
    /// A backend's, in dom0 or a driver domain. Descriptors: the board, the counters.
    Backend { domid: u16 },
    /// A new guest's. Descriptors: those, its memory, its grant table.
    Guest { name: String, pages: u32, domid: Option<u16> },
}

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    Joined { domid: u16 },
    Peer { generation: u32, pages: u32, slot: Slot },
    Mapped { handle: u64, frames: Vec<u32> },
    Channel { port: u32, side: u8, slot: Slot },
    Domains { all: Vec<DomainInfo> },
    Done,
}

/// An answer with its descriptors.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) reply: Reply,
    pub(super) fds: Vec<Arc<OwnedFd>>,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self { reply, fds: Vec::new() }
    }
}

/// The machine says no.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Refusal {
    Grant { gref: u32, status: i16 },
    Port { port: u32, reason: String },
    Invalid { reason: String },
    Io { context: String, errno: i32 },
}

impl Refusal {
    pub(super) fn grant(gref: GrantRef, status: GrantStatus) -> Self {
        Self::Grant { gref: gref.0, status: status as i16 }
    }

    pub(super) fn port(port: Port, reason: impl Into<String>) -> Self {
        Self::Port { port: port.0, reason: reason.into() }
    }

    pub(super) fn invalid(reason: impl Into<String>) -> Self {
        Self::Invalid { reason: reason.into() }
    }

    pub(super) fn io(context: &str, error: &std::io::Error) -> Self {
        Self::Io { context: context.to_owned(), errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }

    /// As the caller sees it: `operation` on something of `domain`.
    pub(super) fn into_error(self, operation: &'static str, domain: DomId) -> Error {
        match self {
            Self::Grant { gref, status } => {
                Error::Grant { operation, domain, gref: GrantRef(gref), status: GrantStatus::from_raw(status) }
            }
            Self::Port { port, reason } => Error::Port { operation, domain, port: Port(port), reason },
            Self::Invalid { reason } => Error::Invalid(reason),
            Self::Io { context, errno } => Error::io(context, std::io::Error::from_raw_os_error(errno)),
        }
    }
}

/// One domain, as `emu-xen list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainInfo {
    /// Its id.
    #[serde(with = "number")]
    pub domid: DomId,
    /// Its name.
    pub name: String,
    /// Pages of memory; none for dom0 and driver domains, which are processes of this machine.
    pub memory_pages: u32,
    /// Grant entries in use.
    pub grants: u32,
    /// Its grants that other domains have mapped, each counted as often as it is mapped.
    pub mapped: u32,
    /// Grants of others that it has mapped.
    pub maps_held: u32,
    /// Its ports, bound or not.
    pub ports: u32,
    /// Processes that act as this domain.
    pub seats: u32,
    /// Destroyed, and waiting for its last page to be unmapped.
    pub zombie: bool,
}

mod number {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::DomId;

    pub(super) fn serialize<S: Serializer>(domid: &DomId, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u16(domid.0)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<DomId, D::Error> {
        u16::deserialize(from).map(DomId)
    }
}
