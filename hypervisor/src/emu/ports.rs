//! Event channels as the machine keeps them: who may bind to what, and what a close leaves behind.

use std::collections::HashMap;

use super::board::DOMAINS;
use super::call::{Answer, Refusal, Reply};
use super::counters::Event;
use super::state::{SeatId, State};
use super::wire::{Descriptors, Side, Wire};
use crate::{DomId, Port};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ChannelId(u64);

/// One channel. It is made with both ends' descriptors when the first end is allocated, so that the first end's
/// handle stays good however often the second is bound, closed and bound again.
#[derive(Debug)]
struct Channel {
    wire: Wire,
    descriptors: Descriptors,
    ends: [End; 2],
}

/// An end that somebody holds, or that only `domid` may bind to.
#[derive(Debug)]
struct End {
    domid: DomId,
    port: Option<Port>,
}

/// All channels.
#[derive(Debug, Default)]
pub(super) struct Channels {
    all: HashMap<ChannelId, Channel>,
    next: u64,
}

impl State {
    /// Allocates a port that `remote` may bind to. Whether that domain exists is not asked, as on Xen: a driver domain
    /// may come later.
    pub(super) fn alloc_unbound(&mut self, seat: SeatId, remote: DomId) -> Result<Answer, Refusal> {
        let us = self.domain_of(seat)?;
        let refuse = |state: &mut Self, reason: &str| Err(state.refuse_port(us, remote, Port(0), reason));
        if remote.0 >= DOMAINS {
            return refuse(self, "no such domain id");
        }
        let Some(port) = self.free_port(us) else { return refuse(self, "all our ports are in use") };
        let created = Descriptors::create().and_then(|descriptors| {
            let wire = Wire::open(&descriptors)?;
            wire.open_end(0, false)?;
            Ok(Channel {
                wire,
                descriptors,
                ends: [End { domid: us, port: Some(port) }, End { domid: remote, port: None }],
            })
        });
        let channel = created.map_err(|error| Refusal::io("creating an event channel", &error))?;
        let id = ChannelId(self.channels.next);
        self.channels.next += 1;
        self.channels.all.insert(id, channel);
        Ok(self.give_port(seat, us, port, id, 0))
    }

    /// Binds a new port of ours to `port` of `remote`.
    pub(super) fn bind(&mut self, seat: SeatId, remote: DomId, port: Port) -> Result<Answer, Refusal> {
        let us = self.domain_of(seat)?;
        let refuse = |state: &mut Self, reason: &str| Err(state.refuse_port(us, remote, port, reason));
        let Some(domain) = self.live(remote) else { return refuse(self, "no such domain") };
        let Some(&(id, side)) = domain.ports.get(&port) else { return refuse(self, "no such port") };
        let ours: Side = 1 - side;
        let Some(channel) = self.channels.all.get(&id) else { return refuse(self, "no such port") };
        if channel.ends[ours].port.is_some() {
            return refuse(self, "it is bound already");
        }
        if channel.ends[ours].domid != us {
            let whose = channel.ends[ours].domid;
            return refuse(self, &format!("it was offered to domain {whose}, not to us"));
        }
        let Some(local) = self.free_port(us) else { return refuse(self, "all our ports are in use") };
        if let Some(channel) = self.channels.all.get_mut(&id) {
            channel.wire.open_end(ours, true).map_err(|error| Refusal::io("opening an event channel", &error))?;
            channel.ends[ours].port = Some(local);
        }
        let slot = self.slots.of(&self.tally, us, remote);
        self.tally.add(slot, Event::Bind, 1);
        Ok(self.give_port(seat, us, local, id, ours))
    }

    /// Closes a port that the seat holds.
    pub(super) fn close(&mut self, seat: SeatId, port: Port) -> Result<(), Refusal> {
        let ours = self.seats.get_mut(&seat).ok_or_else(|| Refusal::invalid("our domain was destroyed"))?;
        let us = ours.domid;
        if !ours.ports.remove(&port) {
            return Err(Refusal::port(port, "not a port of this seat"));
        }
        self.close_port(us, port);
        Ok(())
    }

    /// The peer's port goes back to unbound, reserved for us; a channel that nobody holds is gone.
    pub(super) fn close_port(&mut self, us: DomId, port: Port) {
        let Some((id, side)) = self.domains.get_mut(&us).and_then(|domain| domain.ports.remove(&port)) else { return };
        let Some(channel) = self.channels.all.get_mut(&id) else { return };
        channel.wire.close_end(side);
        channel.ends[side].port = None;
        if channel.ends.iter().all(|end| end.port.is_none()) {
            self.channels.all.remove(&id);
        }
    }

    fn free_port(&self, us: DomId) -> Option<Port> {
        let taken = &self.domains.get(&us)?.ports;
        // Lowest first, as Xen does; port 0 is never used.
        (1..self.limits.ports).map(Port).find(|port| !taken.contains_key(port))
    }

    fn give_port(&mut self, seat: SeatId, us: DomId, port: Port, id: ChannelId, side: Side) -> Answer {
        if let Some(seat) = self.seats.get_mut(&seat) {
            seat.ports.insert(port);
        }
        if let Some(domain) = self.domains.get_mut(&us) {
            domain.ports.insert(port, (id, side));
        }
        let channel = self.channels.all.get(&id);
        let peer = channel.map_or(us, |channel| channel.ends[1 - side].domid);
        let slot = self.slots.of(&self.tally, us, peer);
        // One of two sides fits into anything.
        let reply = Reply::Channel { port: port.0, side: side as u8, slot };
        let fds = channel.map_or_else(Vec::new, |channel| {
            let Descriptors { page, events: [first, second] } = channel.descriptors.clone();
            vec![page, first, second]
        });
        Answer { reply, fds }
    }

    fn refuse_port(&mut self, us: DomId, remote: DomId, port: Port, reason: &str) -> Refusal {
        let slot = self.slot_if_known(us, remote);
        self.tally.add(slot, Event::RefusedPort, 1);
        Refusal::port(port, reason)
    }
}
