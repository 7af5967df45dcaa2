//! A tap in the place of the guest's network stack.

use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use hypervisor::PAGE_SIZE;
use hypervisor::memory::{IoList, Mapping};

use super::{Checksum, Error, Frame, Meta, Offered, Queue};
use crate::abi::{GsoType, MAX_PACKET};
use crate::packet::{self, HEADERS_MAX};
use crate::tap::{Features, Tap};
use crate::vnet::{Offload, Partial};

/// Frames each way in one turn.
const BUDGET: usize = 64;

/// What a turn did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Frames from the tap to the backend.
    pub sent: usize,
    /// Frames from the backend to the tap.
    pub received: usize,
}

/// Moves frames between one queue and one queue of a tap. Frames are read from the tap right into granted pages, and
/// written to it from there.
///
/// Lives on one thread, which makes it, because lists for the kernel hold their memory without atomics.
#[derive(Debug)]
pub struct TapGuest {
    queue: Queue,
    tap: Tap,
    tx_pool: Rc<Mapping>,
    rx_pool: Rc<Mapping>,
    /// The tap's header, outbound and inbound alike.
    header: Rc<Mapping>,
    list: IoList,
    frame: Frame,
    lost: u64,
}

/// What the tap of a guest may leave undone, given what the backend offers.
pub fn features(offered: &Offered) -> Features {
    // The kernel knows one switch for blank checksums, whatever carries them.
    let checksum = offered.csum_v6;
    let cut = checksum && offered.sg;
    Features { checksum, tso4: cut && offered.gso_v4, tso6: cut && offered.gso_v6 }
}

impl TapGuest {
    /// Joins a queue to a tap.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(queue: Queue, tap: Tap) -> io::Result<Self> {
        let window = |pool| Rc::new(Mapping::window(pool, 0, pool.len(), ()));
        Ok(Self {
            tx_pool: window(queue.tx.pool()),
            rx_pool: window(queue.rx.pool()),
            header: Rc::new(Mapping::anonymous(PAGE_SIZE)?),
            list: IoList::with_capacity(MAX_PACKET / PAGE_SIZE + 4),
            frame: Frame::default(),
            lost: 0,
            queue,
            tap,
        })
    }

    /// Moves some frames each way, and shows them to the backend.
    ///
    /// # Errors
    /// When the backend broke a ring, or the tap cannot be read.
    pub fn turn(&mut self) -> Result<Progress, Error> {
        let received = self.receive()?;
        self.queue.tx.reap()?;
        let sent = self.send()?;
        self.queue.publish()?;
        Ok(Progress { sent, received })
    }

    /// From the tap to the backend.
    fn send(&mut self) -> Result<usize, Error> {
        for sent in 0..BUDGET {
            let Some(room) = self.queue.tx.room(MAX_PACKET) else { return Ok(sent) };
            self.list.clear();
            self.list.push(&self.header, 0, Offload::SIZE);
            for offset in room.offsets() {
                self.list.push(&self.tx_pool, offset, PAGE_SIZE);
            }
            let read = match self.tap.read(&self.list) {
                Ok(read) => read,
                Err(error) => {
                    self.queue.tx.give_back(room);
                    return match error.kind() {
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(sent),
                        _ => Err(hypervisor::Error::io("reading the guest's tap", error).into()),
                    };
                }
            };
            let len = read.saturating_sub(Offload::SIZE);
            let mut header = [0; Offload::SIZE];
            self.header.copy_out(0, &mut header);
            match Offload::decode(&header) {
                Ok(offload) if (1..=MAX_PACKET).contains(&len) => self.queue.tx.send(room, len, &sent_as(&offload)),
                // Longer than Xen's 16 bits can say, or cut in a way that was not allowed.
                _ => {
                    self.lost += 1;
                    self.queue.tx.give_back(room);
                }
            }
        }
        Ok(BUDGET)
    }

    /// From the backend to the tap.
    fn receive(&mut self) -> Result<usize, Error> {
        for received in 0..BUDGET {
            if !self.queue.rx.receive(&mut self.frame)? {
                self.queue.rx.refill(usize::MAX);
                return Ok(received);
            }
            let written = match self.received_as() {
                Some(offload) => {
                    self.header.copy_in(0, &offload.encode());
                    self.list.clear();
                    self.list.push(&self.header, 0, Offload::SIZE);
                    for piece in self.frame.pieces() {
                        self.list.push(&self.rx_pool, piece.offset, piece.len);
                    }
                    // A tap that is down, or full, loses frames as any interface does.
                    self.tap.write(&self.list).is_ok()
                }
                None => false,
            };
            self.lost += u64::from(!written);
            self.queue.rx.recycle(&mut self.frame);
        }
        self.queue.rx.refill(usize::MAX);
        Ok(BUDGET)
    }

    /// The tap's header for a received frame; none when its checksum's place cannot be found.
    fn received_as(&self) -> Option<Offload> {
        let meta = self.frame.meta();
        let validated = meta.checksum == Checksum::Validated;
        if meta.checksum != Checksum::Blank {
            return meta.gso.is_none().then_some(Offload { validated, ..Offload::NONE });
        }
        let mut head = [0; HEADERS_MAX];
        let mut len = 0;
        for piece in self.frame.pieces() {
            let now = piece.len.min(head.len() - len);
            self.rx_pool.copy_out(piece.offset, &mut head[len..len + now]);
            len += now;
        }
        let layers = packet::parse(&head[..len]).ok()?;
        let headers = layers.headers_len(&head[..len]).ok()? as u16;
        let partial = Partial { start: layers.transport_at as u16, offset: layers.checksum_offset() as u16 };
        Some(Offload { partial: Some(partial), validated, gso: meta.gso, headers })
    }

    /// Sleeps until there is something to move, or `timeout` is over.
    ///
    /// # Errors
    /// When the backend broke a ring, or waiting fails.
    pub fn wait(&mut self, timeout: Duration) -> Result<(), Error> {
        // While the ring is full the tap's frames have to wait, and must not keep us awake.
        let room = self.queue.tx.free() as usize > MAX_PACKET / PAGE_SIZE + 1;
        self.queue.wait(room.then(|| self.tap.as_fd()), timeout)?;
        Ok(())
    }

    /// Whether the backend has something for us.
    ///
    /// # Errors
    /// When the backend broke a ring.
    pub fn has_work(&mut self) -> Result<bool, Error> {
        self.queue.has_work()
    }

    /// Frames that could not be moved.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// The queue, while it is driven.
    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Takes queue and tap apart again.
    pub fn into_parts(self) -> (Queue, Tap) {
        let Self { queue, tap, .. } = self;
        (queue, tap)
    }
}

fn sent_as(offload: &Offload) -> Meta {
    let checksum = match (offload.partial, offload.validated) {
        (Some(_), _) => Checksum::Blank,
        (None, true) => Checksum::Validated,
        (None, false) => Checksum::Unchecked,
    };
    let gso = offload.gso.filter(|&(kind, _)| kind != GsoType::None);
    Meta { checksum, gso, ..Meta::default() }
}
