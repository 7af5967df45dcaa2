//! An emulated guest's network card: netfront's other end is an interface in a namespace, so that what programs there
//! send and receive is the guest's traffic.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use hypervisor::Guest;
use netback::front::{Frontend, Options, Queue, TapGuest, features};
use netback::tap::{Features, Tap};

use super::link;
use super::netns::Namespace;
use crate::Failure;

/// Threads of cards have names that begin like this.
pub const THREADS: &str = "netfront";
/// Pages that one queue grants: two rings, and a page for each of their slots.
pub const QUEUE_PAGES: usize = 2 + 2 * 256;
/// How often a card's thread looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// A connected card.
#[derive(Debug)]
pub struct Card {
    front: Frontend,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<(Queue, Tap), Failure>>>,
    /// The queues asked for may be more.
    queues: usize,
    mtu: u32,
}

impl Card {
    /// Connects device `devid`, which the toolstack has attached, and makes it the interface `name` of a namespace: up,
    /// with the vif's MAC and MTU, with no IP address. A thread for each queue moves its frames.
    ///
    /// # Errors
    /// When the backend refuses, or the interface cannot be made.
    pub fn plug(
        guest: Arc<dyn Guest>,
        devid: u32,
        options: &Options,
        namespace: &Namespace,
        name: &str,
    ) -> Result<Self, Failure> {
        let mut front = Frontend::connect(guest, devid, options)?;
        let queues = front.take_queues();
        let (mac, mtu) = (front.mac()?, front.mtu()?);
        let sends = sends(options, &features(&front.offered()));
        let count = queues.len();
        let taps = namespace.run(|| {
            let taps = make_taps(name, count, sends)?;
            link::start(name, Some(mac), mtu)?;
            Ok::<_, Failure>(taps)
        });
        let taps = match taps.and_then(|taps| taps) {
            Ok(taps) => taps,
            Err(error) => {
                front.close(queues, None)?;
                return Err(error);
            }
        };
        let stop = Arc::new(AtomicBool::new(false));
        let threads = queues.into_iter().zip(taps).enumerate().map(|(number, (queue, tap))| {
            let stop = Arc::clone(&stop);
            std::thread::Builder::new()
                .name(format!("{THREADS}-{devid}.{number}"))
                .spawn(move || pump(queue, tap, &stop))
        });
        let threads = threads.collect::<Result<Vec<_>, _>>()?;
        Ok(Self { front, stop, threads, queues: count, mtu })
    }

    /// The backend's directory in XenStore.
    pub fn backend_path(&self) -> &str {
        self.front.backend_path()
    }

    /// What the interface is, in words.
    pub fn describe(&self) -> String {
        format!("{} queue(s), MTU {}", self.queues, self.mtu)
    }

    /// Whether all threads are at work: one that found the backend breaking the protocol is not.
    pub fn is_sound(&self) -> bool {
        !self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Disconnects and takes the interface away.
    ///
    /// # Errors
    /// What a thread ended with, or that the backend did not follow.
    pub fn unplug(self) -> Result<(), Failure> {
        self.stop.store(true, Ordering::Release);
        let (mut queues, mut first) = (Vec::new(), None);
        for thread in self.threads {
            match thread.join() {
                Ok(Ok((queue, _tap))) => queues.push(queue),
                Ok(Err(error)) => first = first.or(Some(error)),
                Err(_) => first = first.or(Some("a card's thread panicked".into())),
            }
        }
        self.front.close(queues, None)?;
        first.map_or(Ok(()), Err)
    }
}

/// What the interface may leave undone: what the backend takes, as far as the guest is to know it at all.
fn sends(options: &Options, offered: &Features) -> Features {
    let checksum = offered.checksum && options.csum_v4 && options.csum_v6;
    let cut = checksum && options.sg;
    Features { checksum, tso4: offered.tso4 && cut && options.gso_v4, tso6: offered.tso6 && cut && options.gso_v6 }
}

fn make_taps(name: &str, count: usize, features: Features) -> Result<Vec<Tap>, Failure> {
    let first = Tap::create(name)?;
    first.set_features(features)?;
    first.set_carrier(true)?;
    let mut taps = vec![first];
    for _ in 1..count {
        taps.push(Tap::attach_queue(name)?);
    }
    Ok(taps)
}

fn pump(queue: Queue, tap: Tap, stop: &AtomicBool) -> Result<(Queue, Tap), Failure> {
    let mut guest = TapGuest::new(queue, tap)?;
    while !stop.load(Ordering::Acquire) {
        let moved = guest.turn()?;
        if moved.sent + moved.received == 0 {
            guest.wait(LOOK)?;
        }
    }
    Ok(guest.into_parts())
}
