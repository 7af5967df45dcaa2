//! The emulated machine, seen from outside: what it refuses, what it survives, and how processes use it together.
#![allow(clippy::unwrap_used)]

mod broker;
mod copying;
mod death;
mod events;
mod granting;
mod mapping;
mod model;
mod processes;
mod rig;
mod store;
