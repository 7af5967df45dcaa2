//! XenStore for user-space backends.
//!
//! * [`wire`] – the protocol as bytes, with no I/O in it (`xen/include/public/io/xs_wire.h`).
//! * [`Client`], [`Watcher`], [`Transaction`] – one connection, many threads; [`Store`] is what they have in common.
//! * [`server`] – a complete store inside this process, for machines without xenstored.
//! * [`spec`] – what administrators type about devices, with mistakes shown where they stand.
//! * [`xenbus`] – who is attached in which state: a pure state machine, the driver that runs it for all devices of a
//!   kind, and the toolstack's side of the same contract.
#![forbid(unsafe_code)]

mod client;
mod domid;
mod error;
mod log_gate;
pub mod server;
pub mod spec;
mod store;
mod wake;
pub mod wire;
pub mod xenbus;

pub use client::{Client, Transaction, WatchEvent, Watcher, abandon_silent};
pub use domid::DomId;
pub use error::{Error, Result};
pub use log_gate::LogGate;
pub use store::Store;
pub use wire::{Access, ErrorCode, Perm};
