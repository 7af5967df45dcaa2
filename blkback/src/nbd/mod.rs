//! Disks behind an NBD server: qemu-nbd, nbdkit, and whatever they front.
//!
//! * [`protocol`]: numbers and layouts.
//! * [`Export`]: which server and which of its exports.
//! * [`link`]: one connection, up to the point where requests can be sent.
//! * [`Client`]: a disk's connections, shared by its queues. A lost connection is made anew, and the guest waits.
//! * [`NbdStorage`]: the client as a queue's [`Storage`](crate::storage::Storage).
//!
//! It follows `doc/proto.md` of <https://github.com/NetworkBlockDevice/nbd>. What a server has answered but not flushed
//! is lost when it dies, and a flush asked of its successor would promise what is gone. So writes are kept until a flush
//! has covered them, and after a reconnect they are written again before anything else.

mod client;
mod export;
pub mod link;
pub mod protocol;
mod storage;

pub use client::Client;
pub use export::Export;
pub use storage::NbdStorage;
