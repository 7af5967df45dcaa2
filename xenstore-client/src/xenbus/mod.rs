//! Xenbus: how a backend, a frontend and the toolstack agree over the store on one device's life.
//!
//! Sources: `xen/include/public/io/xenbus.h` (the states), Linux `drivers/xen/xenbus` (what frontends expect), and
//! libxl's `libxl_device.c` (what the toolstack waits for, and for how long).

mod device;
pub mod driver;
mod fault;
mod frontend;
mod keys;
pub mod machine;
mod notifier;
mod slot;
mod state;
pub mod toolstack;

pub use device::{Device, DeviceId, Kind, Progress};
pub use driver::{Driver, StopHandle};
pub use fault::{Blame, Fault};
pub use keys::Keys;
pub use notifier::{Note, Notes, Notifier};
pub use state::State;
