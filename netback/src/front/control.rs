//! The guest's half of the control ring.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::memory::Mapping;
use hypervisor::{DomId, EventChannel, GrantAccess, GrantRef, Guest, Shared};
use ring::FrontRing;
use rustix::event::{PollFd, PollFlags};

use super::{Error, PATIENCE, broken, share_ring, unshare};
use crate::abi::{CtrlRequest, CtrlResponse, ctrl_type};
use crate::ctrl;

/// A control ring, and a page that the backend may read keys and tables from.
#[derive(Debug)]
pub struct ControlRing {
    ring: FrontRing<Arc<Mapping>>,
    ring_memory: Arc<Mapping>,
    ring_ref: GrantRef,
    channel: Box<dyn EventChannel>,
    page: Shared,
    next_id: u16,
}

impl ControlRing {
    pub(super) fn new(guest: &dyn Guest, backend: DomId) -> Result<Self, Error> {
        let (ring_memory, ring_ref) = share_ring(guest, backend)?;
        Ok(Self {
            ring: FrontRing::init(Arc::clone(&ring_memory), ctrl::layout()),
            ring_memory,
            ring_ref,
            channel: guest.alloc_unbound(backend)?,
            page: guest.share(backend, 1, GrantAccess::ReadOnly)?,
            next_id: 0,
        })
    }

    pub(super) fn keys(&self) -> [(String, String); 2] {
        [
            ("ctrl-ring-ref".into(), self.ring_ref.to_string()),
            ("event-channel-ctrl".into(), self.channel.port().to_string()),
        ]
    }

    /// Makes one request and waits for its answer.
    ///
    /// # Errors
    /// When the backend broke the ring, answers something else, or does not answer in time.
    pub fn ask(&mut self, kind: u16, data: [u32; 3]) -> Result<CtrlResponse, Error> {
        self.next_id = self.next_id.wrapping_add(1);
        let request = CtrlRequest { id: self.next_id, kind, data };
        self.raw_request(&request.encode());
        self.publish()?;
        let response = self.response(PATIENCE)?;
        if (response.id, response.kind) != (request.id, request.kind) {
            return Err(Error::Backend(format!("{response:?} does not answer {request:?}")));
        }
        Ok(response)
    }

    /// Sets the key; the answer's status says whether it was taken.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    ///
    /// # Panics
    /// When it is longer than a page.
    pub fn set_key(&mut self, key: &[u8]) -> Result<CtrlResponse, Error> {
        self.page.memory.copy_in(0, key);
        self.ask(ctrl_type::SET_HASH_KEY, [self.page.refs[0].0, key.len() as u32, 0])
    }

    /// Sets entries of the table from `offset` on; the answer's status says whether they were taken.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    ///
    /// # Panics
    /// When they are more than fit into a page.
    pub fn set_mapping(&mut self, offset: u32, entries: &[u32]) -> Result<CtrlResponse, Error> {
        for (index, entry) in entries.iter().enumerate() {
            self.page.memory.write_record(4 * index, &entry.to_le_bytes());
        }
        self.ask(ctrl_type::SET_HASH_MAPPING, [self.page.refs[0].0, entries.len() as u32, offset])
    }

    /// Puts any bytes into the ring.
    ///
    /// # Panics
    /// When the ring is full.
    pub fn raw_request(&mut self, slot: &[u8]) {
        self.ring.request(slot);
    }

    /// Shows requests to the backend, and notifies it if it asked for that.
    ///
    /// # Errors
    /// When the event channel fails.
    pub fn publish(&mut self) -> Result<(), Error> {
        if self.ring.publish() {
            self.channel.notify().map_err(|error| hypervisor::Error::io("notify", error))?;
        }
        Ok(())
    }

    /// Takes the next answer; waits for it at most `patience`.
    ///
    /// # Errors
    /// When the backend broke the ring, or does not answer in time.
    pub fn response(&mut self, patience: Duration) -> Result<CtrlResponse, Error> {
        let began = Instant::now();
        let failed = |error| hypervisor::Error::io("event channel", error);
        let mut slot = [0; CtrlResponse::SIZE];
        loop {
            if self.ring.consume(&mut slot) {
                return Ok(CtrlResponse::decode(&slot));
            }
            if self.ring.pending().map_err(broken)? > 0 || self.ring.rearm().map_err(broken)? > 0 {
                continue;
            }
            let left = patience.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(Error::Backend("the backend does not answer on the control ring".to_owned()));
            }
            self.channel.unmask().map_err(failed)?;
            let mut fds = [PollFd::from_borrowed_fd(self.channel.fd(), PollFlags::IN)];
            match rustix::event::poll(&mut fds, rustix::event::Timespec::try_from(left).ok().as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(error.into()).into()),
            }
            self.channel.take().map_err(failed)?;
        }
    }

    /// The ring's page, for guests that misbehave.
    pub fn ring_memory(&self) -> &Mapping {
        &self.ring_memory
    }

    /// The event channel.
    pub fn channel(&self) -> &dyn EventChannel {
        &*self.channel
    }

    /// The page that keys and tables are passed in.
    pub fn page(&self) -> &Shared {
        &self.page
    }

    pub(super) fn release(self, guest: &dyn Guest) -> Result<(), Error> {
        let Self { ring, ring_memory, ring_ref, channel, page, .. } = self;
        drop((ring, channel));
        unshare(guest, ring_memory, vec![ring_ref])?;
        guest.unshare(page).map_err(|(_, error)| error.into())
    }
}
