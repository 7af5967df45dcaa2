//! The NBD server by which an emulated guest offers its disk to real programs: fio, qemu-io, qemu-img, nbdcopy, nbdsh.
//!
//! Fixed newstyle handshake, simple replies, many requests in flight on many connections, answered in the order the
//! disk finishes them. It follows `doc/proto.md` of <https://github.com/NetworkBlockDevice/nbd> (commit 89ba7b53); the
//! documentation below names that file's sections as "proto.md, Section".
//!
//! Why not a crate: `nbd` 0.3 serves one request at a time over `Read + Write + Seek` and knows neither block sizes nor
//! WRITE_ZEROES; `nbd-async` is the client's side; `tokio-nbd` is GPL. An emulated guest's disk has a queue, and a server
//! that empties it one request at a time would measure itself.
//!
//! The way of a request:
//! 1. [`Server`] accepts; a thread of the connection's own does the handshake, then reads requests.
//! 2. A request is checked against the [`Geometry`] the client was told. A refused one is answered at once; the payload of
//!    a refused write is read and thrown away, so that the stream stays in step.
//! 3. Room is reserved ([`Limits`]: requests and payload bytes), and only then the payload is read and the [`Command`]
//!    handed to the [`Disk`] with a [`Completion`].
//! 4. The disk spends the completion, from any thread, in any order. It never waits for the client: replies are queued and
//!    a second thread of the connection sends them. Room is given back once the reply is on the wire, so a client that
//!    sends and never reads stops being read, and costs no more memory.
//!
//! ```no_run
//! use dom0_bench::nbd::{Config, Geometry, RamDisk, Server};
//! use std::sync::Arc;
//!
//! let disk = Arc::new(RamDisk::new(Geometry::writable(64 << 20))?);
//! let server = Server::listen("/run/guest.nbd", disk, Config::default())?;
//! println!("qemu-io -f raw -c 'write -P 7 0 64k' '{}'", server.uri());
//! server.stop();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod check;
mod connection;
mod disk;
mod handshake;
mod outbox;
mod ram;
mod server;

pub use blkback::nbd::protocol;

pub use disk::{Command, Completion, Disk, Geometry, GeometryError};
pub use outbox::Limits;
pub use ram::{Counts, RamDisk};
pub use server::{Config, Server, ServerError};
