//! Where a receive ring stands whose backend died.
//!
//! The guest sees how many of its pages were used; those after that are used now, also if the dead process had filled
//! them. But an answer that was written, and not shown, stands where a page's grant was, and must not be taken for one:
//! the frame would be written to some other page of the guest's. Answers are found by what stands in their last two
//! bytes, which is how many bytes came, or an error, and never 0; a request has the upper half of its grant there,
//! which is 0 unless the guest has granted 65536 pages and more. Behind an answer that announces extras there may be those,
//! of which nothing can be told; they are announced in turn by each other.
//!
//! What was found is given back with an error. A guest's driver takes such a page back and offers it again, so that
//! nothing is lost but the frame, and a mistake costs nothing.

use super::{Rx, ring_broken};
use crate::abi::{Extra, RX_SLOT, RxRequest, RxResponse, rx_flag, status};
use crate::broken::Broken;

/// What the slots so far say of the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Nothing: it tells by itself.
    Any,
    /// It may be an extra. The id of its request would be this.
    Extra(u16),
    /// It is a request, and so are all others.
    Request,
}

impl Rx {
    /// Takes over the ring of a backend that died, attached at the responses that the guest can see. To be called before
    /// the first [`turn`](Self::turn), which shows what was answered here.
    ///
    /// # Errors
    /// When the guest broke the ring.
    pub fn resume(&mut self) -> Result<(), Broken> {
        self.ring.pending().map_err(ring_broken)?;
        let (mut slot, mut next) = ([0; RX_SLOT], Next::Any);
        while self.ring.consume(&mut slot) {
            let unused;
            (unused, next) = judge(&slot, next);
            match unused {
                Ok(request) => self.posted.push_back(request),
                Err(id) => {
                    let response = RxResponse { id, offset: 0, flags: 0, status: status::ERROR };
                    self.ring.respond(&response.encode());
                }
            }
        }
        self.came |= !self.posted.is_empty();
        Ok(())
    }
}

/// Whether a slot holds a request that can be used, or else the id of the one it held.
fn judge(slot: &[u8; RX_SLOT], next: Next) -> (Result<RxRequest, u16>, Next) {
    let (request, response) = (RxRequest::decode(slot), RxResponse::decode(slot));
    match next {
        Next::Any if response.status != 0 => {
            let extras = response.flags & rx_flag::EXTRA_INFO != 0;
            // Drivers number their requests as their slots.
            let next = if extras { Next::Extra(next_id(request.id)) } else { Next::Any };
            (Err(request.id), next)
        }
        Next::Extra(id) => {
            let more = slot[1] & Extra::MORE != 0;
            (Err(id), if more { Next::Extra(next_id(id)) } else { Next::Any })
        }
        Next::Any | Next::Request => (Ok(request), Next::Request),
    }
}

fn next_id(id: u16) -> u16 {
    id.wrapping_add(1) % crate::abi::RING_SLOTS as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypervisor::GrantRef;

    fn judged(slots: &[[u8; RX_SLOT]]) -> Vec<Result<u32, u16>> {
        let mut next = Next::Any;
        let judge = |slot| {
            let unused;
            (unused, next) = judge(slot, next);
            unused.map(|request| request.gref.0)
        };
        slots.iter().map(judge).collect()
    }

    fn request(id: u16, gref: u32) -> [u8; RX_SLOT] {
        RxRequest { id, gref: GrantRef(gref) }.encode()
    }

    fn answer(id: u16, flags: u16, status: i16) -> [u8; RX_SLOT] {
        RxResponse { id, offset: 0, flags, status }.encode()
    }

    #[test]
    fn answers_that_were_not_shown_are_told_from_requests() {
        use rx_flag::{EXTRA_INFO, GSO_PREFIX, MORE_DATA};
        let gso = |more| Extra::Gso { size: 1448, kind: crate::abi::GsoType::TcpV4 }.encode(more);
        let hash = Extra::Hash { kind: 0, algorithm: 1, value: 9 }.encode(false);
        assert_eq!(judged(&[request(3, 9), request(4, 65_535)]), [Ok(9), Ok(65_535)]);
        assert_eq!(
            judged(&[answer(3, 0, 60), answer(4, 0, -1), answer(5, MORE_DATA, 4096), answer(6, 0, 1), request(7, 8)]),
            [Err(3), Err(4), Err(5), Err(6), Ok(8)]
        );
        assert_eq!(judged(&[answer(1, GSO_PREFIX | MORE_DATA, 1), answer(2, 0, 99)]), [Err(1), Err(2)]);
        // An extra looks like a request for grant 1; whether the last one was written nobody knows.
        for last in [hash, request(1, 30)] {
            let slots = [answer(255, EXTRA_INFO | MORE_DATA, 4096), gso(true), last, answer(2, 0, 10), request(3, 31)];
            assert_eq!(judged(&slots), [Err(255), Err(0), Err(1), Err(2), Ok(31)]);
        }
        // Behind a request there are only requests, whatever their grants.
        assert_eq!(judged(&[request(3, 9), request(4, 1 << 20)]), [Ok(9), Ok(1 << 20)]);
    }
}
