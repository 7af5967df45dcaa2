//! Event channels: who may bind, what a close leaves, and what arrives.

use hypervisor::{Backend, DomId, Error, Guest, Port};

use crate::rig::{LIMITS, everywhere, readable, reason};

const DOM0: DomId = DomId::DOM0;

#[test]
fn events_travel_both_ways_and_wait_for_the_write_back() {
    everywhere(|rig| {
        let guest = rig.guest();
        let front = guest.alloc_unbound(DOM0).unwrap();
        let back = rig.dom0.bind(guest.domid(), front.port()).unwrap();
        assert!(readable(back.fd()) && back.take().unwrap(), "a port that was just bound is pending");
        back.unmask().unwrap();
        assert!(!readable(back.fd()) && !readable(front.fd()));

        front.notify().unwrap();
        front.notify().unwrap();
        assert!(readable(back.fd()) && !readable(front.fd()));
        assert!(back.take().unwrap());
        assert!(!back.take().unwrap(), "two events on a pending port are one");
        front.notify().unwrap();
        assert!(!readable(back.fd()) && !back.take().unwrap(), "masked until written back");
        back.unmask().unwrap();
        assert!(readable(back.fd()) && back.take().unwrap());
        back.unmask().unwrap();
        back.unmask().unwrap();
        assert!(!readable(back.fd()));

        back.notify().unwrap();
        assert!(readable(front.fd()) && front.take().unwrap());
        front.unmask().unwrap();
        let sent = rig.dom0.counters_between(guest.domid(), DOM0);
        assert_eq!((sent.notifications, sent.notifications_suppressed), (1, 2));
        assert_eq!(rig.dom0.counters_between(DOM0, guest.domid()).notifications, 1);
    });
}

#[test]
fn every_bad_bind_is_refused() {
    everywhere(|rig| {
        let (guest, driver) = (rig.guest(), rig.driver(9).unwrap());
        let front = guest.alloc_unbound(DOM0).unwrap();
        let port = front.port();
        let _bound = rig.dom0.bind(guest.domid(), port).unwrap();
        let for_driver = guest.alloc_unbound(DomId(9)).unwrap();
        let for_later = guest.alloc_unbound(DomId(4000)).unwrap();
        for (peer, port, why) in [
            (guest.domid(), port, "bound already"),
            (guest.domid(), for_driver.port(), "offered to domain 9"),
            (guest.domid(), for_later.port(), "offered to domain 4000"),
            (guest.domid(), Port(0), "no such port"),
            (guest.domid(), Port(4), "no such port"),
            (guest.domid(), Port(u32::MAX), "no such port"),
            (DomId(555), port, "no such domain"),
            (DomId(0xffff), port, "no such domain"),
            (DOM0, Port(3), "no such port"),
        ] {
            let said = rig.dom0.bind(peer, port).unwrap_err();
            let Error::Port { operation: "bind", domain, port: named, reason } = &said else { panic!("{said}") };
            assert_eq!((*domain, *named), (peer, port));
            assert!(reason.contains(why), "{said}");
        }
        assert!(reason(driver.bind(guest.domid(), port)).contains("bound already"));
        assert!(reason(guest.bind(guest.domid(), for_driver.port())).contains("offered to domain 9"));
        assert!(reason(guest.alloc_unbound(DomId(0x7ff0))).contains("no such domain id"));
        driver.bind(guest.domid(), for_driver.port()).unwrap();
        // Only those that hit a living domain are attributed to it.
        assert_eq!(rig.dom0.counters_between(DOM0, guest.domid()).refused_ports, 6);
        assert_eq!(rig.dom0.counters().refused_ports, 12);
    });
}

#[test]
fn a_port_can_be_bound_again_after_its_peer_closed() {
    everywhere(|rig| {
        let guest = rig.guest();
        let front = guest.alloc_unbound(DOM0).unwrap();
        front.notify().unwrap();
        for _ in 0..50 {
            let back = rig.dom0.bind(guest.domid(), front.port()).unwrap();
            assert!(back.take().unwrap(), "always starts pending");
            back.unmask().unwrap();
            front.notify().unwrap();
            assert!(back.take().unwrap());
            // Closed while masked, with another event waiting.
            front.notify().unwrap();
            back.notify().unwrap();
            drop(back);
            assert!(front.take().unwrap());
            front.unmask().unwrap();
            front.notify().unwrap();
        }
        assert_eq!(rig.dom0.counters_between(guest.domid(), DOM0).notifications_dropped, 51);
        assert!(!readable(front.fd()));
    });
}

#[test]
fn a_frontend_that_closes_leaves_the_backend_an_unbound_port() {
    everywhere(|rig| {
        let guest = rig.guest();
        let front = guest.alloc_unbound(DOM0).unwrap();
        let back = rig.dom0.bind(guest.domid(), front.port()).unwrap();
        drop(front);
        back.notify().unwrap();
        assert_eq!(rig.dom0.counters_between(DOM0, guest.domid()).notifications_dropped, 1);
        // As on Xen it is now reserved for the guest.
        let other = rig.guest();
        assert!(reason(other.bind(DOM0, back.port())).contains("offered to domain 1"));
        let again = guest.bind(DOM0, back.port()).unwrap();
        back.notify().unwrap();
        assert!(again.take().unwrap());
        assert_eq!(rig.dom0.domains().unwrap()[1].ports, 1);
        drop((back, again));
        assert!(rig.dom0.domains().unwrap().iter().all(|domain| domain.ports == 0));
    });
}

#[test]
fn ports_are_few_and_used_again_from_the_lowest() {
    everywhere(|rig| {
        let guest = rig.guest();
        let mut ports: Vec<_> = (1..LIMITS.ports).map(|_| guest.alloc_unbound(DOM0).unwrap()).collect();
        assert!(ports.iter().zip(1..).all(|(channel, port)| channel.port() == Port(port)));
        assert!(reason(guest.alloc_unbound(DOM0)).contains("all our ports are in use"));
        let free = ports.remove(4).port();
        assert_eq!(guest.alloc_unbound(DOM0).unwrap().port(), free);
    });
}

#[test]
fn a_domain_may_talk_to_itself() {
    everywhere(|rig| {
        let guest = rig.guest();
        let one = guest.alloc_unbound(guest.domid()).unwrap();
        let two = guest.bind(guest.domid(), one.port()).unwrap();
        one.notify().unwrap();
        two.notify().unwrap();
        assert!(one.take().unwrap() && two.take().unwrap());
        drop(one);
        two.notify().unwrap();
        drop(two);
        assert_eq!(rig.dom0.domains().unwrap()[1].ports, 0);
    });
}
