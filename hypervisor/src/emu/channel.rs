//! One end of an event channel in the hands of its domain.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::call::{Answer, Reply, Request};
use super::counters::{Event, Slot};
use super::link::unexpected;
use super::seat::Seat;
use super::wire::{Descriptors, Notified, Side, Wire};
use crate::{Error, EventChannel, Port, Result};

#[derive(Debug)]
pub(super) struct Channel {
    wire: Wire,
    side: Side,
    port: Port,
    slot: Slot,
    seat: Arc<Seat>,
}

impl Channel {
    pub(super) fn open(seat: Arc<Seat>, answer: &Answer) -> Result<Self> {
        let Reply::Channel { port, side: side @ (0 | 1), slot } = answer.reply else { return Err(unexpected(answer)) };
        let [page, first, second] = answer.fds.as_slice() else { return Err(unexpected(answer)) };
        let descriptors = Descriptors { page: page.clone(), events: [first.clone(), second.clone()] };
        match Wire::open(&descriptors) {
            Ok(wire) => Ok(Self { wire, side: Side::from(side), port: Port(port), slot, seat }),
            Err(error) => {
                seat.release(Request::Close { port });
                Err(Error::io("mapping an event channel", error))
            }
        }
    }
}

impl EventChannel for Channel {
    fn port(&self) -> Port {
        self.port
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.wire.fd(self.side)
    }

    fn take(&self) -> io::Result<bool> {
        self.wire.take(self.side)
    }

    fn unmask(&self) -> io::Result<()> {
        self.wire.unmask(self.side)
    }

    fn notify(&self) -> io::Result<()> {
        let event = match self.wire.notify(1 - self.side)? {
            Notified::Sent => Event::Sent,
            Notified::Suppressed => Event::Suppressed,
            Notified::Dropped => Event::Dropped,
        };
        self.seat.tally.add(self.slot, event, 1);
        Ok(())
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.seat.release(Request::Close { port: self.port.0 });
    }
}
