//! The socket through which the kernel is asked for tables.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nftables::{NfTablesMessage, TableAttribute};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::encode::{self, About, Part};
use super::{Family, Malformed, Table};

/// NFNL_SUBSYS_NFTABLES of linux/netfilter/nfnetlink.h: whose batch it is.
const SUBSYSTEM: u16 = 10;
/// Number of a batch's first message; netlink calls it the sequence number.
const FIRST: u32 = 1;

/// One change of the kernel's tables.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// This table, whatever was there under its name.
    Replace(Table),
    /// No table of this name. If there is none already, nothing happens.
    Delete(Family, String),
}

impl Change {
    fn about(&self) -> String {
        match self {
            Self::Replace(table) => format!("table {} {}", table.family, table.name),
            Self::Delete(family, name) => format!("delete table {family} {name}"),
        }
    }
}

/// Why tables were not changed. Nothing was changed then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No kernel was asked.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The kernel refused a part, and so everything.
    #[error("{change}: {about}: {source}{hint}")]
    Refused {
        /// Which change.
        change: String,
        /// Which part of it: a set, a chain, a rule.
        about: String,
        /// The kernel's answer.
        source: io::Error,
        /// The kernel's words, or ours about what it may mean; begins with its own separator, or is empty.
        hint: String,
    },
    /// The socket does not work.
    #[error("nf_tables: {context}: {source}{hint}")]
    Socket {
        /// What was being done.
        context: &'static str,
        /// The operating system's answer.
        source: io::Error,
        /// What may help; begins with its own separator, or is empty.
        hint: &'static str,
    },
    /// The kernel said something else than expected.
    #[error("nf_tables: the kernel's answer is not understood: {0}")]
    Answer(String),
}

/// A connection to the nf_tables of the network namespace that the calling thread is in.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
}

impl Nft {
    /// Connects.
    ///
    /// # Errors
    /// When the kernel has no netfilter.
    pub fn open() -> Result<Self, Error> {
        let fail = |context| move |source| Error::Socket { context, source, hint: "" };
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(fail("open a socket"))?;
        socket.bind_auto().map_err(fail("bind the socket"))?;
        // Both only make answers better; a kernel without them still answers.
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_ext_ack(true);
        Ok(Self { socket })
    }

    /// Makes all changes, or none.
    ///
    /// # Errors
    /// What the kernel refused first, and why. Nothing was changed then.
    pub fn apply(&mut self, changes: &[Change]) -> Result<(), Error> {
        let replaces = changes.iter().any(|change| matches!(change, Change::Replace(_)));
        let there = if replaces { self.tables()? } else { Vec::new() };
        // Once a table was deleted the kernel lets the socket close only after all processors have seen it, which takes
        // many milliseconds. A new table needs no deletion.
        let new = |table: &Table| !there.iter().any(|(family, name)| (*family, name) == (table.family, &table.name));
        match self.commit(changes, new) {
            // Somebody made it since.
            Err(Error::Refused { source, .. }) if source.raw_os_error() == Some(libc::EEXIST) => {
                self.commit(changes, |_| false)
            }
            other => other,
        }
    }

    fn commit(&mut self, changes: &[Change], new: impl Fn(&Table) -> bool) -> Result<(), Error> {
        let mut parts: Vec<(String, Part<'_>)> = Vec::new();
        for change in changes {
            let of_change = match change {
                Change::Replace(table) => {
                    table.check()?;
                    encode::replace(table, new(table))
                }
                Change::Delete(family, name) => encode::delete(*family, name),
            };
            parts.extend(of_change.into_iter().map(|part| (change.about(), part)));
        }
        self.batch(parts)
    }

    /// Makes changes that are not of whole tables, all or none.
    pub(super) fn send_parts(&mut self, parts: Vec<Part<'_>>, about: &str) -> Result<(), Error> {
        self.batch(parts.into_iter().map(|part| (about.to_owned(), part)).collect())
    }

    fn batch(&mut self, parts: Vec<(String, Part<'_>)>) -> Result<(), Error> {
        let Some(last) = u32::try_from(parts.len()).ok().filter(|parts| *parts > 0) else { return Ok(()) };
        let last = FIRST + last;
        let batch =
            |message| NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, SUBSYSTEM), message);
        let mut bytes = Vec::new();
        emit(&mut bytes, FIRST, 0, batch(ControlMessage::BatchBegin));
        let mut about: Vec<(String, About<'_>)> = Vec::with_capacity(parts.len());
        for (sequence, (change, part)) in (FIRST + 1..).zip(parts) {
            // Only the last asks for an answer: it comes if all went well, and after the refusals if not.
            let acknowledge = if sequence == last { NLM_F_ACK } else { 0 };
            emit(&mut bytes, sequence, part.flags | acknowledge, part.message);
            about.push((change, part.about));
        }
        emit(&mut bytes, last + 1, 0, batch(ControlMessage::BatchEnd));
        self.send(&bytes)?;
        self.verdict(last, |sequence| {
            let index = usize::try_from(sequence.checked_sub(FIRST + 1)?).ok()?;
            let (change, part) = about.get(index)?;
            Some((change.clone(), part.to_string()))
        })
    }

    /// The tables there are.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn tables(&mut self) -> Result<Vec<(Family, String)>, Error> {
        let mut bytes = Vec::new();
        emit(&mut bytes, FIRST, NLM_F_DUMP, encode::list());
        self.send(&bytes)?;
        let mut tables = Vec::new();
        loop {
            let datagram = self.receive()?;
            for message in messages(&datagram)? {
                match message.kind {
                    libc::NLMSG_DONE => return Ok(tables),
                    libc::NLMSG_ERROR => {
                        let (code, _) = message.error()?;
                        if code != 0 {
                            return Err(refusal(code, "list the tables"));
                        }
                    }
                    _ => tables.extend(table_of(message.all)?),
                }
            }
        }
    }

    /// Asks for one thing, or for all (`dump`); `kind` is one of NFT_MSG_GET*. What is not there is no answer.
    pub(super) fn ask(&mut self, kind: u16, dump: bool, family: u8, attributes: &[u8]) -> Result<Dumped, Error> {
        /// NLM_F_DUMP_INTR of linux/netlink.h: something changed meanwhile.
        const INTERRUPTED: u16 = 0x10;
        let flags = NLM_F_REQUEST | if dump { NLM_F_DUMP } else { 0 };
        let length = HEADER + 4 + attributes.len();
        let mut bytes = Vec::with_capacity(length);
        bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        bytes.extend((SUBSYSTEM << 8 | kind).to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(FIRST.to_ne_bytes());
        // The sender's port, which the kernel fills in; then struct nfgenmsg.
        bytes.extend([0, 0, 0, 0, family, 0, 0, 0]);
        bytes.extend(attributes);
        self.send(&bytes)?;
        let (mut told, mut changed) = (Vec::new(), false);
        loop {
            let datagram = self.receive()?;
            for message in messages(&datagram)? {
                changed |= message.flags & INTERRUPTED != 0;
                let ended = match message.kind {
                    libc::NLMSG_DONE => u32_at(message.all, HEADER).map_or(0, |code| -code.cast_signed()),
                    libc::NLMSG_ERROR => message.error()?.0,
                    _ => {
                        told.push(message.all.to_vec());
                        if dump {
                            continue;
                        }
                        0
                    }
                };
                return match ended {
                    0 if changed => Ok(Dumped::Changed),
                    0 => Ok(Dumped::Whole(told)),
                    // Not there, or no more; and the kernel may ask to ask again.
                    libc::ENOENT | libc::EINTR | libc::EAGAIN => Ok(Dumped::Changed),
                    code => Err(refusal(code, "read a table")),
                };
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Error> {
        let fail = |source: io::Error| {
            let hint = match source.raw_os_error() {
                Some(libc::EMSGSIZE) => ": raise the sysctl net.core.wmem_max",
                _ => "",
            };
            Error::Socket { context: "send", source, hint }
        };
        let sent = self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0).map_err(fail)?;
        if sent == bytes.len() { Ok(()) } else { Err(Error::Answer(format!("{sent} of {} bytes sent", bytes.len()))) }
    }

    /// One datagram. The kernel answers before `send` returns, so that nothing is waited for.
    fn receive(&self) -> Result<Vec<u8>, Error> {
        let fail = |source| Error::Socket { context: "receive", source, hint: "" };
        let mut buffer = Vec::with_capacity(1 << 16);
        self.socket.recv(&mut buffer, libc::MSG_DONTWAIT).map_err(fail)?;
        Ok(buffer)
    }

    /// Reads answers until the last part's, or the whole batch's refusal.
    fn verdict(&self, last: u32, about: impl Fn(u32) -> Option<(String, String)>) -> Result<(), Error> {
        let mut refused = None;
        loop {
            let datagram = match self.receive() {
                // Everything that was refused has been said; a last part that went well in a batch that did not need
                // not be mentioned.
                Err(Error::Socket { source, .. })
                    if source.kind() == io::ErrorKind::WouldBlock && refused.is_some() =>
                {
                    break;
                }
                other => other?,
            };
            let mut ended = false;
            for message in messages(&datagram)? {
                if message.kind != libc::NLMSG_ERROR {
                    continue;
                }
                let (code, words) = message.error()?;
                ended |= message.sequence == last || message.sequence == FIRST;
                if code != 0 && refused.is_none() {
                    refused = Some((message.sequence, code, words));
                }
            }
            if ended {
                break;
            }
        }
        let Some((sequence, code, words)) = refused else { return Ok(()) };
        let Some((change, part)) = about(sequence) else { return Err(refusal(code, "change tables")) };
        let source = io::Error::from_raw_os_error(code);
        let hint = match (words, code) {
            (Some(words), _) => format!(": {words}"),
            (None, libc::ENOENT) => ": a device, chain or set it names is not there, or the kernel lacks a part of \
                                     nf_tables (the module of this kind of rule)"
                .to_owned(),
            (None, libc::EOPNOTSUPP) => ": the kernel does not have this kind of chain or rule".to_owned(),
            _ => String::new(),
        };
        Err(Error::Refused { change, about: part, source, hint })
    }
}

fn refusal(code: i32, context: &'static str) -> Error {
    let hint = match code {
        libc::EPERM => ": CAP_NET_ADMIN is needed",
        _ => "",
    };
    Error::Socket { context, source: io::Error::from_raw_os_error(code), hint }
}

fn emit(bytes: &mut Vec<u8>, sequence: u32, flags: u16, message: NetfilterMessage) {
    let mut header = NetlinkHeader::default();
    header.sequence_number = sequence;
    header.flags = NLM_F_REQUEST | flags;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    // Counted once: it means going through the whole message.
    let (at, length) = (bytes.len(), message.header.length as usize);
    // Messages begin at multiples of four.
    bytes.resize(at + length.next_multiple_of(4), 0);
    message.serialize(&mut bytes[at..at + length]);
}

/// What the kernel told.
pub(super) enum Dumped {
    /// All of it, a message each with its headers.
    Whole(Vec<Vec<u8>>),
    /// It is not there, or something changed while it told.
    Changed,
}

/// The names of the tables that messages about changes are about.
pub(crate) fn tables_told(bytes: &[u8]) -> impl Iterator<Item = String> + '_ {
    // What is cut off at the end names nothing; in all messages the table's name is the first attribute.
    messages(bytes).unwrap_or_default().into_iter().filter_map(|message| {
        let name = message.all.get(HEADER + 4..)?;
        let (length, kind) = (usize::from(u16_at(name, 0)?), u16_at(name, 2)?);
        let name = name.get(4..length).filter(|_| kind == 1)?;
        Some(String::from_utf8_lossy(name).trim_end_matches('\0').to_owned())
    })
}

/// A message of the kernel.
struct Message<'a> {
    kind: i32,
    flags: u16,
    sequence: u32,
    all: &'a [u8],
}

const HEADER: usize = 16;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// The messages of a datagram.
fn messages(mut bytes: &[u8]) -> Result<Vec<Message<'_>>, Error> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let message = (|| {
            let len = usize::try_from(u32_at(bytes, 0)?).ok()?;
            let all = bytes.get(..len).filter(|all| all.len() >= HEADER)?;
            let (kind, flags) = (u16_at(bytes, 4)?.into(), u16_at(bytes, 6)?);
            Some(Message { kind, flags, sequence: u32_at(bytes, 8)?, all })
        })()
        .ok_or_else(|| Error::Answer("a message is cut off".to_owned()))?;
        let next = message.all.len().next_multiple_of(4).min(bytes.len());
        bytes = &bytes[next..];
        found.push(message);
    }
    Ok(found)
}

impl Message<'_> {
    /// The errno of an NLMSG_ERROR, 0 for none, and the kernel's words if it has some.
    fn error(&self) -> Result<(i32, Option<String>), Error> {
        /// NLMSGERR_ATTR_MSG of linux/netlink.h.
        const WORDS: u16 = 1;
        /// NLM_F_CAPPED and NLM_F_ACK_TLVS.
        const CAPPED: u16 = 0x100;
        const TLVS: u16 = 0x200;
        let cut_off = || Error::Answer("an error message is cut off".to_owned());
        let code = u32_at(self.all, HEADER).ok_or_else(cut_off)?.cast_signed();
        let mut words = None;
        if self.flags & TLVS != 0 {
            let original = usize::try_from(u32_at(self.all, HEADER + 4).ok_or_else(cut_off)?).unwrap_or(usize::MAX);
            let original = if self.flags & CAPPED != 0 { HEADER } else { original };
            let mut attributes = self.all.get((HEADER + 4).saturating_add(original)..).unwrap_or_default();
            while let (Some(len), Some(kind)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
                let len = usize::from(len).max(4);
                let value = attributes.get(4..len).unwrap_or_default();
                if kind == WORDS {
                    words = Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned());
                }
                attributes = attributes.get(len.next_multiple_of(4)..).unwrap_or_default();
            }
        }
        Ok((-code, words))
    }
}

/// The table a message of a list is about; `None` for one of a family we do not know.
fn table_of(bytes: &[u8]) -> Result<Option<(Family, String)>, Error> {
    let message = NetlinkMessage::<NetfilterMessage>::deserialize(bytes).map_err(|e| Error::Answer(e.to_string()))?;
    let NetlinkPayload::InnerMessage(message) = message.payload else { return Ok(None) };
    let Some(family) = encode::family(message.header.family) else { return Ok(None) };
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewTable(table)) = message.inner else { return Ok(None) };
    Ok(table.attributes.into_iter().find_map(|attribute| match attribute {
        TableAttribute::Name(name) => Some((family, name)),
        _ => None,
    }))
}
