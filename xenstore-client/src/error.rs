//! What can go wrong between a caller and the store.

use std::io;

use crate::wire::{ErrorCode, MessageType};

/// Everything that can go wrong between a caller and the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store answered with an error message.
    #[error("xenstore {op} {path:?}: {code}")]
    Store {
        /// The operation that was refused.
        op: MessageType,
        /// The path it named (empty if the operation has none).
        path: String,
        /// The store's reason.
        code: ErrorCode,
    },
    /// The connection to the store is gone. It is never reopened in silence, because watches and transactions died
    /// with it: make a new [`Client`](crate::Client) and read everything again.
    #[error("the connection to xenstore is closed; connect again and re-read everything")]
    Disconnected,
    /// The socket or device could not be opened or written.
    #[error("xenstore {what}: {source}")]
    Io {
        /// What was being done, with the path if there is one.
        what: String,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The request cannot be put into a message: the path or the payload breaks a limit of `xs_wire.h`.
    #[error("xenstore {path:?}: {reason}")]
    Invalid {
        /// The offending path.
        path: String,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// The store's reply does not have the form the protocol promises.
    #[error("xenstore {op} {path:?}: malformed reply: {reason}")]
    Reply {
        /// The operation that was answered.
        op: MessageType,
        /// The path it named.
        path: String,
        /// What is wrong with the reply.
        reason: &'static str,
    },
    /// A transaction met a conflict each time it was tried.
    #[error(
        "xenstore transaction gave up after {attempts} conflicts (EAGAIN); something rewrites the same nodes without pause"
    )]
    Conflict {
        /// How often it was tried.
        attempts: u32,
    },
    /// There is no domain of that number or name.
    #[error("no domain {name:?}; there are: {known}")]
    NoDomain {
        /// What was asked for.
        name: String,
        /// The domains there are, as `0 (Domain-0), 1 (web)`.
        known: String,
    },
    /// Something did not happen in time.
    #[error("timed out after {seconds} s waiting for {what}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long, in seconds.
        seconds: u64,
    },
}

impl Error {
    /// The store's reason, if this is the store's refusal.
    #[must_use]
    pub fn code(&self) -> Option<&ErrorCode> {
        match self {
            Self::Store { code, .. } => Some(code),
            _ => None,
        }
    }

    /// Whether the store said that the node does not exist (ENOENT).
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(&ErrorCode::NotFound)
    }

    pub(crate) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { what: what.into(), source: source.into() }
    }
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
