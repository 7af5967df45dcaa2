//! dom0-bench: what one runs to see, use and measure the backends on any Linux machine.
//!
//! * [`tour`] serves a disk and a network to emulated guests, checks every byte, and says how fast it was;
//! * [`guest`] is an emulated guest whose disk real programs use through [`nbd`], and whose network is a namespace;
//! * [`disk`] measures a disk's throughput beside plain io_uring on the same file;
//! * [`net::measure`] measures guests' network beside the kernel's own;
//! * [`hotplug`] measures how long an interface takes to come, beside Xen's stock scripts.
//!
//! [`machine`] starts the processes all of them need: the emulated machine and the backends are this same program under
//! other names.

#![forbid(unsafe_code)]

pub mod cli;
pub mod disk;
pub mod guest;
pub mod guest_disk;
pub mod guest_vifs;
pub mod hotplug;
pub mod load;
pub mod machine;
pub mod nbd;
pub mod net;
pub mod placement;
pub mod raw;
pub mod table;
pub mod tour;
pub mod verify;

/// What the commands fail with: a sentence for whoever typed them.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;
