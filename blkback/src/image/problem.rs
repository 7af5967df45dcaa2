//! Why a file or device cannot be a disk, in words for whoever named it.

use std::io;
use std::path::{Path, PathBuf};

use crate::spec::Access;

/// Why a file or device cannot be a disk.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct ImageError {
    /// What was to be opened.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub problem: Problem,
}

impl ImageError {
    /// Whether somebody uses it.
    pub fn is_in_use(&self) -> bool {
        matches!(self.problem, Problem::InUse(_) | Problem::Locked(_))
    }

    /// Whether somebody has it, by a claim that ends with its use.
    pub fn is_locked(&self) -> bool {
        matches!(self.problem, Problem::Locked(_))
    }
}

/// What is wrong with a file or device.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// Not there.
    #[error("no such file or device; create an image with: truncate -s 10G FILE")]
    Missing,
    /// Not there, where devices are.
    #[error("no such device; activate its volume (lvchange -ay, rbd map, …), load its module, or correct the path")]
    NoDevice,
    /// Not readable, or not writable.
    #[error("permission denied to open it for {0}; check the owner and mode of the file and of the folders above it")]
    Permission(&'static str),
    /// A folder.
    #[error("is a directory; a disk is a file or a block device")]
    Directory,
    /// A socket, pipe or character device.
    #[error("is neither a regular file nor a block device")]
    NotADisk,
    /// No sectors.
    #[error("holds {0} bytes, less than one sector of 512; grow it with: truncate -s 10G FILE")]
    Empty(u64),
    /// A block device without sectors.
    #[error("is a device of {0} bytes; put a disk into the drive, or set the device up first")]
    NothingBehind(u64),
    /// A writable disk on storage that cannot be written.
    #[error("is on storage that is read-only; attach it with access r")]
    ReadOnlyStorage,
    /// Somebody else uses it.
    #[error("{0}")]
    InUse(String),
    /// Another guest, or program, has it for itself, by a lock or another claim that ends with its use.
    #[error("{0}")]
    Locked(String),
    /// Anything else.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The error.
        #[source]
        source: io::Error,
    },
}

/// What it means that open(2) failed.
pub(super) fn open_problem(error: io::Error, path: &Path, access: Access) -> Problem {
    match (error.kind(), error.raw_os_error()) {
        // A file made there would be gone at the next start, and a guest's data in memory with it.
        (io::ErrorKind::NotFound, _) if path.starts_with("/dev") => Problem::NoDevice,
        (io::ErrorKind::NotFound, _) => Problem::Missing,
        (io::ErrorKind::PermissionDenied, _) => {
            Problem::Permission(if access == Access::ReadOnly { "reading" } else { "writing" })
        }
        (io::ErrorKind::IsADirectory, _) => Problem::Directory,
        (io::ErrorKind::ReadOnlyFilesystem, _) => Problem::ReadOnlyStorage,
        (_, Some(libc::EBUSY)) => {
            Problem::Locked("is claimed by this machine or another guest, alone; detach it there first".to_owned())
        }
        _ => Problem::Io { what: "open", source: error },
    }
}

/// What it means that a server did not answer.
pub(super) fn remote_problem(source: io::Error) -> Problem {
    Problem::Io { what: "the NBD server cannot be reached", source }
}

/// Anything else, while this was being done.
pub(super) fn io_problem<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Problem {
    move |error| Problem::Io { what, source: error.into() }
}
