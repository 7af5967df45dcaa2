//! Header, message types and whole packets.

use std::fmt;

/// Bytes of a header: four little-endian u32 (`struct xsd_sockmsg`).
pub const HEADER_LEN: usize = 16;
/// Most payload bytes a message may carry (`XENSTORE_PAYLOAD_MAX`).
pub const PAYLOAD_MAX: usize = 4096;

macro_rules! types {
    ($($name:ident $num:literal $text:literal $doc:literal;)*) => {
        /// What a message asks or answers (`enum xsd_sockmsg_type`). A reply carries the type of its request.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum MessageType {
            $(#[doc = $doc] $name,)*
            /// A number that is none of the above (20 was once used and removed).
            Unknown(u32),
        }

        impl MessageType {
            /// All known types in the order of their numbers.
            pub const ALL: &'static [MessageType] = &[$(Self::$name),*];

            /// The number on the wire.
            #[must_use]
            pub fn number(self) -> u32 {
                match self {
                    $(Self::$name => $num,)*
                    Self::Unknown(number) => number,
                }
            }

            /// Reads the number on the wire.
            #[must_use]
            pub fn from_number(number: u32) -> Self {
                match number {
                    $($num => Self::$name,)*
                    other => Self::Unknown(other),
                }
            }
        }

        impl fmt::Display for MessageType {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$name => f.write_str($text),)*
                    Self::Unknown(number) => write!(f, "type {number}"),
                }
            }
        }
    };
}

types! {
    Control 0 "control" "Privileged commands to the daemon.";
    Directory 1 "directory" "Names of a node's children.";
    Read 2 "read" "A node's value.";
    GetPerms 3 "get-perms" "A node's permissions.";
    Watch 4 "watch" "Sets a watch.";
    Unwatch 5 "unwatch" "Removes a watch.";
    TransactionStart 6 "transaction-start" "Opens a transaction; the reply is its number.";
    TransactionEnd 7 "transaction-end" "Commits (`T`) or drops (`F`) a transaction.";
    Introduce 8 "introduce" "Tells the store about a new domain.";
    Release 9 "release" "Tells the store that a domain is gone.";
    GetDomainPath 10 "get-domain-path" "The home of a domain.";
    Write 11 "write" "Sets a node's value, creating it and its parents. The value has no trailing NUL.";
    Mkdir 12 "mkdir" "Creates an empty node and its parents.";
    Rm 13 "rm" "Removes a node and all below it.";
    SetPerms 14 "set-perms" "Replaces a node's permissions.";
    WatchEvent 15 "watch-event" "Sent by the store: path and token of a watch that fired.";
    Error 16 "error" "Sent by the store in place of a reply: the name of an error.";
    IsDomainIntroduced 17 "is-domain-introduced" "Whether the store talks to a domain: `T` or `F`.";
    Resume 18 "resume" "A domain resumed after suspend.";
    SetTarget 19 "set-target" "Gives one domain the rights of another (device model stub domains).";
    ResetWatches 21 "reset-watches" "Drops all watches and transactions of the connection.";
    DirectoryPart 22 "directory-part" "A slice of a child list that does not fit one message.";
    GetFeature 23 "get-feature" "Features of the store.";
    SetFeature 24 "set-feature" "Features offered to a domain.";
    GetQuota 25 "get-quota" "Quotas of the store or of a domain.";
    SetQuota 26 "set-quota" "Sets a quota.";
}

/// The fixed part of every message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the message is.
    pub kind: MessageType,
    /// Chosen by the sender of a request, repeated in its reply; 0 in watch events.
    pub req_id: u32,
    /// The transaction the message belongs to; 0 for none.
    pub tx_id: u32,
    /// Payload bytes that follow. May exceed [`PAYLOAD_MAX`] if the sender is broken.
    pub len: u32,
}

impl Header {
    /// The sixteen bytes on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip([self.kind.number(), self.req_id, self.tx_id, self.len]) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Reads sixteen bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { kind: MessageType::from_number(word(0)), req_id: word(4), tx_id: word(8), len: word(12) }
    }
}

/// A whole message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// What the message is.
    pub kind: MessageType,
    /// See [`Header::req_id`].
    pub req_id: u32,
    /// See [`Header::tx_id`].
    pub tx_id: u32,
    /// At most [`PAYLOAD_MAX`] bytes.
    pub payload: Vec<u8>,
}

impl Packet {
    /// The bytes on the wire, or `None` if the payload is longer than [`PAYLOAD_MAX`].
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        if self.payload.len() > PAYLOAD_MAX {
            return None;
        }
        let len = u32::try_from(self.payload.len()).ok()?;
        let header = Header { kind: self.kind, req_id: self.req_id, tx_id: self.tx_id, len };
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.payload.len());
        bytes.extend_from_slice(&header.to_bytes());
        bytes.extend_from_slice(&self.payload);
        Some(bytes)
    }
}
