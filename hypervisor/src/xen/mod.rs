//! Real Xen, through the devices that Linux offers to its domains: /dev/xen/gntdev, gntalloc, evtchn and xenbus.
//!
//! A backend runs in dom0 or in a driver domain; both look the same from here. As a guest this side serves tests, in
//! which dom0 plays a frontend of its own.

#![allow(unsafe_code)]

mod evtchn;
mod gntalloc;
mod gntdev;
mod ioctl;

use std::fs::File;
use std::io;
use std::path::Path;

use xenstore_client::{Client, Store};

use crate::memory::Mapping;
use crate::{Backend, CopyOp, DomId, Error, EventChannel, GrantAccess, GrantRef, Guest, Port, Result, Shared};

/// Where xenstored listens, in the domain it runs in.
const SOCKETS: [&str; 2] = ["/run/xenstored/socket", "/var/run/xenstored/socket"];
/// The way to XenStore from every domain.
const XENBUS: &str = "/dev/xen/xenbus";

/// Whether this kernel runs on Xen and offers its devices.
pub fn is_here() -> bool {
    Path::new("/dev/xen").is_dir()
}

/// This domain, on real Xen.
#[derive(Debug)]
pub struct Xen {
    domid: DomId,
    gntdev: gntdev::GntDev,
}

impl Xen {
    /// Finds out which domain we are and opens what a backend needs.
    ///
    /// # Errors
    /// When a device is missing (the error names the module that brings it), may not be opened, or XenStore cannot be
    /// reached.
    pub fn open() -> Result<Self> {
        let domid = own_domid(&connect()?)?;
        Ok(Self { domid, gntdev: gntdev::GntDev::open()? })
    }
}

/// Our domain id, which the toolstack writes into every domain's home.
fn own_domid(store: &Client) -> Result<DomId> {
    let text = store.read_str("domid")?;
    text.parse().map_err(|_| Error::Invalid(format!("XenStore says that our domid is {text:?}")))
}

/// A connection to XenStore, speaking as this domain: over xenstored's socket where it runs here, else over the device.
///
/// # Errors
/// When neither is there or lets us in.
pub fn connect() -> Result<Client> {
    for socket in SOCKETS {
        if Path::new(socket).exists() {
            return Ok(Client::connect_unix(socket)?);
        }
    }
    // The device is opened once more here only for the sake of a helpful error.
    open_device(XENBUS, "xenfs (modprobe xenfs)")?;
    Ok(Client::open_device(XENBUS)?)
}

/// Opens one of Xen's devices; an error says what to do.
fn open_device(path: &str, module: &str) -> Result<File> {
    File::options().read(true).write(true).open(path).map_err(|source| {
        let advice = match source.kind() {
            io::ErrorKind::NotFound if !is_here() => "this machine does not run on Xen".to_owned(),
            io::ErrorKind::NotFound => format!("is the module loaded? {module}"),
            io::ErrorKind::PermissionDenied => "run this as root".to_owned(),
            _ => "is this domain allowed to?".to_owned(),
        };
        Error::io(format!("opening {path} ({advice})"), source)
    })
}

impl Backend for Xen {
    fn domid(&self) -> DomId {
        self.domid
    }

    fn store(&self) -> Result<Client> {
        connect()
    }

    fn map(&self, peer: DomId, refs: &[GrantRef], access: GrantAccess) -> Result<Mapping> {
        self.gntdev.map(peer, refs, access)
    }

    fn copy(&self, peer: DomId, local: &Mapping, ops: &mut [CopyOp]) -> Result<()> {
        self.gntdev.copy(peer, local, ops)
    }

    fn bind(&self, peer: DomId, remote: Port) -> Result<Box<dyn EventChannel>> {
        Ok(Box::new(evtchn::Channel::bind(peer, remote)?))
    }
}

/// This domain as a frontend's: for tests in which dom0 plays the guest.
#[derive(Debug)]
pub struct XenGuest {
    domid: DomId,
    gntalloc: gntalloc::GntAlloc,
}

impl XenGuest {
    /// Finds out which domain we are and opens what a frontend needs.
    ///
    /// # Errors
    /// As [`Xen::open`].
    pub fn open() -> Result<Self> {
        let domid = own_domid(&connect()?)?;
        Ok(Self { domid, gntalloc: gntalloc::GntAlloc::open()? })
    }
}

impl Guest for XenGuest {
    fn domid(&self) -> DomId {
        self.domid
    }

    fn store(&self) -> Result<Client> {
        connect()
    }

    fn share(&self, peer: DomId, pages: usize, access: GrantAccess) -> Result<Shared> {
        self.gntalloc.share(peer, pages, access)
    }

    fn unshare(&self, shared: Shared) -> std::result::Result<(), (Shared, Error)> {
        // The kernel takes grants back at once or, while the peer still maps them, later by itself; it does not say
        // which, so there is never a Busy to report.
        drop(shared);
        Ok(())
    }

    fn alloc_unbound(&self, peer: DomId) -> Result<Box<dyn EventChannel>> {
        Ok(Box::new(evtchn::Channel::alloc_unbound(peer)?))
    }
}
