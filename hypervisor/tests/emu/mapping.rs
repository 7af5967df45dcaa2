//! Grant maps: every reason to refuse one, and that all or nothing is mapped.

use hypervisor::emu::{GuestSeat, RawEntry};
use hypervisor::{Backend, DomId, GrantAccess, GrantRef, GrantStatus, Guest, PAGE_SIZE};

use crate::rig::{LIMITS, Rig, everywhere, reason, status};

use GrantAccess::{ReadOnly, ReadWrite};
use GrantStatus as S;

const DOM0: DomId = DomId::DOM0;

#[test]
fn every_bad_reference_is_refused_and_nothing_stays_mapped() {
    everywhere(|rig| {
        let guest = rig.guest();
        let good = guest.share(DOM0, 2, ReadWrite).unwrap().refs;
        let readonly = guest.grant(4, DOM0, ReadOnly).unwrap();
        let foreign = guest.grant(4, DomId(77), ReadWrite).unwrap();
        let self_granted = guest.grant(4, guest.domid(), ReadWrite).unwrap();
        let outside = guest.grant(LIMITS.memory_pages, DOM0, ReadWrite).unwrap();
        let far_outside = guest.grant(u32::MAX, DOM0, ReadWrite).unwrap();
        let revoked = guest.grant(4, DOM0, ReadWrite).unwrap();
        guest.revoke(revoked).unwrap();
        let raw = |flags| {
            let gref = guest.grant(4, DOM0, ReadWrite).unwrap();
            guest.write_entry(gref, RawEntry { flags, domid: 0, frame: 4 });
            gref
        };
        let cases = [
            (GrantRef(LIMITS.grants), ReadOnly, S::BadGrantRef),
            (GrantRef(u32::MAX), ReadOnly, S::BadGrantRef),
            (GrantRef(0), ReadOnly, S::GeneralError),
            (revoked, ReadOnly, S::GeneralError),
            (readonly, ReadWrite, S::GeneralError),
            (foreign, ReadOnly, S::GeneralError),
            (self_granted, ReadOnly, S::GeneralError),
            (outside, ReadOnly, S::BadPage),
            (far_outside, ReadWrite, S::BadPage),
            (raw(2), ReadOnly, S::GeneralError),
            (raw(3), ReadOnly, S::GeneralError),
            (raw(1 | 1 << 8), ReadOnly, S::GeneralError),
        ];
        for (bad, access, expected) in cases {
            for refs in [vec![bad], vec![good[0], bad, good[1]], vec![good[0], good[1], bad]] {
                let said = rig.dom0.map(guest.domid(), &refs, access).unwrap_err();
                let hypervisor::Error::Grant { operation: "map", domain, gref, status } = said else {
                    panic!("{said}")
                };
                assert_eq!((domain, gref, status), (guest.domid(), bad, expected), "{refs:?} {access:?}");
            }
        }
        let counters = rig.dom0.counters_between(DOM0, guest.domid());
        assert_eq!((counters.maps, counters.refused_grants()), (0, 3 * cases.len() as u64));
        assert_eq!(counters.refused(S::BadPage), 6);
        // Nothing is pinned: all can be revoked.
        for gref in good {
            guest.revoke(gref).unwrap();
        }
        assert_eq!(rig.dom0.domains().unwrap()[0].maps_held, 0);
    });
}

#[test]
fn nobody_maps_of_a_domain_that_is_not_there_or_grants_nothing() {
    everywhere(|rig| {
        let _driver = rig.driver(9).unwrap();
        for (peer, expected) in [(3, S::BadDomain), (0x7ff0, S::BadDomain), (0xffff, S::BadDomain), (9, S::BadGrantRef)]
        {
            assert_eq!(status(rig.dom0.map(DomId(peer), &[GrantRef(8)], ReadOnly)), expected, "{peer}");
        }
        assert_eq!(status(rig.dom0.map(DOM0, &[GrantRef(8)], ReadOnly)), S::BadGrantRef);
        let guest = rig.guest();
        assert!(reason(rig.dom0.map(guest.domid(), &[], ReadOnly)).contains("1 to"));
        assert!(reason(rig.dom0.map(guest.domid(), &[GrantRef(8); 5000], ReadOnly)).contains("1 to"));
    });
}

#[test]
fn a_grant_is_for_one_domain() {
    everywhere(|rig| {
        let guest = rig.guest();
        let driver = rig.driver(9).unwrap();
        let gref = guest.grant(1, DomId(9), ReadWrite).unwrap();
        assert_eq!(status(rig.dom0.map(guest.domid(), &[gref], ReadOnly)), S::GeneralError);
        let _held = driver.map(guest.domid(), &[gref], ReadOnly).unwrap();
        // Rewritten for dom0 while it is mapped by the driver domain: the first mapper keeps it to itself.
        guest.write_entry(gref, RawEntry::granting(1, DOM0, ReadWrite));
        assert_eq!(status(rig.dom0.map(guest.domid(), &[gref], ReadOnly)), S::GeneralError);
        assert_eq!(status(driver.map(guest.domid(), &[gref], ReadOnly)), S::GeneralError);
    });
}

#[test]
fn a_mapped_page_cannot_be_swapped_for_another() {
    everywhere(|rig| {
        let guest = rig.guest();
        let gref = guest.grant(1, DOM0, ReadWrite).unwrap();
        guest.memory().copy_in(PAGE_SIZE, b"first");
        let held = rig.dom0.map(guest.domid(), &[gref], ReadOnly).unwrap();
        guest.write_entry(gref, RawEntry::granting(2, DOM0, ReadWrite));
        assert_eq!(status(rig.dom0.map(guest.domid(), &[gref], ReadWrite)), S::GeneralError);
        let mut seen = [0; 5];
        held.copy_out(0, &mut seen);
        assert_eq!(&seen, b"first", "the mapping persists");
        drop(held);
        rig.dom0.map(guest.domid(), &[gref], ReadWrite).unwrap();
        guest.revoke(gref).unwrap();
    });
}

fn check_pages(rig: &Rig, guest: &GuestSeat, frames: &[u32], access: GrantAccess) {
    let refs: Vec<_> = frames.iter().map(|&frame| guest.grant(frame, DOM0, access).unwrap()).collect();
    let mapping = rig.dom0.map(guest.domid(), &refs, access).unwrap();
    assert_eq!((mapping.len(), mapping.is_writable()), (frames.len() * PAGE_SIZE, access == ReadWrite));
    for (at, &frame) in frames.iter().enumerate() {
        let mark = frame ^ 0x5a5a_5a5a;
        guest.memory().write_record(frame as usize * PAGE_SIZE + 8, &mark.to_le_bytes());
        let mut seen = [0; 4];
        mapping.read_once(at * PAGE_SIZE + 8, &mut seen);
        assert_eq!(u32::from_le_bytes(seen), mark);
        if access == ReadWrite {
            mapping.write_record(at * PAGE_SIZE + PAGE_SIZE - 4, &mark.to_le_bytes());
            guest.memory().read_once((frame as usize + 1) * PAGE_SIZE - 4, &mut seen);
            assert_eq!(u32::from_le_bytes(seen), mark);
        }
    }
    drop(mapping);
    for gref in refs {
        guest.revoke(gref).unwrap();
    }
}

#[test]
fn pages_appear_in_the_order_of_their_references() {
    everywhere(|rig| {
        let guest = rig.guest();
        for access in [ReadOnly, ReadWrite] {
            for frames in [&[3][..], &[3, 4, 5], &[5, 4, 3], &[7, 7, 7], &[63, 0, 62]] {
                check_pages(rig, &guest, frames, access);
            }
        }
    });
}

#[test]
fn quotas_hold() {
    everywhere(|rig| {
        let guest = rig.guest();
        let gref = guest.grant(1, DOM0, ReadWrite).unwrap();
        // One grant is mapped 128 times at most, for reading and for writing each.
        let many: Vec<_> = (0..128).map(|_| rig.dom0.map(guest.domid(), &[gref], ReadOnly).unwrap()).collect();
        assert_eq!(status(rig.dom0.map(guest.domid(), &[gref], ReadOnly)), S::GeneralError);
        rig.dom0.map(guest.domid(), &[gref], ReadWrite).unwrap();
        // And a domain holds 300 maps here.
        let refs: Vec<_> = (0..172).map(|_| guest.grant(2, DOM0, ReadWrite).unwrap()).collect();
        let rest = rig.dom0.map(guest.domid(), &refs, ReadOnly).unwrap();
        assert_eq!(rig.dom0.domains().unwrap()[0].maps_held, 300);
        assert_eq!(status(rig.dom0.map(guest.domid(), &refs[..1], ReadOnly)), S::NoSpace);
        // A batch that would pass the quota changes nothing.
        drop(rest);
        let more: Vec<_> = refs.iter().copied().chain([guest.grant(2, DOM0, ReadWrite).unwrap()]).collect();
        assert_eq!(status(rig.dom0.map(guest.domid(), &more, ReadOnly)), S::NoSpace);
        drop(many);
        rig.dom0.map(guest.domid(), &more, ReadOnly).unwrap();
        let counters = rig.dom0.counters();
        assert_eq!((counters.maps, counters.unmaps), (474, 474));
    });
}

#[test]
fn a_read_only_map_faults_on_a_stray_write() {
    // The mapping API refuses it before the hardware has to.
    let rig = Rig::local();
    let guest = rig.guest();
    let gref = guest.grant(1, DOM0, ReadWrite).unwrap();
    let mapping = rig.dom0.map(guest.domid(), &[gref], ReadOnly).unwrap();
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| mapping.copy_in(0, b"x"))).is_err());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let protections: Vec<_> = maps.lines().filter(|line| line.contains("xen-guest-memory")).collect();
    assert!(protections.iter().any(|line| line.contains(" r--s ")), "{protections:?}");
}
