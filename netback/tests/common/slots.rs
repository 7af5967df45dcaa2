//! Packets slot by slot, as only a guest makes them that is up to something.

use std::time::{Duration, Instant};

use hypervisor::{GrantRef, PAGE_SIZE};
use netback::abi::{Extra, GsoType, TxRequest, TxResponse, status, tx_flag};
use netback::front::{Options, Queue};

use super::{PATIENCE, Scene, until};

pub const BLANK: u16 = tx_flag::CSUM_BLANK | tx_flag::DATA_VALIDATED;
pub const MORE: u16 = tx_flag::MORE_DATA;
pub const EXTRA: u16 = tx_flag::EXTRA_INFO;

/// One slot of the transmit ring: a request or an extra.
#[derive(Debug, Clone, Copy)]
pub enum Slot {
    Data(TxRequest),
    Extra(Extra, bool),
    Raw([u8; 12]),
}

impl Slot {
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Data(request) => request.encode().to_vec(),
            Self::Extra(extra, more) => extra.encode(*more).to_vec(),
            Self::Raw(bytes) => bytes.to_vec(),
        }
    }
}

/// Puts slots into the ring and shows them.
pub fn submit(queue: &mut Queue, slots: &[Slot]) {
    for slot in slots {
        queue.tx.raw_request(&slot.bytes());
    }
    queue.publish().unwrap();
}

/// Takes `count` answers as they stand in the ring.
pub fn answers(queue: &mut Queue, count: usize) -> Vec<TxResponse> {
    let began = Instant::now();
    let mut answers = Vec::new();
    while answers.len() < count {
        match queue.tx.raw_response().unwrap() {
            Some(answer) => answers.push(answer),
            None => {
                assert!(began.elapsed() < PATIENCE, "{} of {count} answers came", answers.len());
                queue.wait_any(Duration::from_millis(100)).unwrap();
            }
        }
    }
    answers
}

/// Sends one packet, all of whose data slots must get `expected`, and its extras NULL; each its own id, in order.
pub fn ask(queue: &mut Queue, slots: &[Slot], expected: i16) {
    submit(queue, slots);
    let answers = answers(queue, slots.len());
    for (slot, answer) in slots.iter().zip(&answers) {
        match slot {
            Slot::Data(request) => assert_eq!((answer.id, answer.status), (request.id, expected), "{slots:?}"),
            _ => assert_eq!(answer.status, status::NULL, "{slots:?}: {answers:?}"),
        }
    }
}

/// Puts bytes into the pool's page `page` from `offset` on; the grant and place for a slot.
pub fn put(queue: &Queue, page: usize, offset: usize, bytes: &[u8]) -> (GrantRef, u16) {
    queue.tx.pool().copy_in(page * PAGE_SIZE + offset, bytes);
    (queue.tx.refs()[page], offset as u16)
}

/// The slots of a packet that lies in the pool in pieces, a page each; `flags` for the first.
pub fn chain(queue: &Queue, frame: &[u8], lens: &[usize], flags: u16, extras: &[Extra]) -> Vec<Slot> {
    use netback::abi::tx_flag::{EXTRA_INFO, MORE_DATA};
    assert_eq!(lens.iter().sum::<usize>(), frame.len());
    let mut slots = Vec::new();
    let mut at = 0;
    for (index, &len) in lens.iter().enumerate() {
        let (gref, offset) = put(queue, index, 0, &frame[at..at + len]);
        at += len;
        let more = if index + 1 < lens.len() { MORE_DATA } else { 0 };
        let own = if index == 0 { flags | if extras.is_empty() { 0 } else { EXTRA_INFO } } else { 0 };
        let size = if index == 0 { frame.len() } else { len } as u16;
        slots.push(Slot::Data(TxRequest { gref, offset, flags: own | more, id: 1000 + index as u16, size }));
        if index == 0 {
            let last = extras.len().saturating_sub(1);
            slots.extend(extras.iter().enumerate().map(|(at, &extra)| Slot::Extra(extra, at < last)));
        }
    }
    slots
}

pub fn gso(size: u16, kind: GsoType) -> Extra {
    Extra::Gso { size, kind }
}

/// A slot that points at page 0 of the pool.
pub fn slot(queue: &Queue, offset: u16, flags: u16, id: u16, size: u16) -> Slot {
    Slot::Data(TxRequest { gref: queue.tx.refs()[0], offset, flags, id, size })
}

/// A scene in which the hostile guest does something that ends its device, with `why`; it can connect again.
pub fn ends(why: &str, evil: impl FnOnce(&mut Queue)) {
    let (mut scene, mut vif) = Scene::connected(&Options::default());
    vif.works();
    evil(vif.queue());
    // Whether or not the backend asked for it.
    vif.queue().tx_channel().notify().unwrap();
    scene.gave_up(why);
    scene.neighbour_works();
    until("unmapping", || scene.mapped() == 0);
    vif.close();
    let mut vif = scene.connect(&Options::default());
    vif.works();
    scene.close(vif);
}
