//! Why a queue must stop.

use std::io;

use ring::Overflow;

use crate::abi::BadExtra;

/// Why a queue, and with it its vif, must stop. What concerns one packet only is a [`Refusal`](crate::tx::Refusal).
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The guest broke a ring.
    #[error("the frontend broke the {ring} ring: {source}")]
    Ring {
        /// `transmit`, `receive`, `control`.
        ring: &'static str,
        /// The index.
        #[source]
        source: Overflow,
    },
    /// The guest sent what cannot be a packet.
    #[error("the frontend sent {0}")]
    Packet(#[from] Fatal),
    /// The machine under us failed.
    #[error("{what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// The hypervisor refused a whole batch.
    #[error("grant copy: {0}")]
    Copy(#[source] hypervisor::Error),
}

/// What no honest frontend does: the vif is closed, as Linux disables it (xenvif_fatal_tx_err).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fatal {
    /// A packet, or its extras, have more slots than were shown.
    #[error("a packet that goes on beyond the requests in the ring")]
    Unfinished,
    /// The 21st slot after the first.
    #[error("a packet of more than 20 slots after the first")]
    Slots,
    /// A slot reaches beyond its page.
    #[error("a slot of {size} bytes at {offset}, which ends beyond its page")]
    CrossesPage {
        /// Where it starts.
        offset: u16,
        /// Its bytes.
        size: u16,
    },
    /// An extra that means nothing.
    #[error(transparent)]
    Extra(#[from] BadExtra),
    /// A GSO packet with segments of no size, or that is not to be cut.
    #[error("GSO with segments of no size or of no kind")]
    Gso,
}
