//! Guests come, attach, detach, and die; what blkback and the machine hold afterwards is what they held before.
//!
//! `LEAK_CYCLES` says how many (`tests/run leaks [N]`; 1000 there, fewer here). One guest in ten is killed midway.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkback::abi::{Protocol, op};
use blkback::front::{Frontend, Options, Piece};
use blkback::image::Image;
use blkback::spec::{Access, DiskSpec};
use blkback::toolstack;
use blkback::vdev::Vdev;
use hypervisor::emu::{GuestOptions, GuestSeat, Member};
use hypervisor::{Backend, DomId, Guest};
use nix::sys::signal::Signal;
use system_tests::{Dom0, PATIENCE, at_rest, quick};
use xenstore_client::xenbus::toolstack as xenbus;
use xenstore_client::{Client, Store};

/// What a process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Holds {
    descriptors: usize,
    threads: usize,
    guest_memory: usize,
}

fn count(path: impl AsRef<Path>) -> usize {
    std::fs::read_dir(path).unwrap().count()
}

fn holds(pid: u32) -> Holds {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    Holds {
        descriptors: count(format!("/proc/{pid}/fd")),
        threads: count(format!("/proc/{pid}/task")),
        guest_memory: maps.lines().filter(|line| line.contains("memfd:xen-")).count(),
    }
}

/// KiB of memory that are resident.
fn resident(pid: u32) -> i64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Every node of the store but the guests' own names.
fn nodes(store: &Client, path: &str, found: &mut Vec<String>) {
    for child in store.directory_opt(path).unwrap().unwrap_or_default() {
        let child = format!("{}/{child}", path.trim_end_matches('/'));
        nodes(store, &child, found);
        found.push(child);
    }
}

/// Waits until `look` gives what was seen before, and returns what it gives.
fn becomes<T: PartialEq>(wanted: &T, look: impl Fn() -> T) -> T {
    let began = Instant::now();
    loop {
        let seen = look();
        if *wanted == seen || began.elapsed() > PATIENCE {
            return seen;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

struct Scene {
    dom0: Dom0,
    xen: Member,
    store: Client,
    image: std::path::PathBuf,
}

impl Scene {
    fn spec(&self) -> DiskSpec {
        format!("{},raw,xvda,w", self.image.display()).parse().unwrap()
    }

    /// A guest that lives and detaches in order.
    fn orderly(&self, number: usize) {
        let options = GuestOptions { name: format!("orderly{number}"), ..GuestOptions::default() };
        let guest = Arc::new(GuestSeat::join(self.dom0.dir(), options).unwrap());
        let domid = Guest::domid(&*guest);
        toolstack::attach(&self.store, DomId::DOM0, domid, &self.spec(), Duration::ZERO).unwrap();
        let options = Options {
            queues: 1 + number as u32 % 2,
            ring_order: number as u32 % 3,
            persistent: number.is_multiple_of(2),
            protocol: if number.is_multiple_of(5) { Protocol::X86_32 } else { Protocol::X86_64 },
            pool_pages: 64,
            ..Options::default()
        };
        let mut front = Frontend::connect(Arc::<GuestSeat>::clone(&guest), 51712, &options).unwrap();
        let mut queues = front.take_queues();
        for queue in &mut queues {
            let pieces: Vec<_> = (0..11).map(|page| Piece { page, first: 0, last: 7 }).collect();
            for (tag, operation) in [(1, op::WRITE), (2, op::READ), (3, op::FLUSH_DISKCACHE)] {
                let pieces = if operation == op::FLUSH_DISKCACHE { &[][..] } else { &pieces };
                queue.submit(operation, 0, pieces, tag);
            }
            queue.publish().unwrap();
            let mut answers = 0;
            while answers < 3 {
                while let Some(outcome) = queue.outcome().unwrap() {
                    assert_eq!(outcome.status, 0);
                    answers += 1;
                }
                if answers < 3 {
                    queue.wait(None, PATIENCE).unwrap();
                }
            }
        }
        if number.is_multiple_of(3) {
            // The toolstack asks while the guest uses it.
            let (store, vdev) = (self.xen.store().unwrap(), Vdev::parse("xvda").unwrap());
            std::thread::scope(|scope| {
                let detach = scope.spawn(move || toolstack::detach(&store, DomId::DOM0, domid, vdev, false));
                let state = format!("{}/state", front.backend_path());
                xenbus::wait_state(&self.store, &state, &[xenstore_client::xenbus::State::Closing], PATIENCE).unwrap();
                front.close(queues).unwrap();
                detach.join().unwrap().unwrap();
            });
        } else {
            front.close(queues).unwrap();
            toolstack::detach(&self.store, DomId::DOM0, domid, Vdev::parse("xvda").unwrap(), false).unwrap();
        }
        // The domain lives until here.
        drop(guest);
    }

    /// A guest that is killed somewhere between its start and its last request.
    fn killed(&self, number: usize) {
        let name = format!("killed{number}");
        let mut guest = self.dom0.guest(&name, &["--queues", if number.is_multiple_of(20) { "2" } else { "1" }]);
        let domid = DomId(guest.domid.parse().unwrap());
        let after = Duration::from_micros((number as u64 * 7919) % 40_000);
        std::thread::scope(|scope| {
            let (store, spec) = (self.xen.store().unwrap(), self.spec());
            let attached = scope.spawn(move || {
                // It may die before, during or after this: all three are to be survived.
                toolstack::attach(&store, DomId::DOM0, domid, &spec, Duration::from_millis(20)).is_ok()
            });
            std::thread::sleep(after);
            guest.process.signal(Signal::SIGKILL);
            attached.join().unwrap();
        });
        // What xl does when a domain has died. The machine does the same, and one of the two is first.
        let state = format!("{}/backend/vbd/{domid}/51712/state", DomId::DOM0.home());
        let gone = || self.store.read_opt(&state).unwrap().is_none();
        let detach = || toolstack::detach(&self.store, DomId::DOM0, domid, Vdev::parse("xvda").unwrap(), true);
        if !gone()
            && let Err(error) = detach()
        {
            assert!(gone(), "{error}");
        }
        xenbus::destroy_domain(&self.store, domid, &[DomId::DOM0]).unwrap();
    }
}

#[test]
fn what_is_held_is_given_back() {
    let cycles: usize = match std::env::var("LEAK_CYCLES") {
        Ok(text) => text.parse().expect("LEAK_CYCLES is a number"),
        Err(_) if quick() => 60,
        Err(_) => 200,
    };
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 16 << 20);
    let xen = Member::join(dom0.dir(), DomId::DOM0).unwrap();
    let store = xen.store().unwrap();
    let scene = Scene { dom0, xen, store, image };
    let (blkback, machine) = (scene.dom0.blkback.pid(), scene.dom0.emu_xen.pid());
    let run = |from: usize, to: usize| {
        for number in from..to {
            if number % 10 == 9 { scene.killed(number) } else { scene.orderly(number) }
        }
        // A process that knew a domain lets go of its memory when it next deals with one: so the last one is the same.
        scene.orderly(1);
    };
    let all_nodes = || {
        let mut found = Vec::new();
        nodes(&scene.store, "/", &mut found);
        found
    };
    // The first lives fill caches, thread stacks and the allocator.
    run(0, 40);
    let look = || (holds(blkback), holds(machine), all_nodes());
    let before = at_rest(look);
    let memory = [blkback, machine].map(resident);
    let began = Instant::now();
    run(40, 40 + cycles);
    let after = becomes(&before, look);
    let grown: BTreeMap<_, _> = [("blkback", blkback), ("emu-xen", machine)]
        .iter()
        .zip(memory)
        .map(|((name, pid), before)| (*name, resident(*pid) - before))
        .collect();
    println!(
        "{cycles} guests, {} of them killed, in {:.0} s: blkback {:?}, emu-xen {:?}, {} nodes, memory {grown:?} KiB",
        cycles / 10,
        began.elapsed().as_secs_f32(),
        after.0,
        after.1,
        after.2.len()
    );
    // Not at once: a long list of nodes says less than the difference.
    let extra: Vec<_> = after.2.iter().filter(|node| !before.2.contains(node)).collect();
    assert!(extra.is_empty(), "left in XenStore: {extra:?}");
    assert_eq!(after, before);
    assert!(grown.values().all(|&kib| kib < 1024), "memory grew: {grown:?} KiB");
    Image::check(&scene.image, Access::Write).expect("no lock is left");
}
