//! The connection to a store, as callers see it.

mod connection;
mod queue;
mod silent;
mod transaction;
mod watcher;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use crate::wire::MessageType;
use crate::{DomId, Error, Result, Store};
use connection::{Connection, Link};

pub use queue::WatchEvent;
pub use silent::abandon_silent;
pub use transaction::Transaction;
pub use watcher::Watcher;

/// A connection to the store. Clones share it; every method may be called from every thread. Over a socket many requests
/// may be under way at once; over the kernel's device one at a time, the others wait for their turn. It closes when the last clone and the last [`Watcher`] are gone.
///
/// When the connection breaks, every pending and later call returns [`Error::Disconnected`] and every watcher's fd
/// becomes readable. Nothing is ever reconnected in silence.
#[derive(Debug, Clone)]
pub struct Client {
    connection: Arc<Connection>,
}

impl Client {
    /// Connects to a xenstored's socket, say `/run/xenstored/socket`. Such connections count as dom0's.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn connect_unix(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let stream = UnixStream::connect(path).map_err(|e| Error::io(format!("connect to {}", path.display()), e))?;
        Self::from_stream(stream)
    }

    /// Opens the kernel's device, `/dev/xen/xenbus`, which speaks for the domain this machine is.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn open_device(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|e| Error::io(format!("open {}", path.display()), e))?;
        Self::from_device(file)
    }

    /// Speaks over the kernel's device, which is open already for reading and writing.
    ///
    /// # Errors
    /// [`Error::Io`] if the reader thread or its eventfd cannot be made.
    pub fn from_device(file: std::fs::File) -> Result<Self> {
        Self::from_link(Link::Device(file))
    }

    /// Speaks over a stream that is already connected to a store.
    ///
    /// # Errors
    /// [`Error::Io`] if the reader thread or its eventfd cannot be made.
    pub fn from_stream(stream: UnixStream) -> Result<Self> {
        Self::from_link(Link::Socket(stream))
    }

    fn from_link(link: Link) -> Result<Self> {
        Ok(Self { connection: Arc::new(Connection::start(link)?) })
    }

    /// A new set of watches with a queue and an fd of its own.
    ///
    /// # Errors
    /// [`Error::Disconnected`], [`Error::Io`].
    pub fn watcher(&self) -> Result<Watcher> {
        Watcher::new(self.connection.clone())
    }

    /// Runs `body` in a transaction and commits it. If the store reports a conflict, all of it is done again, some
    /// sixty times at most; if `body` fails, the transaction is dropped and its error returned.
    ///
    /// A store takes no snapshot at the start: a node that was listed may be gone when it is read. That is a conflict,
    /// but only the end of the transaction says so. `body` should therefore take absence as an answer
    /// ([`Store::read_opt`]) where a listing made it expect presence.
    ///
    /// # Errors
    /// `body`'s own, [`Error::Conflict`], or the store's refusal.
    pub fn transaction<T>(&self, body: impl FnMut(&Transaction<'_>) -> Result<T>) -> Result<T> {
        transaction::run(&self.connection, body)
    }

    /// The home of a domain, usually `/local/domain/<id>`.
    ///
    /// # Errors
    /// The store's refusal.
    pub fn get_domain_path(&self, dom: DomId) -> Result<String> {
        self.about_domain(MessageType::GetDomainPath, dom, &[])
    }

    /// Whether the store talks to a domain.
    ///
    /// # Errors
    /// The store's refusal.
    pub fn is_domain_introduced(&self, dom: DomId) -> Result<bool> {
        Ok(self.about_domain(MessageType::IsDomainIntroduced, dom, &[])? == "T")
    }

    /// Tells the store about a new domain: the frame number of its ring page and its event channel (both ignored by the
    /// embedded store). Fires `@introduceDomain`.
    ///
    /// # Errors
    /// The store's refusal: only dom0 may.
    pub fn introduce(&self, dom: DomId, gfn: u64, port: u32) -> Result<()> {
        self.about_domain(MessageType::Introduce, dom, &[gfn, u64::from(port)]).map(drop)
    }

    /// Tells the store that a domain is gone. Fires `@releaseDomain`.
    ///
    /// # Errors
    /// The store's refusal: only dom0 may.
    pub fn release(&self, dom: DomId) -> Result<()> {
        self.about_domain(MessageType::Release, dom, &[]).map(drop)
    }

    /// Drops all watches and transactions of this connection, those of every [`Watcher`] included.
    ///
    /// # Errors
    /// The store's refusal.
    pub fn reset_watches(&self) -> Result<()> {
        self.request(MessageType::ResetWatches, "", &[b"\0"])?;
        self.connection.shared().forget_watches();
        Ok(())
    }

    fn about_domain(&self, kind: MessageType, dom: DomId, more: &[u64]) -> Result<String> {
        let mut payload = format!("{dom}\0");
        for number in more {
            payload.push_str(&format!("{number}\0"));
        }
        let reply = self.request(kind, &dom.home(), &[payload.as_bytes()])?;
        let text = String::from_utf8(reply).ok().and_then(|text| text.strip_suffix('\0').map(str::to_owned));
        text.ok_or_else(|| Error::Reply { op: kind, path: dom.home(), reason: "not a text ended by NUL" })
    }
}

impl Store for Client {
    fn request(&self, kind: MessageType, path: &str, payload: &[&[u8]]) -> Result<Vec<u8>> {
        self.connection.request(kind, 0, path, payload)
    }
}
