//! Taps: network interfaces whose other end is a file descriptor (Linux Documentation/networking/tuntap.rst).
//!
//! A fence: the ioctls of /dev/net/tun, and the calls that let the kernel read from or write to mapped memory. Each
//! frame is read and written whole, with the [vnet header](crate::vnet) before it.

#![allow(unsafe_code, reason = "ioctl, readv and writev take addresses")]

mod ioctl;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use bridge_scripts::link::Link;
use hypervisor::memory::IoList;
use rustix::fs::{Mode, OFlags};

use crate::vnet::Offload;

/// Why a tap cannot be had, or not be changed.
#[derive(Debug, thiserror::Error)]
#[error("{what} of {name}: {source}{}", hint(source))]
pub struct TapError {
    /// The ioctl or call.
    pub what: &'static str,
    /// The interface or file.
    pub name: String,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => " (is the module there? modprobe tun)",
        Some(libc::EPERM | libc::EACCES) => {
            " (CAP_NET_ADMIN is needed: run as root, or in a user namespace of your own)"
        }
        Some(libc::EBUSY) => " (is there an interface of this name already, perhaps another backend's?)",
        Some(libc::EINVAL) => " (is there an interface of this name that is no tap with several queues?)",
        _ => "",
    }
}

/// Which offloads the reader of a tap copes with (TUN_F_*). What it does not, the kernel does before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    /// Checksums of which only the pseudo header is summed.
    pub checksum: bool,
    /// TCP over IPv4 that is still to be cut.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
}

/// One queue of a tap. The interface goes when its last queue is closed.
pub struct Tap {
    fd: OwnedFd,
    /// Whether this is a tap; tests put a pair of sockets in its place.
    real: bool,
}

impl fmt::Debug for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tap").field(&self.fd.as_raw_fd()).finish()
    }
}

impl Tap {
    /// Makes a tap, down, without carrier, and with the address fe:ff:ff:ff:ff:ff, which no bridge takes for its own
    /// because all others are lower. An interface that exists is refused.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn create(name: &str) -> Result<Self, TapError> {
        let tap = Self::attach(name, true)?;
        tap.set_carrier(false)?;
        ioctl::set_address(&tap.fd, name, [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff])
            .map_err(|source| error("SIOCSIFHWADDR", name, source))?;
        // A tap says 10 Mbit/s, from Linux 6.10 or so on 10 Gbit/s, and bridges make a port's cost of that. Linux' netback
        // says nothing, and its ports cost 100.
        ioctl::forget_speed(name).map_err(|source| error("SIOCETHTOOL", name, source))?;
        Ok(tap)
    }

    /// Another queue of a tap made by [`create`](Self::create).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach_queue(name: &str) -> Result<Self, TapError> {
        Self::attach(name, false)
    }

    fn attach(name: &str, new: bool) -> Result<Self, TapError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
            .map_err(|source| error("open", "/dev/net/tun", source.into()))?;
        ioctl::set_interface(&fd, name, new).map_err(|source| error("TUNSETIFF", name, source))?;
        ioctl::set_header_size(&fd, Offload::SIZE as i32).map_err(|source| error("TUNSETVNETHDRSZ", name, source))?;
        Ok(Self { fd, real: true })
    }

    /// Anything that keeps frames apart, for tests: one end of a pair of SOCK_SEQPACKET sockets. What only a tap can do
    /// is then left undone.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd, real: false })
    }

    /// Another handle of the same queue, which lives as long as one of them.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, real: self.real })
    }

    /// The interface's name now: whoever configures it may have renamed it. None where there is no tap.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn name(&self) -> Result<Option<String>, TapError> {
        if !self.real {
            return Ok(None);
        }
        ioctl::interface(&self.fd).map(Some).map_err(|source| error("TUNGETIFF", "a tap", source))
    }

    /// Tells the kernel what need not be done before frames are read. Holds for all queues.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_features(&self, features: Features) -> Result<(), TapError> {
        if !self.real {
            return Ok(());
        }
        ioctl::set_features(&self.fd, features).map_err(|source| self.error("TUNSETOFFLOAD", source))
    }

    /// Whether the interface has a carrier: without one its network sees that nobody is there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_carrier(&self, on: bool) -> Result<(), TapError> {
        if !self.real {
            return Ok(());
        }
        ioctl::set_carrier(&self.fd, on).map_err(|source| self.error("TUNSETCARRIER", source))
    }

    /// Lowers the interface's MTU to `most` bytes if it is larger, and says what it was then. The calling thread must be
    /// in the interface's network namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn limit_mtu(&self, most: u16) -> Result<Option<u32>, TapError> {
        let Some(name) = self.name()? else { return Ok(None) };
        let mtu = ioctl::mtu(&name).map_err(|source| error("SIOCGIFMTU", &name, source))?;
        if mtu <= u32::from(most) {
            return Ok(None);
        }
        ioctl::set_mtu(&name, most.into()).map_err(|source| error("SIOCSIFMTU", &name, source))?;
        Ok(Some(mtu))
    }

    /// Gives the interface the MTU `back` if it still has the one it was lowered to: nobody has chosen another meanwhile.
    /// The calling thread must be in the interface's network namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn give_mtu_back(&self, lowered: u16, back: u32) -> Result<(), TapError> {
        let Some(name) = self.name()? else { return Ok(()) };
        let mtu = ioctl::mtu(&name).map_err(|source| error("SIOCGIFMTU", &name, source))?;
        if mtu != u32::from(lowered) {
            return Ok(());
        }
        ioctl::set_mtu(&name, back).map_err(|source| error("SIOCSIFMTU", &name, source))
    }

    fn error(&self, what: &'static str, source: io::Error) -> TapError {
        let name = self.name().ok().flatten();
        error(what, name.as_deref().unwrap_or("a tap"), source)
    }

    /// Reads one frame, with its header, into `memory`. Does not wait. Returns its bytes, of which those that had no
    /// room are lost.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when there is none.
    ///
    /// # Panics
    /// When `memory` is not writable.
    #[inline]
    pub fn read(&self, memory: &IoList) -> io::Result<usize> {
        assert!(memory.is_writable(), "a frame read into a read-only mapping");
        let pieces = memory.for_kernel();
        // SAFETY: the pieces lie in mappings that `memory` keeps mapped during the call, and they are writable, as
        // just checked. The bytes belong to no Rust object.
        let done = unsafe { libc::readv(self.fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32) };
        outcome(done)
    }

    /// Writes one frame, with its header, from `memory`. Does not wait.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when there is no room; `EIO` when the interface is down; `EINVAL` when the header
    /// and the frame do not go together.
    #[inline]
    pub fn write(&self, memory: &IoList) -> io::Result<usize> {
        let pieces = memory.for_kernel();
        // SAFETY: the pieces lie in mappings that `memory` keeps mapped during the call; the kernel only reads them.
        let done = unsafe { libc::writev(self.fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32) };
        outcome(done)
    }
}

#[inline]
fn outcome(done: isize) -> io::Result<usize> {
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn error(what: &'static str, name: &str, source: io::Error) -> TapError {
    TapError { what, name: name.to_owned(), source }
}

/// Where taps come from.
pub trait Taps: fmt::Debug + Send + Sync {
    /// Queue `queue` of the tap `name`: number 0 makes the tap, later ones find it.
    ///
    /// # Errors
    /// When it cannot be had.
    fn open(&self, name: &str, queue: u32) -> Result<Tap, TapError>;
}

/// Taps of this kernel, in the network namespace of the calling thread.
#[derive(Debug, Clone, Copy, Default)]
pub struct KernelTaps;

impl Taps for KernelTaps {
    fn open(&self, name: &str, queue: u32) -> Result<Tap, TapError> {
        if queue > 0 {
            return Tap::attach_queue(name);
        }
        let tap = Tap::create(name)?;
        // Without it the tap works as well, only slower and with more memory.
        if let Err(error) = Link::open().and_then(|mut link| link.pass_unqueued(name)) {
            tracing::debug!(name, %error, "the kernel's queues before the tap stay");
        }
        Ok(tap)
    }
}

#[cfg(test)]
mod tests;
