//! A queue is put together from the keys of a frontend, for rings that are new or that another process has left.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::memory::Mapping;
use hypervisor::{Backend, DomId, EventChannel, GrantAccess, Port};
use ring::{BackRing, Field, Layout, RingMemory as _};
use xenstore_client::xenbus::Fault;

use super::{Plan, Shared, fault, host};
use crate::abi::{RX_SLOT, TX_SLOT};
use crate::channels::Channels;
use crate::ctrl::{self, Control};
use crate::negotiate::Ports;
use crate::queue::{self, Queue};
use crate::rx::{self, Rx};
use crate::tx::{self, Tx};

/// How long the machine may take to notice that a process has died.
const LATE: Duration = Duration::from_secs(2);

pub(super) fn build(plan: Plan) -> Result<Queue, Fault> {
    let Plan { shared, keys, control, tap, post, counters, resume, .. } = plan;
    let Shared { xen, peer, receives, headroom, hash, multicast, live } = shared;
    let refused = |what: &str, error| Fault::guest(libc::EINVAL, format!("{what}: {error}"));
    let map = |what, gref| {
        xen.map(peer, &[gref], GrantAccess::ReadWrite)
            .map_err(|error| refused(&format!("mapping the {what} ring"), error))
    };
    let bind = |what, port| {
        let bound = if resume { bind_again(&*xen, peer, port) } else { xen.bind(peer, port) };
        bound.map_err(|error| refused(&format!("binding the event channel{what}"), error))
    };
    let memory = |error| host("memory for copies", error);
    let ring = |mapping: Mapping, slot| {
        // What the guest has seen of the ring so far is what it believes.
        let start = if resume { mapping.load(Field::RspProd) } else { 0 };
        BackRing::attach(mapping, Layout::new(slot, 1), start)
    };
    let tx_ring = ring(map("transmit", keys.tx)?, TX_SLOT);
    let rx_ring = ring(map("receive", keys.rx)?, RX_SLOT);
    let channels = match keys.ports {
        Ports::Shared(port) => Channels::Shared(bind("", port)?),
        Ports::Split { tx, rx } => Channels::Split { tx: bind(" (tx)", tx)?, rx: bind(" (rx)", rx)? },
    };
    let control = match control {
        None => None,
        Some((gref, port, queues)) => {
            let ring = map("control", gref)?;
            if resume && ring.load(Field::ReqProd) != 0 {
                // What it asked for was known to the process that died alone.
                let text = "the backend process that knew the guest's hashing has died; the device has to reconnect";
                return Err(Fault::host(libc::EPIPE, text));
            }
            let parts = ctrl::Parts {
                ring,
                channel: bind(" (ctrl)", port)?,
                xen: Arc::clone(&xen),
                peer,
                queues,
                hash: Arc::clone(&hash),
            };
            Some(Control::new(parts).map_err(memory)?)
        }
    };
    let tx = Tx::new(tx::Parts {
        ring: tx_ring,
        xen: Arc::clone(&xen),
        peer,
        live: Arc::clone(&live),
        multicast: Arc::clone(&multicast),
        counters: Arc::clone(&counters),
    });
    let rx = Rx::new(rx::Parts {
        ring: rx_ring,
        xen,
        peer,
        receives,
        headroom,
        hash,
        multicast,
        post,
        counters: Arc::clone(&counters),
    });
    let (mut tx, mut rx) = (tx.map_err(memory)?, rx.map_err(memory)?);
    if resume {
        tx.resume().and_then(|()| rx.resume()).map_err(|broken| fault(&broken))?;
    }
    Ok(Queue::new(queue::Parts { tx, rx, tap, channels, control, live, counters, resumed: resume }))
}

/// Binds a port whose last holder has died, though the machine may not have noticed yet.
fn bind_again(xen: &dyn Backend, peer: DomId, port: Port) -> hypervisor::Result<Box<dyn EventChannel>> {
    let began = Instant::now();
    loop {
        match xen.bind(peer, port) {
            Err(_) if began.elapsed() < LATE => std::thread::sleep(Duration::from_millis(5)),
            outcome => return outcome,
        }
    }
}
