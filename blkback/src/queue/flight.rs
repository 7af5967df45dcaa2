//! A request under way, and the duty to answer it exactly once.

use hypervisor::CopyOp;
use hypervisor::memory::IoList;

use crate::abi::{Segment, Slot};
use crate::request;

/// The duty to answer one request. Spent by [`Queue::answer`](super::Queue), or knowingly by [`withhold`](Self::withhold).
#[derive(Debug)]
#[must_use]
pub(super) struct Due {
    /// The guest's number of the request.
    pub(super) id: u64,
    /// What the answer says was asked.
    pub(super) operation: u8,
    /// Where the log of requests in flight has it, if there is a log.
    pub(super) logged: Option<u32>,
    spent: bool,
}

impl Due {
    /// Of a request that was just taken.
    pub(super) fn new(slot: &Slot) -> Self {
        Self { id: slot.id(), operation: request::answered_operation(slot), logged: None, spent: false }
    }

    /// What the answer needs.
    pub(super) fn spend(mut self) -> (u64, u8) {
        self.spent = true;
        (self.id, self.operation)
    }

    /// Leaves the request without an answer for good: any answer would be a lie.
    pub(super) fn withhold(self) {
        let (id, operation) = self.spend();
        tracing::warn!(id, operation, "request withheld");
    }
}

impl Drop for Due {
    fn drop(&mut self) {
        if !self.spent && !std::thread::panicking() {
            tracing::error!(id = self.id, "a request was dropped without an answer: this is a bug");
            debug_assert!(false, "a request was dropped without an answer");
        }
    }
}

/// What is being done for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    Read,
    Write,
    Flush,
    FlushThenWrite,
    Discard,
    /// A secure discard: the storage erases, then the range is made to read as zeros, then both are made to last.
    Erase,
    EraseZeros,
    EraseEnd,
    /// A barrier, until everything before it is done; then its flush, its write, and the flush after it.
    Barrier,
    BarrierFlush,
    BarrierWrite,
    BarrierEnd,
}

/// A request between its consumption and its response.
#[derive(Debug, Default)]
pub(super) struct Flight {
    pub(super) due: Option<Due>,
    pub(super) doing: Option<Doing>,
    /// Where on the disk, and how much, in bytes.
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The data of a write that waits for its copy or its flush.
    pub(super) memory: IoList,
    /// Copies owed to the guest when a read is done.
    pub(super) copies: Vec<CopyOp>,
    /// Pages of ours that the data go through.
    pub(super) pages: Vec<u32>,
    /// Of a write whose data are copied: where they come from, to copy them once more if it has to wait.
    pub(super) segments: Vec<Segment>,
    /// Bytes of a write that waits which are written already.
    pub(super) written: u64,
    /// It has waited for room.
    pub(super) waited: bool,
}
