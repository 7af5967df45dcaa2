//! What a backend's seat and a guest's seat have in common.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use super::board::Board;
use super::call::{Answer, DomainInfo, Join, Refusal, Reply, Request};
use super::channel::Channel;
use super::counters::{Counters, Tally};
use super::link::{Link, unexpected};
use super::machine::Machine;
use crate::{DomId, Error, EventChannel, Port, Result};

/// Where the machine is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    Here(&'a Machine),
    Dir(&'a Path),
}

/// A process's place at the machine. Mappings and channels hold on to it; the machine takes everything back when the
/// last of them is gone.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) domid: DomId,
    pub(super) board: Board,
    pub(super) tally: Tally,
    link: Link,
}

impl Seat {
    /// Takes a seat. The answer holds what else came with it.
    pub(super) fn take(place: Place<'_>, join: Join) -> Result<(Arc<Self>, Answer)> {
        let wanted = match &join {
            Join::Backend { domid } => DomId(*domid),
            Join::Guest { domid, .. } => DomId(domid.unwrap_or(0)),
        };
        let (link, answer) = match place {
            Place::Here(machine) => Link::local(machine, join),
            Place::Dir(dir) => Link::broker(dir, join),
        }
        .map_err(|refusal| refusal.into_error("join", wanted))?;
        let (Reply::Joined { domid }, [board, tally, ..]) = (&answer.reply, answer.fds.as_slice()) else {
            return Err(unexpected(&answer));
        };
        let failed = |error| Error::io("mapping the machine's board", error);
        let seat = Self {
            domid: DomId(*domid),
            board: Board::open(board).map_err(failed)?,
            tally: Tally::open(tally).map_err(failed)?,
            link,
        };
        Ok((Arc::new(seat), answer))
    }

    pub(super) fn call(&self, request: Request) -> Result<Answer, Refusal> {
        self.link.call(request)
    }

    /// For drops: says what could not be done, unless it is that the machine or our domain is gone, which took
    /// everything back already.
    pub(super) fn release(&self, request: Request) {
        if let Err(refusal) = self.call(request) {
            tracing::debug!(domid = %self.domid, ?refusal, "nothing left to give back");
        }
    }

    pub(super) fn store(&self) -> Result<xenstore_client::Client> {
        let answer = self.call(Request::Store).map_err(|refusal| refusal.into_error("store", self.domid))?;
        let [stream] = answer.fds.as_slice() else { return Err(unexpected(&answer)) };
        let failed = |error| Error::io("using the connection to xenstore", error);
        // The answer is ours alone, but says so only in words of Arc.
        let stream = UnixStream::from(stream.try_clone().map_err(failed)?);
        Ok(xenstore_client::Client::from_stream(stream)?)
    }

    pub(super) fn bind(self: &Arc<Self>, peer: DomId, remote: Port) -> Result<Box<dyn EventChannel>> {
        self.channel(Request::Bind { remote: peer.0, port: remote.0 }, "bind", peer)
    }

    pub(super) fn alloc_unbound(self: &Arc<Self>, peer: DomId) -> Result<Box<dyn EventChannel>> {
        self.channel(Request::AllocUnbound { remote: peer.0 }, "allocate", self.domid)
    }

    fn channel(
        self: &Arc<Self>,
        request: Request,
        operation: &'static str,
        domain: DomId,
    ) -> Result<Box<dyn EventChannel>> {
        let answer = self.call(request).map_err(|refusal| refusal.into_error(operation, domain))?;
        Ok(Box::new(Channel::open(Arc::clone(self), &answer)?))
    }

    pub(super) fn destroy(&self, domid: DomId) -> Result<()> {
        self.call(Request::Destroy { domid: domid.0 }).map(drop).map_err(|refusal| refusal.into_error("destroy", domid))
    }

    pub(super) fn domains(&self) -> Result<Vec<DomainInfo>> {
        let answer = self.call(Request::List).map_err(|refusal| refusal.into_error("list", self.domid))?;
        match answer.reply {
            Reply::Domains { all } => Ok(all),
            _ => Err(unexpected(&answer)),
        }
    }

    pub(super) fn counters(&self) -> Counters {
        self.tally.total()
    }
}
