//! The guest's own half: pages, references, revocation.

use hypervisor::emu::{GuestOptions, PERMIT_ACCESS, READING, WRITING};
use hypervisor::{Backend, DomId, GrantAccess, GrantRef, GrantStatus, Guest, PAGE_SIZE};

use crate::rig::{LIMITS, everywhere, reason, status};

const DOM0: DomId = DomId::DOM0;

#[test]
fn shared_pages_are_zeroed_and_freed() {
    everywhere(|rig| {
        let guest = rig.guest();
        for _ in 0..100 {
            let shared = guest.share(DOM0, 40, GrantAccess::ReadWrite).unwrap();
            let mut bytes = vec![1; 40 * PAGE_SIZE];
            shared.memory.copy_out(0, &mut bytes);
            assert!(bytes.iter().all(|&byte| byte == 0));
            shared.memory.copy_in(0, &vec![0xff; 40 * PAGE_SIZE]);
            assert!(shared.refs.iter().all(|gref| gref.0 >= 8), "the first eight are the toolstack's");
            guest.unshare(shared).unwrap();
        }
        assert_eq!(rig.dom0.domains().unwrap()[1].grants, 0);
    });
}

#[test]
fn a_guest_runs_out_of_pages_and_of_references() {
    everywhere(|rig| {
        let guest = rig.guest();
        assert!(reason(guest.share(DOM0, 65, GrantAccess::ReadOnly)).contains("no 65 free pages"));
        assert!(reason(guest.share(DOM0, 0, GrantAccess::ReadOnly)).contains("no 0 free pages"));
        for expected in 8..LIMITS.grants {
            assert_eq!(guest.grant(0, DOM0, GrantAccess::ReadOnly).unwrap(), GrantRef(expected));
        }
        assert!(reason(guest.grant(0, DOM0, GrantAccess::ReadOnly)).contains("grant table is full"));
        // A share that fails halfway gives everything back.
        guest.revoke(GrantRef(100)).unwrap();
        assert!(reason(guest.share(DOM0, 2, GrantAccess::ReadOnly)).contains("grant table is full"));
        assert_eq!(guest.alloc_pages(64).unwrap(), 0);
        guest.grant(0, DOM0, GrantAccess::ReadOnly).unwrap();
    });
}

#[test]
fn nothing_is_revoked_while_any_of_it_is_mapped() {
    everywhere(|rig| {
        let guest = rig.guest();
        let shared = guest.share(DOM0, 3, GrantAccess::ReadWrite).unwrap();
        let refs = shared.refs.clone();
        let last = rig.dom0.map(guest.domid(), &refs[2..], GrantAccess::ReadOnly).unwrap();
        let (shared, error) = guest.unshare(shared).unwrap_err();
        assert_eq!(status(Err::<(), _>(error)), GrantStatus::Busy);
        assert_eq!(status(guest.revoke(refs[2])), GrantStatus::Busy);
        // The others still work.
        rig.dom0.map(guest.domid(), &refs, GrantAccess::ReadWrite).unwrap();
        drop(last);
        guest.unshare(shared).unwrap();
        assert_eq!(status(rig.dom0.map(guest.domid(), &refs[..1], GrantAccess::ReadOnly)), GrantStatus::GeneralError);
        assert_eq!(status(guest.revoke(refs[0])), GrantStatus::BadGrantRef);
    });
}

#[test]
fn the_machine_marks_entries_while_they_are_mapped() {
    everywhere(|rig| {
        let guest = rig.guest();
        let gref = guest.grant(5, DOM0, GrantAccess::ReadWrite).unwrap();
        let flags = || guest.read_entry(gref).unwrap().flags;
        let map = |access| rig.dom0.map(guest.domid(), &[gref], access).unwrap();
        let (reader, writer, other) =
            (map(GrantAccess::ReadOnly), map(GrantAccess::ReadWrite), map(GrantAccess::ReadOnly));
        assert_eq!(flags(), PERMIT_ACCESS | READING | WRITING);
        drop(writer);
        assert_eq!(flags(), PERMIT_ACCESS | READING);
        drop((reader, other));
        assert_eq!(flags(), PERMIT_ACCESS);
    });
}

#[test]
fn guests_are_created_as_they_wish_within_limits() {
    everywhere(|rig| {
        let create = |name: &str, memory_pages, domid: Option<u16>| {
            rig.dom0.create_guest(GuestOptions { name: name.to_owned(), memory_pages, domid: domid.map(DomId) })
        };
        let seven = create("seven", 16, Some(7)).unwrap();
        assert_eq!((seven.domid(), seven.memory().len()), (DomId(7), 16 * PAGE_SIZE));
        for (name, pages, domid, why) in [
            ("x", 0, Some(7), "domain 7 already"),
            ("x", 0, Some(0), "domain id 0"),
            ("x", 0, Some(0x7ff0), "domain id 32752"),
            ("x", 0, Some(0xffff), "domain id 65535"),
            ("x", 1025, None, "1025 pages"),
            ("a/b", 0, None, "no name"),
            ("a b", 0, None, "no name"),
            (&"x".repeat(65), 0, None, "no name"),
        ] {
            let said = reason(create(name, pages, domid));
            assert!(said.contains(why), "{said}");
        }
        let infos = rig.dom0.domains().unwrap();
        let names: Vec<_> = infos.iter().map(|info| (info.domid.0, info.name.as_str(), info.memory_pages)).collect();
        assert_eq!(names, [(0, "Domain-0", 0), (7, "seven", 16)]);
        drop(seven);
        create("again", 0, Some(7)).unwrap();
    });
}

#[test]
fn backends_do_not_act_for_guests() {
    everywhere(|rig| {
        let guest = rig.guest();
        assert!(reason(rig.driver(guest.domid().0)).contains("is a guest"));
        assert!(reason(rig.driver(0x7ff0)).contains("no domain id"));
        // Several processes may serve from one domain.
        let drivers = [rig.driver(9).unwrap(), rig.driver(9).unwrap()];
        assert_eq!(rig.dom0.domains().unwrap().last().unwrap().seats, 2);
        assert!(drivers[0].destroy(guest.domid()).is_err(), "only dom0 may");
    });
}
