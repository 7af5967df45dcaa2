//! Keeps what a guest can cause at will from filling the log.

pub use xenstore_client::LogGate;
