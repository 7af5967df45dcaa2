//! Memory that travels as a file descriptor.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::EventfdFlags;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::Resource;

use crate::memory::Mapping;

/// Descriptors that are kept back for connections to come: nothing a member asks for may use them up.
const RESERVE: u64 = 64;

/// A memfd of `len` zero bytes that can neither shrink nor grow: whoever maps it can rely on every byte.
pub(super) fn sealed(name: &str, len: usize) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, len as u64)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    affordable(fd)
}

/// Memory that we write and others can only read: the seal keeps every later mapping read-only.
pub(super) fn published(name: &str, len: usize) -> io::Result<(OwnedFd, Mapping)> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, len as u64)?;
    let ours = Mapping::of_file(&fd, 0, len, true)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&fd, seals)?;
    Ok((fd, ours))
}

/// An eventfd at zero.
pub(super) fn eventfd() -> io::Result<OwnedFd> {
    affordable(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Gives a new descriptor back when it is among the last the process may have. The kernel hands out the lowest free
/// number, so its number says how many are in use.
pub(super) fn affordable(fd: OwnedFd) -> io::Result<OwnedFd> {
    let limit = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    match u64::try_from(fd.as_raw_fd()) {
        Ok(number) if number < limit.saturating_sub(RESERVE) => Ok(fd),
        _ => Err(rustix::io::Errno::MFILE.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_sealed() {
        let fd = sealed("test", 4096).unwrap();
        assert_eq!(rustix::fs::ftruncate(&fd, 0), Err(rustix::io::Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&fd, 8192), Err(rustix::io::Errno::PERM));
    }

    #[test]
    fn what_is_published_can_only_be_read_by_others() {
        let (fd, ours) = published("test", 4096).unwrap();
        assert!(Mapping::of_file(&fd, 0, 4096, true).is_err());
        let theirs = Mapping::of_file(&fd, 0, 4096, false).unwrap();
        ours.copy_in(0, b"seen");
        let mut seen = [0; 4];
        theirs.copy_out(0, &mut seen);
        assert_eq!(&seen, b"seen");
    }
}
