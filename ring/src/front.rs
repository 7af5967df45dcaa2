//! The frontend's half of a shared ring.

use crate::layout::Layout;
use crate::memory::{Field, RingMemory};
use crate::{Overflow, passes_event};

/// Puts requests into a ring and takes responses out of it.
#[derive(Debug)]
pub struct FrontRing<M> {
    memory: M,
    layout: Layout,
    /// Requests written so far (req_prod_pvt).
    req_prod: u32,
    /// Requests the backend can see.
    published: u32,
    /// The backend's producer, as last read and checked.
    rsp_prod: u32,
    /// Responses taken so far.
    rsp_cons: u32,
}

impl<M: RingMemory> FrontRing<M> {
    /// A new ring in zeroed pages. It is the frontend that initialises one (macro SHARED_RING_INIT): no requests, no
    /// responses, and both sides to be woken by the first.
    pub fn init(memory: M, layout: Layout) -> Self {
        Self::init_at(memory, layout, 0)
    }

    /// As [`init`](Self::init), with all indices at `start`: for tests of what happens around 2^32.
    pub fn init_at(memory: M, layout: Layout, start: u32) -> Self {
        memory.store(Field::ReqProd, start);
        memory.store(Field::RspProd, start);
        memory.store(Field::ReqEvent, start.wrapping_add(1));
        memory.store(Field::RspEvent, start.wrapping_add(1));
        Self { memory, layout, req_prod: start, published: start, rsp_prod: start, rsp_cons: start }
    }

    /// The ring's shape.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Slots in which a request can be put now.
    #[inline]
    pub fn free(&self) -> u32 {
        self.layout.entries() - self.req_prod.wrapping_sub(self.rsp_cons)
    }

    /// Writes the next request into its slot; the backend sees it after [`publish`](Self::publish).
    ///
    /// # Panics
    /// When no slot is free.
    #[inline]
    pub fn request(&mut self, record: &[u8]) {
        assert!(self.free() > 0, "the ring is full");
        assert!(record.len() <= self.layout.stride());
        self.memory.write_slot(self.layout.slot(self.req_prod), record);
        self.req_prod = self.req_prod.wrapping_add(1);
    }

    /// Shows the requests written so far to the backend. True when it asked to be woken for one of them.
    #[inline]
    #[must_use = "the backend may be waiting for a notification"]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.req_prod);
        if old == new {
            return false;
        }
        self.memory.store(Field::ReqProd, new);
        self.published = new;
        // Against the backend's rearm: it stores req_event and then loads req_prod.
        self.memory.fence();
        passes_event(old, new, self.memory.load(Field::ReqEvent))
    }

    /// Looks how many responses wait to be taken.
    ///
    /// # Errors
    /// When the backend claims more responses than it was given requests.
    #[inline]
    pub fn pending(&mut self) -> Result<u32, Overflow> {
        let rsp_prod = self.memory.load(Field::RspProd);
        let asked = self.published.wrapping_sub(self.rsp_cons);
        let pending = rsp_prod.wrapping_sub(self.rsp_cons);
        if pending > asked {
            return Err(Overflow { name: "rsp_prod", index: rsp_prod, base: self.rsp_cons, size: asked });
        }
        self.rsp_prod = rsp_prod;
        Ok(pending)
    }

    /// Takes the next response. False when none is left of those that [`pending`](Self::pending) counted.
    #[inline]
    pub fn consume(&mut self, record: &mut [u8]) -> bool {
        if self.rsp_cons == self.rsp_prod {
            return false;
        }
        assert!(record.len() <= self.layout.stride());
        self.memory.read_slot(self.layout.slot(self.rsp_cons), record);
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        true
    }

    /// Asks to be woken at the next response, and looks once more.
    ///
    /// # Errors
    /// As [`pending`](Self::pending).
    #[inline]
    pub fn rearm(&mut self) -> Result<u32, Overflow> {
        self.memory.store(Field::RspEvent, self.rsp_cons.wrapping_add(1));
        self.memory.fence();
        self.pending()
    }
}
