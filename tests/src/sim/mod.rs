//! blkback's queue over a simulated disk: the same code that serves guests, on a disk that loses, reorders and fails
//! whatever a disk may.
//!
//! A *history* is what one guest asks of one disk with one to three queues, and in which order everything happens:
//! requests, turns of the queues' threads, ends of the disk's operations. It is made of a seed, or of a path through
//! all choices there are. After each event the disk is looked at as it could be found if the power went now, and if
//! the process were killed now ([`checker`]). Rings, grants and event channels are the emulated machine's own.
//!
//! From the bottom: [`random`], [`stamp`] (a sector's content), [`disk`] (cache and medium), [`mod@bench`] (the disk as a
//! queue's storage), [`plant`] (bugs for the checker to find), [`plan`] (what a guest does), [`checker`], [`lane`] (one
//! queue), [`world`] (one history), [`explore`] (many). Beside them, [`served`] (a whole disk on a file that fails, [`fuse`])
//! and [`size`] (what can be wrong with its size).

pub mod bench;
pub mod checker;
pub mod disk;
pub mod explore;
pub mod fuse;
pub mod lane;
pub mod matrix;
pub mod plan;
pub mod plant;
pub mod random;
pub mod served;
pub mod size;
pub mod stamp;
pub mod world;
