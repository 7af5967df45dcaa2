//! The backend's half of a shared ring.

use crate::layout::Layout;
use crate::memory::{Field, RingMemory};
use crate::{Overflow, passes_event};

/// Takes requests out of a ring and puts responses into it.
///
/// All state is private: the shared page is only ever believed about the frontend's producer index, and that only
/// after a check. What the guest writes over our own indices or responses harms nobody but itself.
#[derive(Debug)]
pub struct BackRing<M> {
    memory: M,
    layout: Layout,
    /// The frontend's producer, as last read and checked.
    req_prod: u32,
    /// Requests taken so far.
    req_cons: u32,
    /// Responses written so far (rsp_prod_pvt).
    rsp_prod: u32,
    /// Responses the frontend can see.
    published: u32,
}

impl<M: RingMemory> BackRing<M> {
    /// The backend's half of a ring in which `start` requests have been taken and answered: 0 for a new one.
    ///
    /// # Panics
    /// When `memory` is too small for `layout` the first access to the end panics; the caller maps as many pages as
    /// the layout was made for.
    pub fn attach(memory: M, layout: Layout, start: u32) -> Self {
        Self { memory, layout, req_prod: start, req_cons: start, rsp_prod: start, published: start }
    }

    /// The backend's half of a ring whose backend died. The frontend can see as many responses as the ring says; of
    /// its requests `taken` were taken, which only a log of the dead one's can know.
    pub fn resume(memory: M, layout: Layout, taken: u32) -> Self {
        let published = memory.load(Field::RspProd);
        Self { memory, layout, req_prod: taken, req_cons: taken, rsp_prod: published, published }
    }

    /// The ring's shape.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Requests taken so far, as the ring counts: the number that the next one has.
    #[inline]
    pub fn taken(&self) -> u32 {
        self.req_cons
    }

    /// Responses written so far, as the ring counts: the number that the next one has.
    #[inline]
    pub fn answered(&self) -> u32 {
        self.rsp_prod
    }

    /// Requests taken and not answered yet.
    #[inline]
    pub fn outstanding(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod)
    }

    /// Looks how many requests wait to be taken.
    ///
    /// # Errors
    /// When the frontend's producer claims more requests than the ring has slots for (macro
    /// RING_REQUEST_PROD_OVERFLOW). A producer that moved backwards looks like that too. The ring is dead then.
    #[inline]
    pub fn pending(&mut self) -> Result<u32, Overflow> {
        let req_prod = self.memory.load(Field::ReqProd);
        let size = self.layout.entries();
        // Every slot up to rsp_prod has been answered; a request may stand in at most `size` slots after it. And
        // what has been taken cannot be taken back.
        if req_prod.wrapping_sub(self.rsp_prod) > size || req_prod.wrapping_sub(self.req_cons) > size {
            return Err(Overflow { name: "req_prod", index: req_prod, base: self.rsp_prod, size });
        }
        self.req_prod = req_prod;
        Ok(req_prod.wrapping_sub(self.req_cons))
    }

    /// Takes the next request: copies it out of its slot, once. False when none is left of those that
    /// [`pending`](Self::pending) counted.
    ///
    /// # Panics
    /// When `record` is longer than a slot.
    #[inline]
    pub fn consume(&mut self, record: &mut [u8]) -> bool {
        if self.req_cons == self.req_prod {
            return false;
        }
        assert!(record.len() <= self.layout.stride());
        self.memory.read_slot(self.layout.slot(self.req_cons), record);
        self.req_cons = self.req_cons.wrapping_add(1);
        true
    }

    /// Writes the next response into its slot; the frontend sees it after [`publish`](Self::publish).
    ///
    /// # Panics
    /// When there is no request left to answer: a request was answered twice, which is our own bug and must not
    /// reach the guest.
    #[inline]
    pub fn respond(&mut self, record: &[u8]) {
        assert!(self.rsp_prod != self.req_cons, "a response without a request");
        assert!(record.len() <= self.layout.stride());
        self.memory.write_slot(self.layout.slot(self.rsp_prod), record);
        self.rsp_prod = self.rsp_prod.wrapping_add(1);
    }

    /// Shows the responses written so far to the frontend. True when it asked to be woken for one of them: then, and
    /// only then, it is to be notified.
    #[inline]
    #[must_use = "the frontend may be waiting for a notification"]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.rsp_prod);
        if old == new {
            return false;
        }
        self.memory.store(Field::RspProd, new);
        self.published = new;
        // Against the frontend's rearm: it stores rsp_event and then loads rsp_prod.
        self.memory.fence();
        passes_event(old, new, self.memory.load(Field::RspEvent))
    }

    /// Asks to be woken at the next request, and looks once more: a request that came before the frontend could see
    /// the wish is found here, or nobody would ever speak of it.
    ///
    /// # Errors
    /// As [`pending`](Self::pending).
    #[inline]
    pub fn rearm(&mut self) -> Result<u32, Overflow> {
        self.memory.store(Field::ReqEvent, self.req_cons.wrapping_add(1));
        self.memory.fence();
        self.pending()
    }
}
