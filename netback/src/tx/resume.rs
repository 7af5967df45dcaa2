//! Where a transmit ring stands whose backend died.
//!
//! What the guest can see of it, and so what the ring says by itself, is how many requests were answered. Those after
//! that are taken once more: a packet that had been sent, and whose answer was not shown, is sent twice, which a network
//! may do. But requests and responses share their slots: an answer that was written, and not shown, stands where the
//! request's grant was. Sending such a packet again would send some other page of the guest's. It is found by that: the
//! first four bytes of its first slot are the answer to it. It is shown as it is.
//!
//! A request whose grant happens to have the number of its id looks like that too, if its answer would be OKAY, and is
//! lost: a network may do that as well. What never happens is that a packet is sent that the guest did not send.

use std::time::Instant;

use super::{Tx, ring_broken};
use crate::abi::{Extra, TX_SLOT, TxRequest, TxResponse, status, tx_flag};
use crate::broken::{Broken, Fatal};

impl Tx {
    /// Takes over the ring of a backend that died, attached at the responses that the guest can see. To be called before
    /// the first [`turn`](Self::turn), which shows what was answered here.
    ///
    /// # Errors
    /// When the guest broke the ring.
    pub fn resume(&mut self) -> Result<(), Broken> {
        let mut left = self.ring.pending().map_err(ring_broken)?;
        while let Some(slot) = self.consume(&mut left) {
            let first = TxRequest::decode(&slot);
            match answered(&slot) {
                Some(status) => self.answer_again(&first, status, &mut left)?,
                None => {
                    // It is at hand: the next turn begins with it.
                    self.held = Some((first, Instant::now()));
                    break;
                }
            }
        }
        Ok(())
    }

    /// All slots of a packet whose first was answered with `status`. Its flags, and those of the slots after it, are
    /// where they were, because a response is shorter than a request.
    fn answer_again(&mut self, first: &TxRequest, status: i16, left: &mut u32) -> Result<(), Broken> {
        let respond = |ring: &mut ring::BackRing<_>, id, status| ring.respond(&TxResponse { id, status }.encode());
        respond(&mut self.ring, first.id, status);
        let mut more = first.flags & tx_flag::EXTRA_INFO != 0;
        while more {
            let slot = self.consume(left).ok_or(Fatal::Unfinished)?;
            respond(&mut self.ring, u16::from_le_bytes([slot[0], slot[1]]), status::NULL);
            more = slot[1] & Extra::MORE != 0;
        }
        more = first.flags & tx_flag::MORE_DATA != 0;
        while more {
            let slot = self.consume(left).ok_or(Fatal::Unfinished)?;
            let slot = TxRequest::decode(&slot);
            respond(&mut self.ring, slot.id, status);
            more = slot.flags & tx_flag::MORE_DATA != 0;
        }
        Ok(())
    }
}

/// The status in a slot that holds the answer to itself.
fn answered(slot: &[u8; TX_SLOT]) -> Option<i16> {
    let (request, response) = (TxRequest::decode(slot), TxResponse::decode(slot));
    let known = matches!(response.status, status::OKAY | status::ERROR | status::DROPPED);
    (known && response.id == request.id).then_some(response.status)
}
