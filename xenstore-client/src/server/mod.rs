//! The embedded store: a complete XenStore inside this process, for machines without xenstored.
//!
//! It speaks the same wire protocol and keeps the rules of C xenstored (`tools/xenstored`): permissions, watches,
//! transactions, quotas of guests. Not offered, and answered with ENOSYS: CONTROL, RESUME, SET_TARGET, the feature and
//! quota messages. Not kept: the write rate limiter, and the memory quota (the quotas on nodes, node size, watches,
//! transactions and unread output bound the same).
//!
//! The logic (`store`, `nodes`, `tree`, `transaction`) knows no I/O; `io` is one thread that serves all connections.

mod io;
mod nodes;
mod quota;
mod store;
mod transaction;
mod tree;

#[cfg(test)]
mod tests;

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam::channel::{Sender, bounded, unbounded};

use crate::wake::Wake;
use crate::{Client, DomId, Error, Result};
use io::Command;

/// The embedded store. Clones are handles of the same store; it ends, and every connection with it, when the last
/// handle is dropped or [`Server::shutdown`] is called.
///
/// Which domain a connection speaks for is decided by who makes it: the socket is dom0's, as xenstored's is; every
/// other domain's stream is handed in by [`Server::attach`], or made by [`Server::connect`].
#[derive(Debug, Clone)]
pub struct Server {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    commands: Sender<Command>,
    wake: Arc<Wake>,
    thread: Mutex<Option<JoinHandle<()>>>,
    path: Option<PathBuf>,
}

impl Server {
    /// A store without a socket: only [`Server::connect`] and [`Server::attach`] lead to it.
    ///
    /// # Errors
    /// [`Error::Io`] if its thread or eventfd cannot be made.
    pub fn new() -> Result<Self> {
        Self::start(None, None)
    }

    /// A store that also listens on a Unix socket, for dom0. The socket is created with mode 0600 and removed at the
    /// end; one left behind by a dead process is replaced.
    ///
    /// # Errors
    /// [`Error::Io`] with the path; EADDRINUSE if another store is alive there.
    pub fn bind(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed = |e| Error::io(format!("listen on {}", path.display()), e);
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && is_stale(path) => {
                std::fs::remove_file(path).map_err(failed)?;
                UnixListener::bind(path)
            }
            other => other,
        };
        let listener = listener.map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Self::start(Some(listener), Some(path.to_owned()))
    }

    fn start(listener: Option<UnixListener>, path: Option<PathBuf>) -> Result<Self> {
        let (commands, receiver) = unbounded();
        let wake = Arc::new(Wake::new().map_err(|e| Error::io("eventfd", e))?);
        let for_thread = wake.clone();
        let thread = std::thread::Builder::new()
            .name("xenstore-server".into())
            .spawn(move || io::serve(listener, &receiver, &for_thread))
            .map_err(|e| Error::io("server thread", e))?;
        Ok(Self { inner: Arc::new(Inner { commands, wake, thread: Mutex::new(Some(thread)), path }) })
    }

    /// A connection of domain `dom`, inside this process.
    ///
    /// # Errors
    /// [`Error::Disconnected`] after a shutdown, [`Error::Io`].
    pub fn connect(&self, dom: DomId) -> Result<Client> {
        let (ours, theirs) = UnixStream::pair().map_err(|e| Error::io("socketpair", e))?;
        self.attach(ours, dom)?;
        Client::from_stream(theirs)
    }

    /// Serves `stream` on behalf of domain `dom`.
    ///
    /// # Errors
    /// As [`Server::connect`].
    pub fn attach(&self, stream: UnixStream, dom: DomId) -> Result<()> {
        stream.set_nonblocking(true).map_err(|e| Error::io("attach", e))?;
        self.command(|done| Command::Attach { stream, dom, done })
    }

    /// Makes a domain known and fires `@introduceDomain`. Doing it twice does nothing more.
    ///
    /// # Errors
    /// [`Error::Disconnected`] after a shutdown.
    pub fn introduce(&self, dom: DomId) -> Result<()> {
        self.command(|done| Command::Introduce { dom, done })
    }

    /// Forgets a domain: closes its connections, drops their watches and transactions, removes the nodes it owns and
    /// its permissions on others' nodes (so that a later domain of the same number inherits nothing), and fires
    /// `@releaseDomain`.
    ///
    /// # Errors
    /// [`Error::Disconnected`] after a shutdown, [`Error::Invalid`] for dom0.
    pub fn release(&self, dom: DomId) -> Result<()> {
        if dom == DomId::DOM0 {
            return Err(Error::Invalid { path: dom.home(), reason: "dom0 cannot be released" });
        }
        self.command(|done| Command::Release { dom, done })
    }

    /// Closes all connections and ends the server's thread. Waits for it.
    pub fn shutdown(&self) {
        self.inner.shutdown();
    }

    fn command(&self, make: impl FnOnce(Sender<()>) -> Command) -> Result<()> {
        let (done, wait) = bounded(1);
        self.inner.commands.send(make(done)).map_err(|_| Error::Disconnected)?;
        self.inner.wake.set();
        wait.recv().map_err(|_| Error::Disconnected)
    }
}

impl Inner {
    fn shutdown(&self) {
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        // An error means that the thread has ended by itself.
        if self.commands.send(Command::Shutdown).is_ok() {
            self.wake.set();
        }
        if thread.join().is_err() {
            tracing::error!("the embedded xenstore panicked");
        }
        if let Some(path) = &self.path
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!("cannot remove {}: {error}", path.display());
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// Whether nobody answers at a socket's path.
fn is_stale(path: &Path) -> bool {
    UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}
