//! What administrators type, read with its place kept: the machinery under disk and interface specifications.
//!
//! A specification is a line of parameters between commas, as in `phy:/dev/vg/x,xvda,w` and `mac=…, bridge=xenbr0`. It
//! comes as words of a command line, or in the list of a domain's configuration. A mistake in it becomes a [`Fault`],
//! which knows the bytes it is about, and then a [`SpecError`], which shows them.

mod error;
mod list;
mod near;
mod param;
mod slot;
mod word;

pub use error::SpecError;
pub use list::{Quoted, strings};
pub use near::nearest;
pub use param::Param;
pub use slot::Slot;
pub use word::{BLANK, Fault, Word};
