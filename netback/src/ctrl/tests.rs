//! The control ring, driven by hand on an emulated machine.

use hypervisor::emu::{GuestOptions, GuestSeat, Limits, Machine, Member};
use hypervisor::{GrantAccess, Guest, Shared};
use ring::layout::REQ_PROD;
use ring::{FrontRing, RingMemory};

use super::*;
use crate::abi::hash_type;

const INVALID: u32 = ctrl_status::INVALID_PARAMETER;
const UNSUPPORTED: u32 = ctrl_status::NOT_SUPPORTED;
const OVERFLOW: u32 = ctrl_status::BUFFER_OVERFLOW;

/// A guest with a control ring and a page to pass things in; and the backend's half.
struct Rig {
    front: FrontRing<Arc<Mapping>>,
    ring: Arc<Mapping>,
    page: Shared,
    guest: GuestSeat,
    control: Control,
    hash: Arc<HashState>,
    _machine: Machine,
}

impl Rig {
    fn new(queues: u32) -> Self {
        let machine = Machine::new(Limits::default()).unwrap();
        let guest = GuestSeat::local(&machine, GuestOptions::default()).unwrap();
        let xen: Arc<dyn Backend> = Arc::new(Member::local(&machine, DomId(0)).unwrap());
        let peer = Guest::domid(&guest);
        let Shared { memory, refs } = guest.share(DomId(0), 1, GrantAccess::ReadWrite).unwrap();
        let ring = Arc::new(memory);
        let port = guest.alloc_unbound(DomId(0)).unwrap();
        let hash = Arc::new(HashState::default());
        let control = Control::new(Parts {
            ring: xen.map(peer, &refs, GrantAccess::ReadWrite).unwrap(),
            channel: xen.bind(peer, port.port()).unwrap(),
            xen,
            peer,
            queues,
            hash: Arc::clone(&hash),
        })
        .unwrap();
        let front = FrontRing::init(Arc::clone(&ring), layout());
        // Reading is enough for the backend.
        let page = guest.share(DomId(0), 1, GrantAccess::ReadOnly).unwrap();
        Self { front, ring, page, guest, control, hash, _machine: machine }
    }

    fn gref(&self) -> u32 {
        self.page.refs[0].0
    }

    fn ask(&mut self, kind: u16, data: [u32; 3]) -> (u32, u32) {
        self.front.request(&CtrlRequest { id: 7, kind, data }.encode());
        let _wanted = self.front.publish();
        assert_eq!(self.control.turn().unwrap(), (1, true), "the guest asked to be notified");
        let mut slot = [0; CtrlResponse::SIZE];
        assert!(self.front.pending().unwrap() == 1 && self.front.consume(&mut slot));
        assert_eq!(self.front.rearm().unwrap(), 0);
        let response = CtrlResponse::decode(&slot);
        assert_eq!((response.id, response.kind), (7, kind));
        (response.status, response.data)
    }

    fn status(&mut self, kind: u16, data: [u32; 3]) -> u32 {
        self.ask(kind, data).0
    }

    fn put(&self, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.page.memory.copy_in(0, &bytes);
    }
}

#[test]
fn an_honest_guest_sets_everything_up() {
    use ctrl_type::*;
    let mut rig = Rig::new(4);
    let gref = rig.gref();
    assert_eq!(rig.ask(GET_HASH_FLAGS, [0; 3]).0, UNSUPPORTED, "no algorithm yet");
    assert_eq!(rig.status(SET_HASH_ALGORITHM, [1, 0, 0]), 0);
    assert_eq!(rig.ask(GET_HASH_FLAGS, [0; 3]), (0, 15));
    assert_eq!(rig.status(SET_HASH_FLAGS, [hash_type::IPV4 | hash_type::IPV4_TCP, 0, 0]), 0);
    let key: Vec<u8> = (1..=40).collect();
    rig.page.memory.copy_in(0, &key);
    assert_eq!(rig.status(SET_HASH_KEY, [gref, 40, 0]), 0);
    assert_eq!(rig.ask(GET_HASH_MAPPING_SIZE, [0; 3]), (0, 128));
    assert_eq!(rig.status(SET_HASH_MAPPING_SIZE, [128, 0, 0]), 0);
    rig.put(&[3, 2, 1, 0]);
    assert_eq!(rig.status(SET_HASH_MAPPING, [gref, 4, 124]), 0);
    let settings = rig.hash.settings();
    assert_eq!((settings.algorithm(), settings.types()), (Algorithm::Toeplitz, 3));
    assert_eq!(settings.key()[..], key);
    assert_eq!(settings.mapping()[123..], [0, 3, 2, 1, 0]);
    // An empty key needs no page, and empties the key.
    assert_eq!(rig.status(SET_HASH_KEY, [u32::MAX, 0, 0]), 0);
    assert_eq!(rig.hash.settings().key(), &[0; 40]);
    assert_eq!(rig.status(SET_HASH_ALGORITHM, [0; 3]), 0);
    assert_eq!(rig.hash.settings().algorithm(), Algorithm::None);
}

#[test]
fn what_is_not_known_is_not_supported() {
    let mut rig = Rig::new(1);
    for kind in [0, 8, 9, 10, 11, 0x100, u16::MAX] {
        assert_eq!(rig.ask(kind, [1, 2, 3]), (UNSUPPORTED, 0), "{kind}");
    }
}

#[test]
fn bad_parameters_change_nothing() {
    use ctrl_type::*;
    let mut rig = Rig::new(4);
    assert_eq!(rig.status(SET_HASH_FLAGS, [1, 0, 0]), INVALID, "no algorithm yet");
    assert_eq!(rig.status(SET_HASH_ALGORITHM, [1, 0, 0]), 0);
    for algorithm in [2, 255, u32::MAX] {
        assert_eq!(rig.status(SET_HASH_ALGORITHM, [algorithm, 0, 0]), INVALID);
    }
    for types in [16, 1 << 31, u32::MAX] {
        assert_eq!(rig.status(SET_HASH_FLAGS, [types, 0, 0]), INVALID);
    }
    for size in [129, 1 << 30, u32::MAX] {
        assert_eq!(rig.status(SET_HASH_MAPPING_SIZE, [size, 0, 0]), INVALID);
    }
    let settings = rig.hash.settings();
    assert_eq!((settings.algorithm(), settings.types(), settings.mapping().len()), (Algorithm::Toeplitz, 0, 0));
}

#[test]
fn xsa_270_tables_and_keys_beyond_their_bounds() {
    use ctrl_type::*;
    let mut rig = Rig::new(4);
    let gref = rig.gref();
    rig.put(&[1; 1024]);
    for len in [41, 4096, 4097, 65536, 65537, u32::MAX] {
        assert_eq!(rig.status(SET_HASH_KEY, [gref, len, 0]), OVERFLOW, "{len}");
    }
    assert_eq!(rig.hash.settings().key(), &[0; 40]);
    assert_eq!(rig.status(SET_HASH_MAPPING, [gref, 1, 0]), INVALID, "there is no table");
    assert_eq!(rig.status(SET_HASH_MAPPING_SIZE, [100, 0, 0]), 0);
    for (len, offset) in [(101, 0), (1, 100), (2, 99), (100, 1), (1, u32::MAX), (128, u32::MAX - 127), (0, 101)] {
        assert_eq!(rig.status(SET_HASH_MAPPING, [gref, len, offset]), INVALID, "{len} at {offset}");
    }
    // Lengths whose size in bytes wraps around among them.
    for len in [129, 1024, 1025, 1 << 14, 1 << 30, (1 << 30) + 1, u32::MAX] {
        assert_eq!(rig.status(SET_HASH_MAPPING, [gref, len, 0]), OVERFLOW, "{len}");
    }
    rig.put(&[0, 1, 4, 2]);
    assert_eq!(rig.status(SET_HASH_MAPPING, [gref, 4, 0]), INVALID, "there is no queue 4");
    assert_eq!(rig.hash.settings().mapping(), [0; 100]);
    // What is checked is what was named now, not what stood there before.
    rig.put(&[3, 1]);
    assert_eq!(rig.status(SET_HASH_MAPPING, [gref, 2, 98]), 0);
    assert_eq!(rig.hash.settings().mapping()[97..], [0, 3, 1]);
}

#[test]
fn keys_and_tables_in_pages_that_are_not_granted() {
    use ctrl_type::*;
    let mut rig = Rig::new(4);
    assert_eq!(rig.status(SET_HASH_MAPPING_SIZE, [4, 0, 0]), 0);
    let frame = rig.guest.alloc_pages(1).unwrap();
    let foreign = rig.guest.grant(frame, DomId(77), GrantAccess::ReadOnly).unwrap();
    let revoked = rig.guest.grant(frame, DomId(0), GrantAccess::ReadOnly).unwrap();
    rig.guest.revoke(revoked).unwrap();
    let before = rig.hash.settings();
    for gref in [0, foreign.0, revoked.0, rig.guest.entries(), u32::MAX] {
        assert_eq!(rig.status(SET_HASH_KEY, [gref, 40, 0]), INVALID, "{gref}");
        assert_eq!(rig.status(SET_HASH_MAPPING, [gref, 4, 0]), INVALID, "{gref}");
    }
    assert!(Arc::ptr_eq(&before, &rig.hash.settings()), "nothing was changed");
}

#[test]
fn a_producer_too_far_ahead_breaks_the_ring() {
    for prod in [129, 1 << 31, u32::MAX] {
        let mut rig = Rig::new(1);
        rig.ring.atomic_u32(REQ_PROD).store(prod, std::sync::atomic::Ordering::SeqCst);
        assert!(matches!(rig.control.turn(), Err(Broken::Ring(_))), "{prod}");
        assert!(rig.control.rearm().is_err());
        assert_eq!(rig.ring.load(ring::Field::RspProd), 0, "nothing was answered");
    }
}

#[test]
fn a_full_ring_is_answered_in_one_turn() {
    let mut rig = Rig::new(1);
    for id in 0..128 {
        rig.front.request(&CtrlRequest { id, kind: 99, data: [0; 3] }.encode());
    }
    let _wanted = rig.front.publish();
    assert_eq!(rig.control.turn().unwrap(), (128, true));
    assert_eq!(rig.control.turn().unwrap(), (0, false));
    assert!(!rig.control.rearm().unwrap());
    assert_eq!(rig.front.pending().unwrap(), 128);
    let mut slot = [0; CtrlResponse::SIZE];
    for id in 0..128 {
        assert!(rig.front.consume(&mut slot));
        assert_eq!(CtrlResponse::decode(&slot), CtrlResponse { id, kind: 99, status: UNSUPPORTED, data: 0 });
    }
}
