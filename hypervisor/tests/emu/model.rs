//! Random histories of one guest and two backend domains, against a model that is simple enough to be right.

use hypervisor::emu::{GuestSeat, Member, READING, WRITING};
use hypervisor::memory::Mapping;
use hypervisor::{Backend, DomId, EventChannel, GrantAccess, GrantRef, GrantStatus, Guest, PAGE_SIZE};
use proptest::prelude::*;

use crate::rig::{Rig, op, readable};

use GrantAccess::{ReadOnly, ReadWrite};

#[derive(Debug, Clone)]
enum Step {
    Grant { to: usize, writable: bool, frame: u32 },
    Revoke { which: usize },
    Map { by: usize, which: Vec<usize>, writable: bool },
    Unmap { which: usize },
    Copy { by: usize, which: usize, into: bool },
    Alloc { to: usize },
    Bind { by: usize, which: usize },
    CloseFront { which: usize },
    CloseBack { which: usize },
    Kick { which: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let (who, index, flag) = (0..2usize, 0..64usize, any::<bool>());
    prop_oneof![
        3 => (who.clone(), flag, 0..70u32).prop_map(|(to, writable, frame)| Step::Grant { to, writable, frame }),
        2 => index.clone().prop_map(|which| Step::Revoke { which }),
        4 => (who.clone(), prop::collection::vec(index.clone(), 1..4), flag)
            .prop_map(|(by, which, writable)| Step::Map { by, which, writable }),
        3 => index.clone().prop_map(|which| Step::Unmap { which }),
        3 => (who.clone(), index.clone(), flag).prop_map(|(by, which, into)| Step::Copy { by, which, into }),
        2 => who.clone().prop_map(|to| Step::Alloc { to }),
        3 => (who, index.clone()).prop_map(|(by, which)| Step::Bind { by, which }),
        1 => index.clone().prop_map(|which| Step::CloseFront { which }),
        2 => index.clone().prop_map(|which| Step::CloseBack { which }),
        3 => index.prop_map(|which| Step::Kick { which }),
    ]
}

struct Grant {
    gref: GrantRef,
    to: usize,
    writable: bool,
    frame: u32,
    readers: u32,
    writers: u32,
}

struct Held {
    mapping: Mapping,
    of: Vec<GrantRef>,
    writable: bool,
}

struct Port {
    front: Box<dyn EventChannel>,
    to: usize,
    back: Option<Box<dyn EventChannel>>,
}

struct World {
    guest: GuestSeat,
    backends: [Member; 2],
    grants: Vec<Grant>,
    held: Vec<Held>,
    ports: Vec<Port>,
    local: Mapping,
}

/// One of them, if there are any.
fn pick<T>(all: &[T], which: usize) -> Option<usize> {
    (!all.is_empty()).then(|| which % all.len())
}

impl World {
    fn allowed(&self, grant: &Grant, by: usize, writable: bool) -> GrantStatus {
        if grant.to != by || (writable && !grant.writable) {
            GrantStatus::GeneralError
        } else if grant.frame >= 64 {
            GrantStatus::BadPage
        } else {
            GrantStatus::Okay
        }
    }

    fn run(&mut self, step: Step) {
        let peer = self.guest.domid();
        match step {
            Step::Grant { to, writable, frame } => {
                let access = if writable { ReadWrite } else { ReadOnly };
                let gref = self.guest.grant(frame, self.backends[to].domid(), access).unwrap();
                self.grants.push(Grant { gref, to, writable, frame, readers: 0, writers: 0 });
            }
            Step::Revoke { which } => {
                let Some(at) = pick(&self.grants, which) else { return };
                let busy = self.grants[at].readers + self.grants[at].writers > 0;
                assert_eq!(self.guest.revoke(self.grants[at].gref).is_err(), busy);
                if !busy {
                    self.grants.remove(at);
                }
            }
            Step::Map { by, which, writable } => self.map(by, &which, writable),
            Step::Unmap { which } => {
                let Some(at) = pick(&self.held, which) else { return };
                let held = self.held.swap_remove(at);
                for gref in held.of {
                    let grant = self.grants.iter_mut().find(|grant| grant.gref == gref).unwrap();
                    if held.writable { grant.writers -= 1 } else { grant.readers -= 1 }
                }
                drop(held.mapping);
            }
            Step::Copy { by, which, into } => {
                let Some(at) = pick(&self.grants, which) else { return };
                let expected = self.allowed(&self.grants[at], by, into);
                let direction =
                    if into { hypervisor::CopyDirection::ToGuest } else { hypervisor::CopyDirection::FromGuest };
                let mut ops = [op(self.grants[at].gref, direction)];
                self.backends[by].copy(peer, &self.local, &mut ops).unwrap();
                assert_eq!(ops[0].status, expected);
            }
            Step::Alloc { to } => {
                // The limit of ports is smaller than most histories.
                if let Ok(front) = self.guest.alloc_unbound(self.backends[to].domid()) {
                    self.ports.push(Port { front, to, back: None });
                } else {
                    assert_eq!(self.ports.len(), 15);
                }
            }
            Step::Bind { by, which } => {
                let Some(at) = pick(&self.ports, which) else { return };
                let port = &mut self.ports[at];
                let bound = self.backends[by].bind(peer, port.front.port());
                assert_eq!(bound.is_ok(), port.to == by && port.back.is_none());
                if let Ok(back) = bound {
                    assert!(back.take().unwrap());
                    back.unmask().unwrap();
                    port.back = Some(back);
                }
            }
            Step::CloseFront { which } => {
                if let Some(at) = pick(&self.ports, which) {
                    let Port { front, back, .. } = self.ports.swap_remove(at);
                    drop(front);
                    if let Some(back) = back {
                        back.notify().unwrap();
                    }
                }
            }
            Step::CloseBack { which } => {
                if let Some(at) = pick(&self.ports, which) {
                    self.ports[at].back = None;
                }
            }
            Step::Kick { which } => {
                let Some(at) = pick(&self.ports, which) else { return };
                let Port { front, back, .. } = &self.ports[at];
                front.notify().unwrap();
                if let Some(back) = back {
                    back.notify().unwrap();
                    assert!(readable(back.fd()) && back.take().unwrap());
                    back.unmask().unwrap();
                }
                assert_eq!(front.take().unwrap(), back.is_some());
                front.unmask().unwrap();
            }
        }
    }

    fn map(&mut self, by: usize, which: &[usize], writable: bool) {
        let Some(chosen) = which.iter().map(|&which| pick(&self.grants, which)).collect::<Option<Vec<_>>>() else {
            return;
        };
        let of: Vec<GrantRef> = chosen.iter().map(|&at| self.grants[at].gref).collect();
        let expected = chosen
            .iter()
            .map(|&at| self.allowed(&self.grants[at], by, writable))
            .find(|&status| status != GrantStatus::Okay)
            .unwrap_or(GrantStatus::Okay);
        let access = if writable { ReadWrite } else { ReadOnly };
        match self.backends[by].map(self.guest.domid(), &of, access) {
            Ok(mapping) => {
                assert_eq!(expected, GrantStatus::Okay);
                assert_eq!(mapping.len(), of.len() * PAGE_SIZE);
                for at in chosen {
                    if writable { self.grants[at].writers += 1 } else { self.grants[at].readers += 1 }
                }
                self.held.push(Held { mapping, of, writable });
            }
            Err(hypervisor::Error::Grant { status, .. }) => assert_eq!(status, expected),
            Err(other) => panic!("{other}"),
        }
    }

    /// What the machine shows is what the model says.
    fn check(&self) {
        for grant in &self.grants {
            let flags = self.guest.read_entry(grant.gref).unwrap().flags;
            assert_eq!(flags & READING != 0, grant.readers + grant.writers > 0);
            assert_eq!(flags & WRITING != 0, grant.writers > 0);
        }
        let domains = self.backends[0].domains().unwrap();
        let guest = domains.iter().find(|domain| domain.domid == self.guest.domid()).unwrap();
        let mapped: usize = self.held.iter().map(|held| held.of.len()).sum();
        let held: u32 = domains.iter().map(|domain| domain.maps_held).sum();
        let ports: u32 = domains.iter().map(|domain| domain.ports).sum();
        let bound = self.ports.iter().filter(|port| port.back.is_some()).count();
        assert_eq!((guest.mapped as usize, held), (mapped, mapped as u32));
        assert_eq!((guest.grants as usize, ports as usize), (self.grants.len(), self.ports.len() + bound));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn any_history_agrees_with_the_model(steps in prop::collection::vec(step(), 1..120)) {
        let rig = Rig::local();
        let backends = [rig.driver(0).unwrap(), rig.driver(9).unwrap()];
        let local = Mapping::anonymous(PAGE_SIZE).unwrap();
        let (grants, held, ports) = (Vec::new(), Vec::new(), Vec::new());
        let mut world = World { guest: rig.guest(), backends, grants, held, ports, local };
        for step in steps {
            world.run(step);
            world.check();
        }
        // Dead or alive, everything goes back.
        rig.dom0.destroy(world.guest.domid()).unwrap();
        drop(world);
        let left = rig.dom0.domains().unwrap();
        prop_assert!(left.len() == 1 && left[0].maps_held == 0 && left[0].ports == 0, "{:?}", left);
        let counters = rig.dom0.counters();
        prop_assert_eq!(counters.maps, counters.unmaps);
        prop_assert_eq!(rig.machine().domains()[0].domid, DomId::DOM0);
    }
}
