//! Names, MTUs and VLANs of interfaces over their lives: renamed by hand, named by `vifname=`, their backend killed, their
//! guest rebooted.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod processes;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hypervisor::Guest;
use hypervisor::emu::GuestSeat;
use hypervisor::memory::{IoList, Mapping};
use netback::front::{Frontend, Meta, Options, Queue};
use netback::tap::Tap;
use netback::vnet::Offload;
use processes::{Dom0, assert_nothing_left, ip, namespace, until};
use xenstore_client::Store as _;

/// Another port of the bridge, which hears what guests send to everybody.
struct Probe(Tap);

impl Probe {
    fn new() -> Self {
        let tap = Tap::create("probe").unwrap();
        tap.set_carrier(true).unwrap();
        ip("link set probe master xenbr0");
        ip("link set probe up");
        Self(tap)
    }

    /// The texts of ours that have come.
    fn heard(&self) -> Vec<String> {
        let memory = Rc::new(Mapping::anonymous(4096).unwrap());
        let mut list = IoList::with_capacity(1);
        list.push(&memory, 0, 4096);
        let mut texts = Vec::new();
        while let Ok(len) = self.0.read(&list) {
            let mut bytes = vec![0; len];
            memory.copy_out(0, &mut bytes);
            let payload = bytes.get(Offload::SIZE + 42..).unwrap_or_default();
            if payload.starts_with(b"text ") {
                texts.push(String::from_utf8_lossy(payload).trim_end_matches('\0').to_owned());
            }
        }
        texts
    }
}

/// A connected guest.
struct Web {
    seat: Arc<GuestSeat>,
    front: Frontend,
    queues: Vec<Queue>,
}

impl Web {
    fn connect(seat: &Arc<GuestSeat>, options: &Options) -> Self {
        let mut front = Frontend::connect(Arc::clone(seat) as Arc<dyn Guest>, 0, options).unwrap();
        let queues = front.take_queues();
        Self { seat: Arc::clone(seat), front, queues }
    }

    /// Sends a text to everybody, from this address.
    fn send(&mut self, from: [u8; 6], text: &str) {
        let ipv4 = [0x45, 0, 0, 60, 0, 0, 0, 0, 64, 17, 0x65, 0xae, 10, 0, 0, 5, 10, 0, 0, 255];
        let udp = [4, 0, 4, 0, 0, 40, 0, 0];
        let mut frame = [&[0xff; 6][..], &from, &[0x08, 0x00], &ipv4, &udp, text.as_bytes()].concat();
        frame.resize(74.max(frame.len()), 0);
        let queue = &mut self.queues[0];
        until("room to send", || {
            queue.pump().unwrap();
            queue.tx.send_bytes(&[&frame], &Meta::default())
        });
        queue.publish().unwrap();
    }

    /// What it sends is heard, unless it pretends to be somebody else.
    fn is_heard_and_filtered(&mut self, probe: &Probe, when: &str) {
        let mac = self.front.mac().unwrap();
        let (forged, honest) = (format!("text forged {when}"), format!("text honest {when}"));
        let mut heard = Vec::new();
        until(&format!("{when}: a frame of the guest"), || {
            // The first ones may be lost: the port may not forward yet.
            self.send([2, 0, 0, 0, 0, 0x66], &forged);
            self.send(mac, &honest);
            std::thread::sleep(Duration::from_millis(20));
            heard.extend(probe.heard());
            heard.contains(&honest)
        });
        assert!(!heard.contains(&forged), "{when}: a forged frame has passed: {heard:?}");
    }

    fn close(self) -> Arc<GuestSeat> {
        self.front.close(self.queues, None).unwrap();
        self.seat
    }
}

fn port(name: &str) -> bool {
    let links = ip("-o link show master xenbr0");
    links.lines().any(|line| line.contains(&format!(": {name}: ")) && line.contains(",UP"))
}

/// `ip link set name` on an interface in use: it stays in its bridge, and filtered. After a kill it comes back with the
/// name it had at first, which is the one that is configured.
#[test]
fn an_interface_that_was_renamed_by_hand() {
    if !namespace("an interface that was renamed by hand") {
        return;
    }
    let mut dom0 = Dom0::start();
    let (guest, probe) = (dom0.guest("web"), Probe::new());
    dom0.ok(&["attach", "web", "--wait", "0"]);
    let vif = format!("vif{}.0", Guest::domid(&*guest));
    let mut web = Web::connect(&guest, &Options::default());
    web.is_heard_and_filtered(&probe, "at first");
    // Older kernels rename only what is off; others too.
    ip(&format!("link set {vif} down"));
    ip(&format!("link set {vif} name shop"));
    ip("link set shop up");
    until("what is kept follows", || dom0.said().contains("what is kept about it follows"));
    assert!(port("shop"));
    web.is_heard_and_filtered(&probe, "renamed");
    // The driver comes anew, as after a crash of the guest's kernel.
    let guest = web.close();
    let mut web = Web::connect(&guest, &Options { queues: 2, ..Options::default() });
    web.is_heard_and_filtered(&probe, "connected anew");
    assert!(port("shop"), "{}", dom0.said());
    dom0.kill();
    dom0.serve();
    until("the bridge has its port again", || port(&vif));
    web.is_heard_and_filtered(&probe, "after a kill");
    // Renamed again, and taken away.
    ip(&format!("link set {vif} down"));
    ip(&format!("link set {vif} name shop"));
    ip("link set shop up");
    let guest = web.close();
    dom0.ok(&["detach", "web", "0"]);
    drop((probe, guest));
    assert_nothing_left(&dom0, &["lo".to_owned(), "xenbr0".to_owned()]);
}

/// `vifname=` and `mtu=` hold over kills and reboots; a reboot is another domain with the same configuration.
#[test]
fn a_configured_name_and_mtu_stay() {
    if !namespace("vifname= and mtu=") {
        return;
    }
    let mut dom0 = Dom0::start();
    let probe = Probe::new();
    for round in 0..2 {
        let guest = dom0.guest(&format!("web{round}"));
        let name = format!("web{round}");
        dom0.ok(&["attach", &name, "--wait", "0", "vifname=shop", "mtu=1400", "mac=00:16:3e:00:00:05"]);
        let mut web = Web::connect(&guest, &Options::default());
        for time in ["at first", "after a kill", "after another"] {
            until("the bridge has its port", || port("shop"));
            web.is_heard_and_filtered(&probe, time);
            let link = ip("-o link show shop");
            assert!(link.contains("mtu 1400 "), "{time}: {link}");
            let key = guest.store().unwrap().read(&format!("{}/device/vif/0/mtu", Guest::domid(&*guest).home()));
            assert_eq!(key.unwrap(), b"1400", "{time}");
            dom0.kill();
            dom0.serve();
        }
        until("the bridge has its port", || port("shop"));
        let guest = web.close();
        dom0.ok(&["detach", &name, "0"]);
        drop(guest);
    }
    drop(probe);
    assert_nothing_left(&dom0, &["lo".to_owned(), "xenbr0".to_owned()]);
}

/// The bridge's MTU is its interfaces', over kills; a guest's driver that cannot take large frames lowers it for as long
/// as it is there.
#[test]
fn the_bridges_mtu_is_the_interfaces() {
    if !namespace("the MTU of interfaces") {
        return;
    }
    let mut dom0 = Dom0::start();
    ip("link set xenbr0 mtu 9000");
    let guest = dom0.guest("web");
    dom0.ok(&["attach", "web", "--wait", "0"]);
    let vif = format!("vif{}.0", Guest::domid(&*guest));
    let is = |mtu: &str| ip(&format!("-o link show {vif}")).contains(&format!("mtu {mtu} "));
    for (sg, mtu) in [(true, "9000"), (false, "1500"), (true, "9000")] {
        let web = Web::connect(&guest, &Options { sg, gso_v4: sg, gso_v6: sg, ..Options::default() });
        assert!(is(mtu), "sg={sg}: {}", ip("-o link"));
        dom0.kill();
        dom0.serve();
        until("the interface has its MTU again", || port(&vif) && is(mtu));
        assert!(ip("-o link show xenbr0").contains("mtu 9000 "), "the bridge was set by hand");
        web.close();
    }
    // An administrator's own.
    let web = Web::connect(&guest, &Options::default());
    ip(&format!("link set {vif} mtu 3000"));
    let guest = web.close();
    let web = Web::connect(&guest, &Options::default());
    assert!(is("3000"), "{}", ip("-o link"));
    let guest = web.close();
    dom0.ok(&["detach", "web", "0"]);
    drop(guest);
    assert_nothing_left(&dom0, &["lo".to_owned(), "xenbr0".to_owned()]);
}

/// VLANs of a port are there again after a kill, and after a reboot.
#[test]
fn vlans_stay() {
    if !namespace("VLANs of interfaces") {
        return;
    }
    let mut dom0 = Dom0::start();
    let vlans = |name: &str| {
        let output = std::process::Command::new("bridge").args(["vlan", "show", "dev", name]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.split_whitespace().skip_while(|word| *word != name).collect::<Vec<_>>().join(" ")
    };
    for round in 0..2 {
        let name = format!("web{round}");
        let guest = dom0.guest(&name);
        let said = dom0.run(&["attach", &name, "--wait", "0", "vlan=10p/20/30", "vifname=shop"]);
        if said.text.contains("VLAN filtering") {
            println!("NOT TESTED: VLANs of interfaces: {}", said.text);
            return;
        }
        assert!(said.success, "{}", said.text);
        let wanted = vlans("shop");
        assert!(wanted.contains("10 PVID Egress Untagged") && wanted.contains("20"), "{wanted}");
        let web = Web::connect(&guest, &Options::default());
        dom0.kill();
        dom0.serve();
        until("the bridge has its port again", || port("shop"));
        assert_eq!(vlans("shop"), wanted);
        let guest = web.close();
        dom0.ok(&["detach", &name, "0"]);
        drop(guest);
    }
    assert_nothing_left(&dom0, &["lo".to_owned(), "xenbr0".to_owned()]);
}
