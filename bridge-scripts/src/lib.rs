//! Bridges, VLANs, routes, NAT and filters for Xen's virtual interfaces, by netlink and nftables.
//!
//! Every program here does the same three things: it reads the network's [`state`], makes a [`plan`] from it and from
//! what was asked (a pure function), and [`apply`]s that plan as a whole or not at all.

#![forbid(unsafe_code)]

pub mod antispoof;
pub mod apply;
pub mod cli;
pub mod filter;
pub mod link;
pub mod network;
pub mod nft;
pub mod plan;
mod ranges;
pub mod state;
pub mod step;
pub mod vif;
pub mod xend;
