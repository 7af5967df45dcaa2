//! What both halves of a ring need from its pages.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use hypervisor::memory::Mapping;

use crate::layout;

/// One of the four indices that both sides see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// How many requests the frontend has made; it writes this.
    ReqProd,
    /// The backend asks to be woken when `ReqProd` passes this.
    ReqEvent,
    /// How many responses the backend has made; it writes this.
    RspProd,
    /// The frontend asks to be woken when `RspProd` passes this.
    RspEvent,
}

/// Shared pages with a ring in them. The halves are written against this, so that loom can stand in for the memory
/// (tests/loom.rs) and show what happens without the fence.
pub trait RingMemory {
    /// Loads an index with acquire ordering: what the peer wrote before it stored the index is visible afterwards.
    fn load(&self, field: Field) -> u32;

    /// Stores an index with release ordering.
    fn store(&self, field: Field, value: u32);

    /// A full barrier. Between a store of one's own index and the load of the other side's, nothing less will do:
    /// both sides may otherwise read the old value, and one of them sleeps for good.
    fn fence(&self);

    /// Copies a slot out, each byte loaded once.
    fn read_slot(&self, offset: usize, record: &mut [u8]);

    /// Copies a record into a slot.
    fn write_slot(&self, offset: usize, record: &[u8]);
}

impl RingMemory for Mapping {
    #[inline]
    fn load(&self, field: Field) -> u32 {
        self.atomic_u32(offset(field)).load(Ordering::Acquire)
    }

    #[inline]
    fn store(&self, field: Field, value: u32) {
        self.atomic_u32(offset(field)).store(value, Ordering::Release);
    }

    #[inline]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    #[inline]
    fn read_slot(&self, offset: usize, record: &mut [u8]) {
        self.read_once(offset, record);
    }

    #[inline]
    fn write_slot(&self, offset: usize, record: &[u8]) {
        self.write_record(offset, record);
    }
}

impl<M: RingMemory> RingMemory for &M {
    #[inline]
    fn load(&self, field: Field) -> u32 {
        (**self).load(field)
    }

    #[inline]
    fn store(&self, field: Field, value: u32) {
        (**self).store(field, value);
    }

    #[inline]
    fn fence(&self) {
        (**self).fence();
    }

    #[inline]
    fn read_slot(&self, offset: usize, record: &mut [u8]) {
        (**self).read_slot(offset, record);
    }

    #[inline]
    fn write_slot(&self, offset: usize, record: &[u8]) {
        (**self).write_slot(offset, record);
    }
}

impl<M: RingMemory> RingMemory for Arc<M> {
    #[inline]
    fn load(&self, field: Field) -> u32 {
        (**self).load(field)
    }

    #[inline]
    fn store(&self, field: Field, value: u32) {
        (**self).store(field, value);
    }

    #[inline]
    fn fence(&self) {
        (**self).fence();
    }

    #[inline]
    fn read_slot(&self, offset: usize, record: &mut [u8]) {
        (**self).read_slot(offset, record);
    }

    #[inline]
    fn write_slot(&self, offset: usize, record: &[u8]) {
        (**self).write_slot(offset, record);
    }
}

const fn offset(field: Field) -> usize {
    match field {
        Field::ReqProd => layout::REQ_PROD,
        Field::ReqEvent => layout::REQ_EVENT,
        Field::RspProd => layout::RSP_PROD,
        Field::RspEvent => layout::RSP_EVENT,
    }
}
