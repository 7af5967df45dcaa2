//! Why a device had to stop.

use std::fmt;

use crate::Error;

/// Whose doing a [`Fault`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The guest broke the protocol. Its log lines are rate-limited: a guest can produce them at will.
    Guest,
    /// Something on this machine: a disk image, a configuration, a full disk.
    Host,
}

/// Why a device had to stop: written to its error node, then the device goes to Closing.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fault {
    /// A positive errno, for tools that read the error node.
    pub errno: i32,
    /// For people: what happened and, if it is ours, what to do.
    pub text: String,
    /// Whose doing it is.
    pub blame: Blame,
}

impl Fault {
    /// The guest broke the protocol. `errno` is positive.
    pub fn guest(errno: i32, text: impl Into<String>) -> Self {
        Self { errno, text: text.into(), blame: Blame::Guest }
    }

    /// Something on this machine failed. `errno` is positive.
    pub fn host(errno: i32, text: impl Into<String>) -> Self {
        Self { errno, text: text.into(), blame: Blame::Host }
    }
}

impl fmt::Display for Fault {
    /// The form of the error node: `<errno> <text>` (Linux `xenbus_dev_error`).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.errno, self.text)
    }
}

impl std::error::Error for Fault {}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let errno = match &error {
            Error::Store { code, .. } => code.errno(),
            Error::Io { source, .. } => source.raw_os_error().unwrap_or(5),
            Error::Conflict { .. } => 11,
            Error::Timeout { .. } => 110,
            _ => 5,
        };
        Self::host(errno, error.to_string())
    }
}
