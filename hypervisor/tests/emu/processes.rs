//! Several processes on one machine. The children are this test program again, told by an environment variable which
//! part to play.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use hypervisor::emu::{GuestOptions, GuestSeat};
use hypervisor::memory::Mapping;
use hypervisor::{
    Backend, CopyDirection, CopyOp, DomId, GrantAccess, GrantRef, GrantStatus, Guest, Machine, PAGE_SIZE, Port,
};

use crate::rig::{Rig, eventually, op, wait};

const DOM0: DomId = DomId::DOM0;
const ROUNDS: u32 = 20_000;

struct Actor {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Actor {
    fn start(rig: &Rig, role: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "processes::an_actor", "--nocapture"])
            .env("EMU_ACTOR", format!("{role}:{}", rig.dir().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, to, from }
    }

    /// The next line it prints for us, as numbers. The test harness prints lines of its own.
    fn hear(&mut self) -> Vec<u32> {
        for line in self.from.by_ref().lines() {
            if let Some((_, numbers)) = line.unwrap().split_once("actor:") {
                return numbers.split_whitespace().map(|number| number.parse().unwrap()).collect();
            }
        }
        panic!("the actor ended");
    }

    fn tell(&mut self, numbers: &[u32]) {
        let words: Vec<_> = numbers.iter().map(u32::to_string).collect();
        writeln!(self.to, "{}", words.join(" ")).unwrap();
    }

    fn end(mut self) {
        drop(self.to);
        assert!(self.child.wait().unwrap().success());
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn say(numbers: &[u32]) {
    let words: Vec<_> = numbers.iter().map(u32::to_string).collect();
    println!("actor: {}", words.join(" "));
}

fn hear() -> Option<Vec<u32>> {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    (!line.is_empty()).then(|| line.split_whitespace().map(|number| number.parse().unwrap()).collect())
}

/// Not a test: what the children do. Alone it does nothing.
#[test]
fn an_actor() {
    let Ok(part) = std::env::var("EMU_ACTOR") else { return };
    let (role, dir) = part.split_once(':').unwrap();
    match role {
        "guest" => guest(dir),
        "backend" => backend(dir),
        other => panic!("{other}"),
    }
}

/// Shares two pages and a port, then answers each event by adding one to the number in its page.
fn guest(dir: &str) {
    let guest = GuestSeat::join(dir, GuestOptions { name: "child".to_owned(), ..GuestOptions::default() }).unwrap();
    let shared = guest.share(DOM0, 2, GrantAccess::ReadWrite).unwrap();
    let channel = guest.alloc_unbound(DOM0).unwrap();
    say(&[guest.domid().0.into(), shared.refs[0].0, shared.refs[1].0, channel.port().0]);
    for _ in 0..ROUNDS {
        while !channel.take().unwrap() {
            assert!(wait(channel.fd(), 60), "lost an event");
        }
        let mut number = [0; 4];
        shared.memory.read_once(0, &mut number);
        shared.memory.write_record(0, &(u32::from_le_bytes(number) + 1).to_le_bytes());
        channel.unmask().unwrap();
        channel.notify().unwrap();
    }
    assert!(hear().is_none());
}

/// Maps what it is told and binds to the port, and says so.
fn backend(dir: &str) {
    let member = format!("emu:{dir}").parse::<Machine>().unwrap().join_backend(DOM0).unwrap();
    let told = hear().unwrap();
    let [domid, port, ref refs @ ..] = told[..] else { panic!("{told:?}") };
    let peer = DomId(u16::try_from(domid).unwrap());
    let refs: Vec<_> = refs.iter().copied().map(GrantRef).collect();
    let mapping = member.map(peer, &refs, GrantAccess::ReadWrite).unwrap();
    let channel = member.bind(peer, Port(port)).unwrap();
    mapping.write_record(0, b"mapped");
    channel.notify().unwrap();
    say(&[channel.port().0]);
    assert!(hear().is_none());
}

#[test]
fn a_guest_in_another_process_is_mapped_copied_and_kicked() {
    let rig = Rig::served();
    let mut actor = Actor::start(&rig, "guest");
    let said = actor.hear();
    let (peer, refs, port) = (DomId(said[0] as u16), [GrantRef(said[1]), GrantRef(said[2])], Port(said[3]));
    let mapping = rig.dom0.map(peer, &refs, GrantAccess::ReadWrite).unwrap();
    let channel = rig.dom0.bind(peer, port).unwrap();
    assert!(channel.take().unwrap());
    channel.unmask().unwrap();
    let local = Mapping::anonymous(PAGE_SIZE).unwrap();
    for round in 0..ROUNDS {
        channel.notify().unwrap();
        while !channel.take().unwrap() {
            assert!(wait(channel.fd(), 60), "lost an event");
        }
        channel.unmask().unwrap();
        // By map and by copy, in turn.
        let mut number = [0; 4];
        if round % 2 == 0 {
            mapping.read_once(0, &mut number);
        } else {
            let mut ops = [CopyOp { len: 4, ..op(refs[0], CopyDirection::FromGuest) }];
            rig.dom0.copy(peer, &local, &mut ops).unwrap();
            assert_eq!(ops[0].status, GrantStatus::Okay);
            local.copy_out(0, &mut number);
        }
        assert_eq!(u32::from_le_bytes(number), round + 1);
    }
    let counters = rig.dom0.counters();
    assert_eq!((counters.maps, counters.copies), (2, u64::from(ROUNDS / 2)));
    // The other process counts its event after it was sent.
    eventually("the last count", || {
        let counters = rig.dom0.counters();
        counters.notifications + counters.notifications_suppressed == 2 * u64::from(ROUNDS)
    });
    actor.end();
    eventually("the guest's death", || {
        rig.dom0.domains().unwrap().iter().all(|domain| domain.domid != peer || domain.zombie)
    });
    drop(mapping);
    assert_eq!(rig.dom0.domains().unwrap().len(), 1);
}

#[test]
fn a_guest_that_is_killed_leaves_a_zombie_until_it_is_unmapped() {
    let rig = Rig::served();
    let mut actor = Actor::start(&rig, "guest");
    let said = actor.hear();
    let (peer, gref) = (DomId(said[0] as u16), GrantRef(said[1]));
    let mapping = rig.dom0.map(peer, &[gref], GrantAccess::ReadWrite).unwrap();
    actor.kill();
    eventually("the guest's death", || rig.dom0.domains().unwrap().iter().any(|domain| domain.zombie));
    mapping.copy_in(0, &[1; PAGE_SIZE]);
    let local = Mapping::anonymous(PAGE_SIZE).unwrap();
    let mut ops = [op(gref, CopyDirection::FromGuest)];
    rig.dom0.copy(peer, &local, &mut ops).unwrap();
    assert_eq!(ops[0].status, GrantStatus::BadDomain);
    drop(mapping);
    assert_eq!(rig.dom0.domains().unwrap().len(), 1);
}

#[test]
fn a_backend_that_is_killed_gives_back_its_maps_and_ports() {
    let rig = Rig::served();
    let guest = rig.guest();
    let shared = guest.share(DOM0, 3, GrantAccess::ReadWrite).unwrap();
    let channel = guest.alloc_unbound(DOM0).unwrap();
    let told: Vec<u32> =
        [guest.domid().0.into(), channel.port().0].into_iter().chain(shared.refs.iter().map(|gref| gref.0)).collect();
    let mut shared = shared;
    // Killed, killed again, and at last one that ends in peace.
    for round in 0..3 {
        let mut actor = Actor::start(&rig, "backend");
        actor.tell(&told);
        actor.hear();
        assert!(channel.take().unwrap());
        channel.unmask().unwrap();
        let mut seen = [0; 6];
        shared.memory.copy_out(0, &mut seen);
        assert_eq!(&seen, b"mapped");
        let (still_shared, error) = guest.unshare(shared).unwrap_err();
        assert!(error.to_string().contains("still mapped"), "{error}");
        shared = still_shared;
        if round < 2 {
            actor.kill();
        } else {
            actor.end();
        }
        eventually("the backend's end", || rig.dom0.domains().unwrap()[0].maps_held == 0);
        assert_eq!(rig.dom0.domains().unwrap()[0].ports, 0);
    }
    guest.unshare(shared).unwrap();
    channel.notify().unwrap();
    let counters = rig.dom0.counters();
    assert_eq!((counters.maps, counters.unmaps, counters.notifications_dropped), (9, 9, 1));
}
