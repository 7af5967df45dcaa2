//! dom0-bench: what one runs to see, use and measure the backends on any Linux machine.
//!
//! * [`tour`] serves a disk to an emulated guest, checks every byte, and says how fast it was;
//! * [`guest`] is an emulated guest whose disk real programs use through [`nbd`];
//! * [`disk`] measures a disk's throughput beside plain io_uring on the same file.
//!
//! [`machine`] starts the processes all three need: the emulated machine and blkback are this same program under other
//! names.

#![forbid(unsafe_code)]

pub mod cli;
pub mod disk;
pub mod guest;
pub mod guest_disk;
pub mod load;
pub mod machine;
pub mod nbd;
pub mod placement;
pub mod raw;
pub mod table;
pub mod tour;
pub mod verify;

/// What the commands fail with: a sentence for whoever typed them.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;
