//! What can go wrong between a plan and the network.

use std::io;
use std::path::PathBuf;

use crate::{link, nft};

/// Why a plan was not applied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the run directory.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// Somebody else is at work for too long.
    #[error("another program ({holder}) has been changing the network for {seconds} s; nothing was done")]
    Busy {
        /// Who holds the lock.
        holder: String,
        /// How long was waited, in seconds.
        seconds: u64,
    },
    /// The network cannot be read.
    #[error("cannot read the network's state: {0}")]
    Read(#[source] Box<Fault>),
    /// A step failed. Everything before it was taken back.
    #[error("step {} ({step}) failed: {source}; everything was put back as it was", index + 1)]
    Step {
        /// The step's place, from 0.
        index: usize,
        /// What it was to do.
        step: String,
        /// Why it failed.
        source: Box<Fault>,
    },
    /// A step failed, and some of those before it could not be taken back either.
    #[error("step {} ({step}) failed: {source}; putting everything back failed too: {}", index + 1, undo.join("; "))]
    Undo {
        /// The step's place, from 0.
        index: usize,
        /// What it was to do.
        step: String,
        /// Why it failed.
        source: Box<Fault>,
        /// What could not be taken back, and why.
        undo: Vec<String>,
    },
    /// What a killed run left could not be taken back.
    #[error(
        "{title:?} was interrupted, and could not be taken back whole: {}. Put it right by hand; what was tried is in {}",
        undo.join("; "), kept.display()
    )]
    Repair {
        /// What the run was for.
        title: String,
        /// What could not be taken back, and why.
        undo: Vec<String>,
        /// Where the journal is kept now.
        kept: PathBuf,
    },
    /// The journal is not one of ours.
    #[error("{}: not a journal of this program ({reason}). If nothing is half done, remove it", path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The journal belongs to another network namespace.
    #[error(
        "{}: {title:?} was interrupted in another network namespace ({theirs}, this one is {ours}). Run any of these programs \
         there, or give this namespace a run directory of its own with BRIDGE_SCRIPTS_RUN",
        path.display()
    )]
    OtherNamespace {
        /// The file.
        path: PathBuf,
        /// What the run was for.
        title: String,
        /// Its namespace.
        theirs: String,
        /// The namespace of this run.
        ours: String,
    },
    /// Something waits for its confirmation, and would be undone around what is asked now.
    #[error(
        "{title:?} has not been confirmed yet ({seconds} s are left): say `network-bridge confirm` first, or wait until it reverts"
    )]
    Unconfirmed {
        /// What it was.
        title: String,
        /// Seconds left.
        seconds: u64,
    },
    /// Nothing waits for a confirmation.
    #[error("nothing waits to be confirmed: it was confirmed before, or its time ran out and it was taken back")]
    NothingToConfirm,
    /// The process that would revert cannot be started.
    #[error("cannot start the process that reverts without confirmation, so nothing was done: {0}")]
    Waiter(#[source] io::Error),
}

impl Error {
    /// The kernel's error number behind a failed step.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Step { source, .. } | Self::Undo { source, .. } | Self::Read(source) => match &**source {
                Fault::Link(error) => error.errno(),
                _ => None,
            },
            _ => None,
        }
    }
}

/// Why one step failed.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The kernel's rtnetlink or a sysctl.
    #[error(transparent)]
    Link(#[from] link::Error),
    /// The kernel's nftables.
    #[error("nftables: {0}")]
    Nft(#[from] nft::Error),
    /// A record or a table's copy.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// A filter that cannot be made. A mistake in our programs.
    #[error(transparent)]
    Filter(#[from] crate::filter::Untranslatable),
    /// The kernel has taken a filter, and tells of another one.
    #[error(
        "{0} does not have the filter that the kernel has just taken: somebody else changes it too (tc filter show dev {0} ingress)"
    )]
    OtherFilter(String),
    /// A test asked for it.
    #[error("a test asked for this failure")]
    Test,
}
