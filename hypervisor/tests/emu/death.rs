//! The end of domains, inside one process: what stays, what is refused, what is counted.

use hypervisor::emu::GuestOptions;
use hypervisor::memory::Mapping;
use hypervisor::{Backend, CopyDirection, DomId, GrantAccess, GrantStatus, Guest, PAGE_SIZE};

use crate::rig::{everywhere, op, reason, status};

const DOM0: DomId = DomId::DOM0;

#[test]
fn mappings_outlive_their_domain_but_nothing_new_is_granted() {
    everywhere(|rig| {
        let guest = rig.guest();
        let dead = guest.domid();
        let shared = guest.share(DOM0, 2, GrantAccess::ReadWrite).unwrap();
        let front = guest.alloc_unbound(DOM0).unwrap();
        let back = rig.dom0.bind(dead, front.port()).unwrap();
        let mapping = rig.dom0.map(dead, &shared.refs, GrantAccess::ReadWrite).unwrap();
        let local = Mapping::anonymous(PAGE_SIZE).unwrap();
        let mut ops = [op(shared.refs[0], CopyDirection::FromGuest)];
        rig.dom0.copy(dead, &local, &mut ops).unwrap();
        assert_eq!(ops[0].status, GrantStatus::Okay);
        shared.memory.copy_in(0, b"last words");

        rig.dom0.destroy(dead).unwrap();
        let zombie = rig.dom0.domains().unwrap().pop().unwrap();
        assert_eq!((zombie.domid, zombie.zombie, zombie.mapped, zombie.ports), (dead, true, 2, 0));
        let mut seen = [0; 10];
        mapping.copy_out(0, &mut seen);
        assert_eq!(&seen, b"last words");
        mapping.copy_in(0, b"still ours");

        assert_eq!(status(rig.dom0.map(dead, &shared.refs, GrantAccess::ReadOnly)), GrantStatus::BadDomain);
        rig.dom0.copy(dead, &local, &mut ops).unwrap();
        assert_eq!(ops[0].status, GrantStatus::BadDomain);
        assert!(reason(rig.dom0.bind(dead, front.port())).contains("no such domain"));
        back.notify().unwrap();
        assert_eq!(rig.dom0.counters_between(DOM0, dead).notifications_dropped, 1);
        assert!(reason(rig.dom0.destroy(dead)).contains("no domain"));

        // The guest's process goes on and finds that it is nobody.
        assert!(reason(guest.alloc_unbound(DOM0)).contains("destroyed"));
        assert!(reason(guest.store()).contains("destroyed"));
        drop((front, guest));

        // A zombie keeps its id.
        let wanted = GuestOptions { domid: Some(dead), ..GuestOptions::default() };
        assert!(reason(rig.dom0.create_guest(wanted.clone())).contains("already"));
        drop(mapping);
        assert_eq!(rig.dom0.domains().unwrap().len(), 1);
        assert_eq!((rig.dom0.counters().maps, rig.dom0.counters().unmaps), (2, 2));

        // Another domain under the old id is another domain.
        let next = rig.dom0.create_guest(wanted).unwrap();
        rig.dom0.copy(dead, &local, &mut ops).unwrap();
        assert_eq!(ops[0].status, GrantStatus::GeneralError);
        let shared = next.share(DOM0, 1, GrantAccess::ReadWrite).unwrap();
        shared.memory.copy_in(0, b"new");
        ops[0].gref = shared.refs[0];
        rig.dom0.copy(dead, &local, &mut ops).unwrap();
        local.copy_out(0, &mut seen);
        assert_eq!((ops[0].status, &seen[..3]), (GrantStatus::Okay, &b"new"[..]));
    });
}

#[test]
fn a_guest_dies_with_its_seat() {
    everywhere(|rig| {
        let guest = rig.guest();
        let front = guest.alloc_unbound(DOM0).unwrap();
        let back = rig.dom0.bind(guest.domid(), front.port()).unwrap();
        assert_eq!(rig.dom0.domains().unwrap().len(), 2);
        drop(guest);
        assert_eq!(rig.dom0.domains().unwrap().len(), 1, "although a channel of it is still about");
        front.notify().unwrap();
        drop((front, back));
        assert_eq!(rig.dom0.domains().unwrap()[0].ports, 0);
    });
}

#[test]
fn a_driver_domain_dies_with_its_last_seat_and_gives_everything_back() {
    everywhere(|rig| {
        let guest = rig.guest();
        let driver = rig.driver(9).unwrap();
        let shared = guest.share(DomId(9), 3, GrantAccess::ReadWrite).unwrap();
        let front = guest.alloc_unbound(DomId(9)).unwrap();
        let mapping = driver.map(guest.domid(), &shared.refs, GrantAccess::ReadWrite).unwrap();
        let back = driver.bind(guest.domid(), front.port()).unwrap();
        drop(driver);
        assert_eq!(rig.dom0.domains().unwrap().len(), 3, "its mapping and its port keep the seat");
        drop((mapping, back));
        crate::rig::eventually("the driver domain's death", || rig.dom0.domains().unwrap().len() == 2);
        // A new one binds where the old one left off.
        let driver = rig.driver(9).unwrap();
        driver.bind(guest.domid(), front.port()).unwrap();

        let mapping = driver.map(guest.domid(), &shared.refs, GrantAccess::ReadWrite).unwrap();
        rig.dom0.destroy(DomId(9)).unwrap();
        guest.unshare(shared).unwrap();
        drop(mapping);
        assert!(reason(rig.dom0.destroy(DOM0)).contains("cannot be destroyed"));
    });
}

#[test]
fn many_domains_come_and_go() {
    everywhere(|rig| {
        let local = Mapping::anonymous(PAGE_SIZE).unwrap();
        for _ in 0..5 {
            let guests: Vec<_> = (0..40).map(|_| rig.guest()).collect();
            let shared: Vec<_> =
                guests.iter().map(|guest| guest.share(DOM0, 2, GrantAccess::ReadWrite).unwrap()).collect();
            for (guest, shared) in guests.iter().zip(&shared) {
                shared.memory.write_record(0, &guest.domid().0.to_le_bytes());
            }
            let mapped: Vec<_> = guests
                .iter()
                .zip(&shared)
                .map(|(guest, shared)| rig.dom0.map(guest.domid(), &shared.refs, GrantAccess::ReadOnly).unwrap())
                .collect();
            // More peers than a thread remembers, in turn.
            for (at, guest) in guests.iter().enumerate().chain(guests.iter().enumerate()) {
                let mut ops = [op(shared[at].refs[0], CopyDirection::FromGuest)];
                rig.dom0.copy(guest.domid(), &local, &mut ops).unwrap();
                let (mut copied, mut seen) = ([0; 2], [0; 2]);
                local.read_once(0, &mut copied);
                mapped[at].read_once(0, &mut seen);
                assert_eq!((ops[0].status, copied, seen), (GrantStatus::Okay, guest.domid().0.to_le_bytes(), copied));
            }
        }
        assert_eq!(rig.dom0.domains().unwrap().len(), 1);
        assert_eq!(rig.dom0.counters().copies, 400);
        assert_eq!(rig.guest().domid(), DomId(201), "ids are not used again soon");
    });
}
