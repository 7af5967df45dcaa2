//! Event channels (/dev/xen/evtchn), one open device for each: so each has a descriptor of its own to wait for.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use super::ioctl;
use super::open_device;
use crate::{DomId, Error, EventChannel, Port, Result};

/// One event channel. The kernel closes the port with the descriptor.
#[derive(Debug)]
pub(super) struct Channel {
    device: File,
    port: Port,
    /// Whether an event was taken and the port not yet written back.
    masked: AtomicBool,
}

impl Channel {
    /// The device, from now on good for ports to `peer` only: who takes over our process through one guest's bug
    /// cannot reach another's event channels with it.
    fn open(peer: DomId) -> Result<File> {
        let device = open_device("/dev/xen/evtchn", "modprobe xen-evtchn")?;
        // The kernel does not restrict to dom0, which has nothing to fear from itself.
        if peer != DomId::DOM0 {
            let mut domid = peer.0;
            // SAFETY: struct ioctl_evtchn_restrict_domid is one domid_t, 16 bits.
            unsafe { ioctl::call(&device, ioctl::RESTRICT_DOMID, &mut domid) }
                .map_err(|error| Error::io(format!("IOCTL_EVTCHN_RESTRICT_DOMID to domain {peer}"), error))?;
        }
        rustix::fs::fcntl_setfl(&device, rustix::fs::OFlags::NONBLOCK)
            .map_err(|error| Error::io("fcntl on /dev/xen/evtchn", error))?;
        Ok(device)
    }

    pub(super) fn bind(peer: DomId, remote: Port) -> Result<Self> {
        let device = Self::open(peer)?;
        let mut bind = [u32::from(peer.0), remote.0];
        // SAFETY: struct ioctl_evtchn_bind_interdomain is remote domain and remote port, 32 bits each.
        let port = unsafe { ioctl::call(&device, ioctl::BIND_INTERDOMAIN, &mut bind) };
        Self::with(device, port, "bind", peer, remote)
    }

    pub(super) fn alloc_unbound(peer: DomId) -> Result<Self> {
        let device = Self::open(peer)?;
        let mut remote = u32::from(peer.0);
        // SAFETY: struct ioctl_evtchn_bind_unbound_port is the remote domain, 32 bits.
        let port = unsafe { ioctl::call(&device, ioctl::BIND_UNBOUND_PORT, &mut remote) };
        Self::with(device, port, "allocation", peer, Port(0))
    }

    fn with(device: File, port: io::Result<i32>, operation: &'static str, domain: DomId, remote: Port) -> Result<Self> {
        match port {
            Ok(port) => Ok(Self { device, port: Port(port.unsigned_abs()), masked: AtomicBool::new(false) }),
            Err(error) => Err(Error::Port { operation, domain, port: remote, reason: error.to_string() }),
        }
    }
}

impl EventChannel for Channel {
    fn port(&self) -> Port {
        self.port
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    fn take(&self) -> io::Result<bool> {
        let mut port = [0; 4];
        match (&self.device).read(&mut port) {
            Ok(4) => {
                self.masked.store(true, Ordering::Relaxed);
                Ok(true)
            }
            Ok(_) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn unmask(&self) -> io::Result<()> {
        if self.masked.swap(false, Ordering::Relaxed) {
            (&self.device).write_all(&self.port.0.to_ne_bytes())?;
        }
        Ok(())
    }

    fn notify(&self) -> io::Result<()> {
        let mut port = self.port.0;
        // SAFETY: struct ioctl_evtchn_notify is the port, 32 bits.
        unsafe { ioctl::call(&self.device, ioctl::NOTIFY, &mut port) }.map(drop)
    }
}
