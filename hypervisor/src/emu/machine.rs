//! The machine: its state under a lock, and the XenStore that goes with it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use xenstore_client::server::Server;
use xenstore_client::xenbus::toolstack;
use xenstore_client::{Client, DomId};

use super::call::{Answer, DomainInfo, Join, Refusal, Reply, Request};
use super::counters::Counters;
use super::guest::{GuestOptions, GuestSeat};
use super::memfd;
use super::state::{Limits, SeatId, State};
use crate::{Error, GrantAccess, Port, Result};

/// An emulated machine. Clones are handles of the same one; it ends with the last.
#[derive(Debug, Clone)]
pub struct Machine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    store: Server,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.store.shutdown();
    }
}

impl Machine {
    /// A machine inside this process, which nobody else can join.
    ///
    /// # Errors
    /// When the kernel gives no memory or descriptors.
    pub fn new(limits: Limits) -> Result<Self> {
        Self::with_store(limits, Server::new()?)
    }

    /// A machine whose XenStore listens for dom0's programs at `socket`.
    pub(super) fn listening(limits: Limits, socket: &Path) -> Result<Self> {
        Self::with_store(limits, Server::bind(socket)?)
    }

    fn with_store(limits: Limits, store: Server) -> Result<Self> {
        let state = State::new(limits).map_err(|error| Error::io("creating the machine", error))?;
        toolstack::create_domain(&store.connect(DomId::DOM0)?, DomId::DOM0, "Domain-0")?;
        Ok(Self { inner: Arc::new(Inner { state: Mutex::new(state), store }) })
    }

    /// Creates a guest. Its seat is in this process; dropping it destroys the domain.
    ///
    /// # Errors
    /// When the wanted id is taken, or the kernel has no memory.
    pub fn create_guest(&self, options: GuestOptions) -> Result<GuestSeat> {
        GuestSeat::local(self, options)
    }

    /// Destroys a domain, as `xl destroy` does. Pages of it that are mapped stay good memory until they are unmapped.
    ///
    /// # Errors
    /// When there is no such domain, or it is dom0.
    pub fn destroy(&self, domid: DomId) -> Result<()> {
        self.end_domain(domid).map_err(|refusal| refusal.into_error("destroy", domid))
    }

    /// All domains.
    pub fn domains(&self) -> Vec<DomainInfo> {
        self.state().list()
    }

    /// What was counted on the whole machine.
    pub fn counters(&self) -> Counters {
        self.state().tally.total()
    }

    /// A new connection to the machine's XenStore, speaking as `domid`.
    ///
    /// # Errors
    /// When the store is shut down.
    pub fn store(&self, domid: DomId) -> Result<Client> {
        Ok(self.inner.store.connect(domid)?)
    }

    /// Ends XenStore, and with it the connections of all domains.
    pub(super) fn end_store(&self) {
        self.inner.store.shutdown();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic under the lock is a bug; the state it leaves is still checked at every step.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives somebody a seat.
    pub(super) fn join(&self, join: Join) -> Result<(SeatId, Answer), Refusal> {
        let (seat, answer, created) = self.state().join(join)?;
        // The store is asked outside the lock: it answers from a thread of its own.
        if let (Some(name), Reply::Joined { domid }) = (created, &answer.reply)
            && let Err(error) = self.furnish(DomId(*domid), &name)
        {
            self.leave(seat);
            return Err(Refusal::invalid(format!("making the home of domain {domid} in xenstore: {error}")));
        }
        Ok((seat, answer))
    }

    fn furnish(&self, domid: DomId, name: &str) -> xenstore_client::Result<()> {
        toolstack::create_domain(&self.inner.store.connect(DomId::DOM0)?, domid, name)?;
        self.inner.store.introduce(domid)
    }

    /// Takes a seat away from a process that is gone.
    pub(super) fn leave(&self, seat: SeatId) {
        let died = self.state().leave(seat);
        if let Some(domid) = died {
            self.clear_out(domid);
        }
    }

    fn end_domain(&self, domid: DomId) -> Result<(), Refusal> {
        self.state().destroy(domid)?;
        self.clear_out(domid);
        Ok(())
    }

    /// What the toolstack does after a death, by force: the home goes, and what backends hold for the domain. They go
    /// first, so that who hears of the death by @releaseDomain finds them gone.
    fn clear_out(&self, domid: DomId) {
        let backends = self.state().backends();
        let store = &self.inner.store;
        let removed = store.connect(DomId::DOM0).and_then(|dom0| toolstack::destroy_domain(&dom0, domid, &backends));
        let released = store.release(domid);
        if let Err(error) = removed.and(released) {
            tracing::warn!(%domid, %error, "xenstore did not let go of a dead domain");
        }
        self.state().cleared(domid);
    }

    /// Carries out what a seat asks for.
    pub(super) fn call(&self, seat: SeatId, request: Request) -> Result<Answer, Refusal> {
        match request {
            Request::Join(_) => Err(Refusal::invalid("this connection has a seat already")),
            Request::Peer { domid } => self.state().peer(seat, DomId(domid)),
            Request::Map { peer, generation, refs, writable } => {
                let access = if writable { GrantAccess::ReadWrite } else { GrantAccess::ReadOnly };
                self.state().map(seat, DomId(peer), generation, refs, access)
            }
            Request::Unmap { handle } => self.state().unmap(seat, handle).map(|()| Reply::Done.into()),
            Request::AllocUnbound { remote } => self.state().alloc_unbound(seat, DomId(remote)),
            Request::Bind { remote, port } => self.state().bind(seat, DomId(remote), Port(port)),
            Request::Close { port } => self.state().close(seat, Port(port)).map(|()| Reply::Done.into()),
            Request::Store => {
                let domid = self.state().domain_of(seat)?;
                let stream = self.store_stream(domid).map_err(|error| Refusal::invalid(error.to_string()))?;
                Ok(Answer { reply: Reply::Done, fds: vec![Arc::new(stream)] })
            }
            Request::Destroy { domid } => {
                if self.state().domain_of(seat)? != DomId::DOM0 {
                    return Err(Refusal::invalid("only dom0 destroys domains"));
                }
                self.end_domain(DomId(domid)).map(|()| Reply::Done.into())
            }
            Request::List => {
                self.state().domain_of(seat)?;
                Ok(Reply::Domains { all: self.domains() }.into())
            }
            Request::Leave => {
                self.leave(seat);
                Ok(Reply::Done.into())
            }
        }
    }

    /// A stream at whose other end the store serves `domid`: the identity is given, never claimed.
    fn store_stream(&self, domid: DomId) -> Result<OwnedFd> {
        let failed = |error| Error::io("creating a connection to xenstore", error);
        let (theirs, ours) = UnixStream::pair().map_err(failed)?;
        let theirs = memfd::affordable(theirs.into()).map_err(failed)?;
        self.inner.store.attach(ours, domid)?;
        Ok(theirs)
    }
}
