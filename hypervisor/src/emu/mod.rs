//! A machine made of memfds and eventfds that enforces Xen's rules on any Linux.
//!
//! [`Machine`] is the machine: its domains, grant tables and event channels, and the XenStore that goes with it. It
//! lives in one process, and others join it through a broker (`emu-xen serve --dir DIR`). [`Member`] is a backend's
//! seat at it, [`GuestSeat`] a guest's.
//!
//! What changes the machine's state (map, unmap, bind, close, birth and death) is a call to the machine. What is done
//! for every request is not: a grant copy checks the peer's grant table and moves the bytes in the backend's own
//! process, and an event is a bit in shared memory, with an eventfd only for a peer that sleeps.
//!
//! From the bottom: `entry` (one grant and its rules), `table`, `wire` (the two ends of a channel), `board` and
//! `counters` (what all processes see); `state` with `maptrack` and `ports` (the machine); `call`, `link` and
//! `broker` (the way to it); `seat` with `peer` and `channel` (what a process holds); `member`, `guest`.

mod board;
mod broker;
mod call;
mod channel;
pub mod cli;
mod counters;
mod entry;
mod frames;
mod guest;
mod link;
mod machine;
mod maptrack;
mod member;
mod memfd;
mod peer;
mod peers;
mod ports;
mod seat;
mod state;
mod table;
mod wire;

pub use broker::Running;
pub use call::DomainInfo;
pub use counters::Counters;
pub use entry::{PERMIT_ACCESS, READING, READONLY, RawEntry, TYPE_MASK, WRITING};
pub use guest::{GuestOptions, GuestSeat};
pub use machine::Machine;
pub use member::Member;
pub use state::Limits;
