//! Descriptors and mappings are given back, by members and by the machine. Alone in its process, because it counts
//! what the process has open.
#![allow(clippy::unwrap_used)]

use hypervisor::emu::{GuestOptions, Limits, Machine, Member};
use hypervisor::memory::Mapping;
use hypervisor::{Backend, CopyDirection, CopyOp, DomId, GrantAccess, GrantStatus, Guest, PAGE_SIZE};

const DOM0: DomId = DomId::DOM0;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Mappings of the machine's files.
fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().filter(|line| line.contains("memfd:xen-")).count()
}

/// A guest's whole life: devices come and go, some things are forgotten.
fn life(dom0: &Member, local: &Mapping) {
    let guest = dom0.create_guest(GuestOptions { memory_pages: 64, ..GuestOptions::default() }).unwrap();
    let (store, ours) = (guest.store().unwrap(), dom0.store().unwrap());
    let shared = guest.share(DOM0, 4, GrantAccess::ReadWrite).unwrap();
    let scattered = [shared.refs[3], shared.refs[0]];
    for _ in 0..3 {
        let whole = dom0.map(guest.domid(), &shared.refs, GrantAccess::ReadOnly).unwrap();
        let parts = dom0.map(guest.domid(), &scattered, GrantAccess::ReadWrite).unwrap();
        let front = guest.alloc_unbound(DOM0).unwrap();
        let back = dom0.bind(guest.domid(), front.port()).unwrap();
        let (direction, status) = (CopyDirection::FromGuest, GrantStatus::Okay);
        let mut ops = [CopyOp { gref: shared.refs[1], offset: 0, len: 4096, direction, local: 0, status }];
        dom0.copy(guest.domid(), local, &mut ops).unwrap();
        assert!(dom0.map(guest.domid(), &[hypervisor::GrantRef(3)], GrantAccess::ReadOnly).is_err());
        assert!(dom0.bind(guest.domid(), front.port()).is_err());
        drop((whole, parts, front, back));
    }
    let last = dom0.map(guest.domid(), &scattered, GrantAccess::ReadWrite).unwrap();
    drop((guest, last, store, ours));
}

#[test]
fn nothing_leaks() {
    let dir = tempfile::tempdir().unwrap();
    let running = Machine::start(dir.path(), Limits::default()).unwrap();
    let local = Mapping::anonymous(PAGE_SIZE).unwrap();
    for dom0 in [Member::join(dir.path(), DOM0).unwrap(), Member::local(running.machine(), DOM0).unwrap()] {
        // The first lives fill caches and thread pools.
        for _ in 0..3 {
            life(&dom0, &local);
        }
        let before = (settled(descriptors), settled(mappings));
        for _ in 0..200 {
            life(&dom0, &local);
        }
        let after = (settled(descriptors), settled(mappings));
        assert!(after.0 <= before.0 && after.1 <= before.1, "{before:?} became {after:?}");
    }
    drop(running);
}

/// A broker's connection or a store's closes a moment after its other end did: waits until the number rests.
fn settled(count: fn() -> usize) -> usize {
    let mut last = count();
    let mut rests = 0;
    while rests < 20 {
        std::thread::sleep(std::time::Duration::from_millis(10));
        let now = count();
        rests = if now == last { rests + 1 } else { 0 };
        last = now;
    }
    last
}
