//! netback: Xen's network backend in user space.
//!
//! From the wire upwards: [`abi`] knows the bytes of the rings, [`packet`] those of frames, [`vnet`] those of a tap's
//! header, [`negotiate`] what both sides agree on; [`tap`] is the network's end; [`credit`] is a guest's rate,
//! [`multicast`] the groups it joined, [`hash`] and [`ctrl`] what it says about hashing; [`tx`] is the way from the guest
//! to the tap, [`rx`] the way back, [`steer`] from one queue to another; [`queue`] brings both together, [`worker`] gives
//! them a thread, [`device`] a life. [`spec`] reads what administrators type, [`toolstack`] does what `xl` would,
//! [`preflight`] looks at the machine, [`cli`] is the program.

pub mod abi;
pub mod broken;
pub mod channels;
pub mod cli;
pub mod counters;
pub mod credit;
pub mod ctrl;
pub mod device;
#[cfg(feature = "frontend")]
pub mod front;
pub mod hash;
pub mod multicast;
pub mod negotiate;
pub mod packet;
pub mod preflight;
pub mod queue;
pub mod rx;
pub mod segment;
pub mod spec;
pub mod steer;
pub mod tap;
pub mod toolstack;
pub mod tx;
pub mod vnet;
pub mod worker;
