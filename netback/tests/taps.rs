//! netback with real taps, in a network namespace of the test's own: what only the kernel can do.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use common::frames::{TCP, pseudo4, sum, tcp4};
use common::taps::PairTaps;
use common::{Dom0, PATIENCE, Vif, until};
use hypervisor::Guest;
use netback::abi::GsoType;
use netback::device::Config;
use netback::front::{Checksum, Frontend, Meta, Options};
use nix::sched::{CloneFlags, setns, unshare};
use xenstore_client::Store;
use xenstore_client::xenbus::{State, toolstack};

/// Runs `ip` in the calling thread's namespace.
fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A namespace with netback in it. The calling thread joins it, so that `ip` works there; it must be the test's own.
fn dom0() -> Option<Dom0> {
    if !std::path::Path::new("/dev/net/tun").exists() || Command::new("ip").arg("-V").output().is_err() {
        eprintln!("NOT TESTED: real taps: no /dev/net/tun, or no ip");
        return None;
    }
    let user = if nix::unistd::geteuid().is_root() { CloneFlags::empty() } else { CloneFlags::CLONE_NEWUSER };
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET | user) {
        eprintln!("NOT TESTED: real taps: no network namespace: {error}");
        return None;
    }
    let namespace = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
    let (done, joined) = mpsc::channel();
    let config = Config { queues: 2, ..Config::default() };
    let dom0 = Dom0::with(config, PairTaps::default(), move |serve| {
        // A thread of a process in another user namespace inherits the namespace of who made it; this one has to ask.
        done.send(setns(&namespace, CloneFlags::CLONE_NEWNET)).unwrap();
        serve();
    });
    joined.recv_timeout(PATIENCE).unwrap().unwrap();
    Some(dom0)
}

/// Runs a test on a thread of its own, whose namespace ends with it.
fn alone(test: fn()) {
    if let Err(panic) = std::thread::spawn(test).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Attaches as libxl does: the hotplug program runs when the backend is in state 2 and the tap is there.
fn connected(dom0: &Dom0, options: &Options, hotplug: impl Fn(&str)) -> Vif {
    let guest = dom0.guest("guest");
    dom0.attach(&guest, 0, &[("hotplug-status", "")]);
    let domid = Guest::domid(&*guest);
    let path = format!("/local/domain/0/backend/vif/{domid}/0");
    toolstack::wait_state(&dom0.store, &format!("{path}/state"), &[State::InitWait], PATIENCE).unwrap();
    let tap = format!("vif{domid}.0");
    let said = ip(&format!("-o link show {tap}"));
    assert!(said.contains("fe:ff:ff:ff:ff:ff") && said.contains("state DOWN"), "{said}");
    hotplug(&tap);
    dom0.store.write(&format!("{path}/hotplug-status"), "connected").unwrap();
    let vif = dom0.connect(&guest, 0, options);
    // Pages were posted with the connection: the carrier follows.
    until("the carrier", || ip("-o link").lines().any(|line| line.contains("LOWER_UP") && !line.contains("lo:")));
    vif
}

fn plug(tap: &str) {
    ip(&format!("link set {tap} master br0"));
    ip(&format!("link set {tap} up"));
}

fn carrier(tap: &str) -> bool {
    ip(&format!("-o link show {tap}")).contains("LOWER_UP")
}

#[test]
fn two_guests_on_a_bridge() {
    alone(|| {
        let Some(dom0) = dom0() else { return };
        ip("link add br0 type bridge");
        ip("link set br0 up");
        let mut sender = connected(&dom0, &Options::default(), plug);
        let plain = Options { gso_v4: false, gso_v6: false, csum_v4: false, csum_v6: false, ..Options::default() };
        for (options, copes) in
            [(Options::default(), true), (Options { queues: 2, ..Options::default() }, true), (plain, false)]
        {
            let mut receiver = connected(&dom0, &options, plug);
            // Unknown to the bridge, so it goes everywhere; sent again and again, because ports may take a moment.
            let frame = tcp4(30_000);
            let meta = Meta { checksum: Checksum::Blank, gso: Some((GsoType::TcpV4, 1448)), ..Meta::default() };
            let (mut data, mut got) = (Vec::new(), Vec::new());
            until("the frame", || {
                let queue = &mut sender.queues[0];
                queue.pump().unwrap();
                queue.tx.send_bytes(&[&frame], &meta);
                queue.publish().unwrap();
                for queue in &mut receiver.queues {
                    queue.wait(None, Duration::from_millis(20)).unwrap();
                    while let Some(meta) = queue.rx.receive_bytes(&mut got).unwrap() {
                        // The kernel speaks on bridges too.
                        if got.get(..14) != Some(&frame[..14]) {
                            continue;
                        }
                        if copes {
                            assert_eq!((meta.gso, meta.checksum), (Some((GsoType::TcpV4, 1448)), Checksum::Blank));
                            assert!(got == frame, "the frame was changed on its way");
                        } else {
                            let segment = &got[34..];
                            let whole = sum(&[&pseudo4(TCP, segment.len()).to_be_bytes(), segment]);
                            assert_eq!((meta.gso, whole), (None, 0xffff), "cut and summed by the kernel");
                        }
                        data.extend_from_slice(&got[54..]);
                    }
                    queue.pump().unwrap();
                }
                data.len() >= 30_000
            });
            assert!(data[..30_000] == frame[54..]);
            let guest = receiver.guest.clone();
            receiver.close();
            dom0.detach(&guest, 0);
        }
        let guest = sender.guest.clone();
        sender.close();
        dom0.detach(&guest, 0);
    });
}

#[test]
fn the_tap_outlives_its_frontends_and_may_be_renamed() {
    alone(|| {
        let Some(dom0) = dom0() else { return };
        let rename = |tap: &str| {
            ip(&format!("link set {tap} name front-door"));
            ip("link set front-door up");
        };
        let vif = connected(&dom0, &Options::default(), rename);
        let guest = vif.guest.clone();
        vif.close();
        assert!(!carrier("front-door"), "a carrier without a frontend");
        // More queues than the first time, of an interface with another name.
        let front = Frontend::connect(guest.clone(), 0, &Options { queues: 2, ..Options::default() }).unwrap();
        until("the carrier", || carrier("front-door"));
        front.close(Vec::new(), None).unwrap();
        dom0.detach(&guest, 0);
        // The device lets go of it once it is closed, which is all the toolstack waits for.
        until("the tap goes", || !ip("-o link").contains("front-door"));
    });
}

/// As Linux' backend does: longer packets would not come through, and who sends them should know.
#[test]
fn without_scatter_gather_the_mtu_is_that_of_ethernet() {
    alone(|| {
        let Some(dom0) = dom0() else { return };
        for (sg, mtu) in [(true, "mtu 9000 "), (false, "mtu 1500 ")] {
            let vif = connected(&dom0, &Options { sg, ..Options::default() }, |tap| {
                ip(&format!("link set {tap} mtu 9000 up"));
            });
            let guest = vif.guest.clone();
            let link = ip(&format!("-o link show {}", vif.name));
            assert!(link.contains(mtu), "{link}");
            vif.close();
            dom0.detach(&guest, 0);
        }
    });
}

#[test]
fn a_tap_that_is_deleted_closes_its_vif() {
    alone(|| {
        let Some(dom0) = dom0() else { return };
        let vif = connected(&dom0, &Options::default(), |tap| {
            ip(&format!("link set {tap} up"));
        });
        ip(&format!("link delete vif{}.0", Guest::domid(&*vif.guest)));
        let path = vif.front.backend_path().to_owned();
        toolstack::wait_state(&dom0.store, &format!("{path}/state"), &[State::Closing, State::Closed], PATIENCE)
            .unwrap();
        let error = dom0.store.read_str(&format!("{path}/error")).unwrap();
        assert!(error.contains("tap"), "{error}");
        let guest = vif.guest.clone();
        vif.close();
        dom0.detach(&guest, 0);
        assert_eq!(dom0.machine.domains().iter().map(|domain| domain.mapped).sum::<u32>(), 0, "pages still mapped");
    });
}

#[test]
fn a_name_that_is_taken_is_said_so() {
    alone(|| {
        let Some(dom0) = dom0() else { return };
        let guest = dom0.guest("guest");
        let domid = Guest::domid(&*guest);
        ip(&format!("tuntap add vif{domid}.0 mode tap"));
        dom0.attach(&guest, 0, &[]);
        let node = format!("/local/domain/0/backend/vif/{domid}/0/error");
        until("the error", || dom0.store.read_opt(&node).unwrap().is_some());
        let error = dom0.store.read_str(&node).unwrap();
        assert!(error.contains(&format!("TUNSETIFF of vif{domid}.0")) && error.contains("already"), "{error}");
    });
}
