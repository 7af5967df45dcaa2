//! blkback: Xen's block backend in user space.
//!
//! From the wire upwards: [`abi`] knows the bytes, [`request`] what they ask for, [`negotiate`] what both sides agree
//! on; [`image`] opens a disk, [`lock`] claims it, [`storage`] runs its I/O; [`health`] says whether it
//! still keeps its promises, [`doubt`] remembers that it did not, [`inflight`] what was not answered, and [`abort`] answers
//! that with errors when its process was killed, [`takeover`] has a migrating guest wait for its disk,
//! [`device_model`] knows who has the disk of an HVM guest before its own driver comes;
//! [`erase`] erases for good; [`grants`] gets at the guest's pages;
//! [`queue`] brings all of that together for one ring, [`worker`] gives it a thread, [`device`] a life. [`spec`] and
//! [`vdev`] read what administrators type, [`toolstack`] does what `xl` would, [`hotplug`]
//! is the program that `xl` runs for a disk, [`cli`] is the program.

#![forbid(unsafe_code)]

pub mod abi;
pub mod abort;
pub mod barrier;
pub mod below;
pub mod bounce;
pub mod cli;
pub mod counters;
pub mod device;
pub mod device_model;
pub mod doubt;
pub mod drive;
pub mod erase;
#[cfg(feature = "frontend")]
pub mod front;
pub mod grants;
pub mod health;
pub mod host_users;
pub mod hotplug;
pub mod image;
pub mod inflight;
pub mod lock;
pub mod lookout;
pub mod medium;
pub mod nbd;
pub mod negotiate;
pub mod neighbours;

pub mod opener;
pub mod queue;
pub mod request;
pub mod spec;
pub mod storage;
pub mod takeover;
pub mod toolstack;
pub mod vdev;
pub mod worker;

pub use ring::patience;
