//! Grant copies: a status for each, every reason to refuse one, and races with a guest that revokes.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};

use hypervisor::emu::RawEntry;
use hypervisor::memory::Mapping;
use hypervisor::{Backend, CopyDirection, CopyOp, DomId, GrantAccess, GrantRef, GrantStatus, Guest, PAGE_SIZE};

use crate::rig::{LIMITS, everywhere, op, reason};

use CopyDirection::{FromGuest, ToGuest};
use GrantAccess::{ReadOnly, ReadWrite};
use GrantStatus as S;

const DOM0: DomId = DomId::DOM0;

#[test]
fn each_operation_has_its_own_status() {
    everywhere(|rig| {
        let guest = rig.guest();
        let shared = guest.share(DOM0, 1, ReadWrite).unwrap();
        let (good, readonly) = (shared.refs[0], guest.grant(9, DOM0, ReadOnly).unwrap());
        let foreign = guest.grant(9, DomId(5), ReadWrite).unwrap();
        let outside = guest.grant(LIMITS.memory_pages, DOM0, ReadWrite).unwrap();
        let subpage = guest.grant(9, DOM0, ReadWrite).unwrap();
        guest.write_entry(subpage, RawEntry { flags: 1 | 1 << 8, domid: 0, frame: 9 });
        shared.memory.copy_in(0, b"from the guest");
        let local = Mapping::anonymous(4 * PAGE_SIZE).unwrap();
        local.copy_in(3 * PAGE_SIZE, b"to the guest");
        let piece = |gref, direction, offset, len| CopyOp { offset, len, ..op(gref, direction) };
        let mut cases = [
            (op(good, FromGuest), S::Okay),
            (CopyOp { local: 3 * PAGE_SIZE, len: 12, offset: 2000, ..op(good, ToGuest) }, S::Okay),
            (CopyOp { local: PAGE_SIZE, ..op(readonly, FromGuest) }, S::Okay),
            (op(readonly, ToGuest), S::GeneralError),
            (op(foreign, FromGuest), S::GeneralError),
            (op(foreign, ToGuest), S::GeneralError),
            (op(subpage, FromGuest), S::GeneralError),
            (op(GrantRef(0), FromGuest), S::GeneralError),
            (op(GrantRef(LIMITS.grants), FromGuest), S::BadGrantRef),
            (op(GrantRef(u32::MAX), ToGuest), S::BadGrantRef),
            (op(outside, FromGuest), S::BadPage),
            (op(outside, ToGuest), S::BadPage),
            (piece(good, FromGuest, 1, 4096), S::BadCopyArg),
            (piece(good, ToGuest, 4096, 1), S::BadCopyArg),
            (piece(good, FromGuest, 65535, 2), S::BadCopyArg),
            (CopyOp { local: PAGE_SIZE, ..piece(good, FromGuest, 4095, 1) }, S::Okay),
            (piece(good, FromGuest, 4096, 0), S::Okay),
        ];
        let mut ops: Vec<CopyOp> = cases.iter().map(|case| CopyOp { status: S::Busy, ..case.0 }).collect();
        rig.dom0.copy(guest.domid(), &local, &mut ops).unwrap();
        for (case, done) in cases.iter_mut().zip(&ops) {
            case.0.status = case.1;
            assert_eq!(case.0, *done);
        }
        let mut seen = [0; 14];
        local.copy_out(0, &mut seen);
        assert_eq!(&seen, b"from the guest");
        shared.memory.copy_out(2000, &mut seen[..12]);
        assert_eq!(&seen[..12], b"to the guest");
        let counters = rig.dom0.counters_between(DOM0, guest.domid());
        assert_eq!((counters.copies, counters.copied_bytes), (5, 2 * 4096 + 12 + 1));
        assert_eq!((counters.refused_grants(), counters.torn_copies), (12, 0));
        assert_eq!(guest.read_entry(good), Some(RawEntry::granting(0, DOM0, ReadWrite)), "no marks stay behind");
    });
}

#[test]
fn copies_of_nobodys_pages_are_refused_one_by_one() {
    everywhere(|rig| {
        let local = Mapping::anonymous(PAGE_SIZE).unwrap();
        let _driver = rig.driver(9).unwrap();
        for (peer, expected) in [(44, S::BadDomain), (0xffff, S::BadDomain), (9, S::BadGrantRef), (0, S::BadGrantRef)] {
            let mut ops = [op(GrantRef(8), FromGuest), op(GrantRef(9), ToGuest)];
            rig.dom0.copy(DomId(peer), &local, &mut ops).unwrap();
            assert_eq!(ops.map(|op| op.status), [expected; 2], "{peer}");
        }
        assert_eq!(rig.dom0.counters().refused_grants(), 8);
    });
}

#[test]
fn our_own_mistakes_are_errors_not_statuses() {
    everywhere(|rig| {
        let guest = rig.guest();
        let gref = guest.grant(0, DOM0, ReadWrite).unwrap();
        let local = Mapping::anonymous(PAGE_SIZE).unwrap();
        for at in [1, PAGE_SIZE, usize::MAX, usize::MAX - 4095] {
            let mut ops = [CopyOp { local: at, ..op(gref, FromGuest) }];
            assert!(reason(rig.dom0.copy(guest.domid(), &local, &mut ops)).contains("a copy of 4096 bytes"));
        }
        let readonly = rig.dom0.map(guest.domid(), &[gref], ReadOnly).unwrap();
        let mut ops = [op(gref, FromGuest)];
        assert!(reason(rig.dom0.copy(guest.domid(), &readonly, &mut ops)).contains("read-only"));
        ops[0].direction = ToGuest;
        rig.dom0.copy(guest.domid(), &readonly, &mut ops).unwrap();
        assert_eq!(ops[0].status, S::Okay, "from a page onto itself");
    });
}

#[test]
fn a_copy_works_beside_a_map() {
    everywhere(|rig| {
        let guest = rig.guest();
        let shared = guest.share(DOM0, 1, ReadWrite).unwrap();
        let mapping = rig.dom0.map(guest.domid(), &shared.refs, ReadWrite).unwrap();
        let local = Mapping::anonymous(PAGE_SIZE).unwrap();
        local.copy_in(0, &[7; PAGE_SIZE]);
        let mut ops = [op(shared.refs[0], ToGuest)];
        rig.dom0.copy(guest.domid(), &local, &mut ops).unwrap();
        let mut seen = [0; PAGE_SIZE];
        mapping.copy_out(0, &mut seen);
        assert_eq!((ops[0].status, seen), (S::Okay, [7; PAGE_SIZE]));
    });
}

/// A guest ends its grant while copies run, and only then writes to the page. A copy that is reported as good must
/// not have seen that.
#[test]
fn a_copy_never_succeeds_on_a_grant_that_went_away_meanwhile() {
    everywhere(|rig| {
        let guest = rig.guest();
        let local = Mapping::anonymous(PAGE_SIZE).unwrap();
        let (started, barrier) = (AtomicU32::new(0), Barrier::new(2));
        const ROUNDS: u32 = 500;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    let frame = guest.alloc_pages(1).unwrap();
                    let gref = guest.grant(frame, DOM0, ReadWrite).unwrap();
                    assert_eq!(gref, GrantRef(8), "always the same, the last one freed");
                    barrier.wait();
                    while started.load(Ordering::Acquire) != round {
                        std::hint::spin_loop();
                    }
                    guest.revoke(gref).unwrap();
                    guest.memory().copy_in(frame as usize * PAGE_SIZE, &[0xaa; PAGE_SIZE]);
                    barrier.wait();
                    guest.free_pages(frame, 1);
                }
            });
            for round in 1..=ROUNDS {
                barrier.wait();
                loop {
                    let mut ops = [op(GrantRef(8), FromGuest)];
                    rig.dom0.copy(guest.domid(), &local, &mut ops).unwrap();
                    if ops[0].status != S::Okay {
                        assert_eq!(ops[0].status, S::GeneralError);
                        break;
                    }
                    let mut seen = [1; PAGE_SIZE];
                    local.copy_out(0, &mut seen);
                    assert!(seen == [0; PAGE_SIZE], "a good copy of a page that was no longer granted");
                    started.store(round, Ordering::Release);
                }
                barrier.wait();
            }
        });
    });
}
