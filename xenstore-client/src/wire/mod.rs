//! The protocol as bytes. Nothing here does I/O.
//!
//! Source: `xen/include/public/io/xs_wire.h` and `docs/misc/xenstore.txt` of the Xen project.

mod code;
mod decoder;
mod message;
mod path;
mod perm;

pub use code::ErrorCode;
pub use decoder::{Decoded, Decoder};
pub use message::{HEADER_LEN, Header, MessageType, PAYLOAD_MAX, Packet};
pub use path::{ABS_PATH_MAX, REL_PATH_MAX, check_path, check_watch_path};
pub use perm::{Access, Perm, parse_perms, perms_to_bytes};

#[cfg(test)]
mod tests;
