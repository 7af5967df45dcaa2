//! dom0-bench

pub mod nbd;
