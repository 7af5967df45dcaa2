//! The server: a Unix socket, its connections, and an orderly end of both.

use super::connection::Connection;
use super::disk::{Disk, GeometryError};
use super::handshake::Export;
use super::outbox::Limits;
use super::protocol::MAX_STRING;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fmt::Write as _;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What a server calls itself and how much it takes on.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the export, at most 4096 bytes. Clients that name none get it as well.
    pub name: String,
    /// For people, in lists of exports.
    pub description: String,
    /// Per connection.
    pub limits: Limits,
    /// Connections at a time; further ones are closed as they come.
    pub connections: usize,
    /// How long [`Server::stop`] waits for requests in flight before it cuts their connections.
    pub grace: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: String::new(),
            description: String::new(),
            limits: Limits::default(),
            connections: 64,
            grace: Duration::from_secs(5),
        }
    }
}

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The disk's shape cannot be told to a client.
    #[error("this disk cannot be served over NBD: {0}")]
    Geometry(#[from] GeometryError),
    /// Name or description is too long for the protocol.
    #[error("name and description of an NBD export have at most {MAX_STRING} bytes")]
    Name,
    /// Another server listens there.
    #[error("another server listens on {0}; stop it or choose another path")]
    InUse(PathBuf),
    /// The socket could not be made.
    #[error("cannot listen on {path}: {source}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// An NBD server for one disk. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    listening: Option<Listening>,
}

struct Shared {
    disk: Arc<dyn Disk>,
    config: Config,
    stopping: AtomicBool,
    registry: Mutex<Registry>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Registry {
    live: usize,
    connections: Vec<Registered>,
}

#[derive(Debug)]
struct Registered {
    // Weak, as a strong one would keep the socket open after the connection is done.
    connection: Weak<Connection>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct Listening {
    listener: Arc<UnixListener>,
    thread: JoinHandle<()>,
    path: PathBuf,
    /// Device and inode of the socket file: only our own file is removed in the end.
    file: Option<(u64, u64)>,
}

impl Server {
    /// Serves `disk` on a Unix socket at `path`, made with mode 0600. A socket file nobody listens on any more is replaced.
    pub fn listen(path: impl AsRef<Path>, disk: Arc<dyn Disk>, config: Config) -> Result<Self, ServerError> {
        let path = path.as_ref().to_owned();
        let mut server = Self::without_socket(disk, config)?;
        let listener = match listener(&path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if !is_abandoned(&path) {
                    return Err(ServerError::InUse(path));
                }
                std::fs::remove_file(&path).and_then(|()| listener(&path))
            }
            other => other,
        };
        let failed = |source| ServerError::Listen { path: path.clone(), source };
        let listener = Arc::new(listener.map_err(failed)?);
        let file = std::fs::metadata(&path).ok().map(|meta| (meta.dev(), meta.ino()));
        let (accepting, shared) = (Arc::clone(&listener), Arc::clone(&server.shared));
        let thread = thread::Builder::new()
            .name("nbd-accept".into())
            .spawn(move || accept(&accepting, &shared))
            .map_err(failed)?;
        tracing::info!(path = %path.display(), "NBD server listens");
        server.listening = Some(Listening { listener, thread, path, file });
        Ok(server)
    }

    /// A server that has no socket of its own and serves what it is given by [`Server::serve`].
    pub fn without_socket(disk: Arc<dyn Disk>, config: Config) -> Result<Self, ServerError> {
        disk.geometry().check()?;
        if config.name.len() > MAX_STRING || config.description.len() > MAX_STRING {
            return Err(ServerError::Name);
        }
        let shared = Shared {
            disk,
            config,
            stopping: AtomicBool::new(false),
            registry: Mutex::default(),
            ended: Condvar::new(),
        };
        Ok(Self { shared: Arc::new(shared), listening: None })
    }

    /// Serves a client on a stream that is already connected.
    pub fn serve(&self, stream: UnixStream) -> io::Result<()> {
        serve(&self.shared, stream)
    }

    /// Clients that are connected.
    pub fn connections(&self) -> usize {
        self.shared.registry().live
    }

    /// Where to reach the server, in the form fio, qemu and libnbd understand: `nbd+unix:///NAME?socket=PATH`. Without a
    /// socket of its own, the empty string.
    pub fn uri(&self) -> String {
        let Some(Listening { path, .. }) = &self.listening else { return String::new() };
        format!(
            "nbd+unix:///{}?socket={}",
            escape(self.shared.config.name.as_bytes()),
            escape(path.as_os_str().as_bytes())
        )
    }

    /// Ends the server: no new clients, no new requests (those already sent get ESHUTDOWN), answers to what is in flight
    /// within [`Config::grace`], then the connections are closed, the threads joined and the socket file removed
    /// (proto.md, Terminating the transmission phase).
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Some(Listening { listener, thread, path, file }) = self.listening.take() {
            // On Linux this wakes a thread that waits in accept(2), which then fails with EINVAL. Closing would not.
            if let Err(error) = rustix::net::shutdown(&*listener, rustix::net::Shutdown::Both) {
                tracing::error!(%error, "cannot wake the thread that accepts NBD clients");
            }
            let _ = thread.join();
            let ours = std::fs::metadata(&path).ok().map(|meta| (meta.dev(), meta.ino())) == file;
            if ours && let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove the NBD socket");
            }
        }
        self.each_connection(Connection::wind_down);
        let registry = self.shared.registry();
        let wait =
            self.shared.ended.wait_timeout_while(registry, self.shared.config.grace, |registry| registry.live > 0);
        let (mut registry, waited) = wait.unwrap_or_else(PoisonError::into_inner);
        let registered = std::mem::take(&mut registry.connections);
        drop(registry);
        if waited.timed_out() {
            tracing::warn!("NBD requests were not answered in time; their connections are cut");
            registered.iter().filter_map(|entry| entry.connection.upgrade()).for_each(|c| c.sever());
        }
        for entry in registered {
            let _ = entry.thread.join();
        }
    }

    fn each_connection(&self, act: impl Fn(&Connection)) {
        let registry = self.shared.registry();
        registry.connections.iter().filter_map(|entry| entry.connection.upgrade()).for_each(|c| act(&c));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("config", &self.config).field("registry", &self.registry).finish_non_exhaustive()
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    loop {
        match listener.accept() {
            Ok(_) if shared.stopping.load(Ordering::Acquire) => return,
            Ok((stream, _)) => {
                if let Err(error) = serve(shared, stream) {
                    tracing::warn!(%error, "NBD client turned away");
                }
            }
            Err(_) if shared.stopping.load(Ordering::Acquire) => return,
            Err(error) => {
                // Out of file descriptors, most likely; the client keeps waiting and so do we.
                tracing::warn!(%error, "cannot accept an NBD client");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn serve(shared: &Arc<Shared>, stream: UnixStream) -> io::Result<()> {
    let mut registry = shared.registry();
    registry.connections.retain(|entry| !entry.thread.is_finished());
    if registry.live >= shared.config.connections {
        return Err(io::Error::other(format!("{} NBD clients are connected, and no more allowed", registry.live)));
    }
    let connection = Arc::new(Connection::new(stream, shared.config.limits));
    let weak = Arc::downgrade(&connection);
    let its_shared = Arc::clone(shared);
    let thread = thread::Builder::new().name("nbd-requests".into()).spawn(move || {
        let _ended = Ended(&its_shared);
        let geometry = its_shared.disk.geometry();
        match geometry.check() {
            Ok(()) => {
                let Config { name, description, .. } = &its_shared.config;
                connection.run(&its_shared.disk, &Export { name, description, geometry });
            }
            Err(error) => tracing::error!(%error, "the disk changed into something NBD cannot tell"),
        }
        drop(connection);
    })?;
    registry.live += 1;
    registry.connections.push(Registered { connection: weak, thread });
    Ok(())
}

/// Counts a connection out, whichever way its thread ends.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        // `live` was raised under this lock, which `serve` held while it started the thread.
        self.0.registry().live -= 1;
        self.0.ended.notify_all();
    }
}

/// A listening socket whose file has mode 0600 from the first moment on: Linux gives a socket file the mode of its socket.
fn listener(path: &Path) -> io::Result<UnixListener> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 128)?;
    Ok(socket.into())
}

/// A socket file left behind by a server that is gone.
fn is_abandoned(path: &Path) -> bool {
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
        && UnixStream::connect(path).is_err_and(refused)
}

/// Percent-encoding of RFC 3986, except that slashes stay readable.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            text.push(byte.into());
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::{Geometry, RamDisk};
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn disk() -> Arc<dyn Disk> {
        Arc::new(RamDisk::new(Geometry::writable(1 << 20)).unwrap())
    }

    #[test]
    fn the_socket_file_comes_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a disk.sock");
        let server = Server::listen(&path, disk(), Config { name: "x v".into(), ..Config::default() }).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(server.uri().starts_with("nbd+unix:///x%20v?socket=/") && server.uri().ends_with("/a%20disk.sock"));
        assert!(matches!(Server::listen(&path, disk(), Config::default()), Err(ServerError::InUse(_))));
        server.stop();
        assert!(!path.exists());

        drop(UnixListener::bind(&path).unwrap());
        let server = Server::listen(&path, disk(), Config::default()).expect("an abandoned socket is replaced");
        std::fs::remove_file(&path).unwrap();
        let successor = Server::listen(&path, disk(), Config::default()).unwrap();
        drop(server);
        assert!(path.exists(), "the socket of another server stays");
        drop(successor);
        assert!(!path.exists());

        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(Server::listen(&path, disk(), Config::default()), Err(ServerError::InUse(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        let nowhere = dir.path().join("no/such/dir");
        assert!(matches!(Server::listen(nowhere, disk(), Config::default()), Err(ServerError::Listen { .. })));
    }

    #[test]
    fn what_cannot_be_served() {
        let long = Config { name: "x".repeat(MAX_STRING + 1), ..Config::default() };
        assert!(matches!(Server::without_socket(disk(), long), Err(ServerError::Name)));
    }
}
