//! `network-nat start dhcp=yes`, dnsmasq, and vif-nat: guests get the addresses that vif-nat has for them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod vif_common;

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use vif_common::cable::{Beside, Cable, has};
use vif_common::frames::{EVERYBODY, Mac, ether, ip4, udp};
use vif_common::{PATIENCE, Scene, alone, have, sh};

const ONE: Mac = [0x00, 0x16, 0x3e, 0, 0, 1];
const TWO: Mac = [0x00, 0x16, 0x3e, 0, 0, 2];
const COOKIE: [u8; 4] = [0x63, 0x82, 0x53, 0x63];

/// What a server offered or gave (RFC 2131).
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    kind: u8,
    address: Ipv4Addr,
    mask: Vec<u8>,
    router: Vec<u8>,
    server: Vec<u8>,
}

/// A client by hand.
struct Guest {
    cable: Cable,
    mac: Mac,
}

impl Guest {
    fn send(&self, options: &[u8]) {
        // op, htype, hlen, hops, xid, secs, flags, four addresses, chaddr, sname and file, the cookie, options.
        let mut message = vec![1, 1, 6, 0, 0x12, 0x34, 0x56, self.mac[5], 0, 0, 0, 0];
        message.extend([0; 16]);
        message.extend(self.mac);
        message.extend([0; 10 + 64 + 128]);
        message.extend(COOKIE);
        message.extend(options);
        message.push(255);
        message.resize(300, 0);
        let packet = ip4(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, 17, 0, &udp(68, 67, &message));
        self.cable.send(&ether(EVERYBODY, self.mac, 0x0800, &packet));
    }

    fn answer(&self) -> Option<Answer> {
        let frame = self.cable.received().into_iter().find(|frame| {
            frame.get(34..38) == Some(&[0, 67, 0, 68]) && has(frame, &COOKIE) && has(&frame[42..], &self.mac)
        })?;
        let message = &frame[42..];
        let mut options = &message[240..];
        let mut answer = Answer {
            kind: 0,
            address: <[u8; 4]>::try_from(&message[16..20]).unwrap().into(),
            mask: Vec::new(),
            router: Vec::new(),
            server: Vec::new(),
        };
        while let [code, length, rest @ ..] = options {
            if *code == 255 {
                break;
            }
            let (value, after) = rest.split_at(usize::from(*length));
            match code {
                1 => answer.mask = value.to_vec(),
                3 => answer.router = value.to_vec(),
                53 => answer.kind = value[0],
                54 => answer.server = value.to_vec(),
                _ => {}
            }
            options = after;
        }
        Some(answer)
    }

    /// Asks until there is an answer, as clients do.
    fn asks(&self, options: &[u8]) -> Answer {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            self.send(options);
            for _ in 0..20 {
                sleep(Duration::from_millis(20));
                if let Some(answer) = self.answer() {
                    return answer;
                }
            }
        }
        panic!("dnsmasq gives no answer to {:?}", self.mac);
    }

    /// DISCOVER, OFFER, REQUEST, ACK.
    fn lease(&self) -> Answer {
        let offer = self.asks(&[53, 1, 1]);
        assert_eq!(offer.kind, 2, "{offer:?}");
        let mut request = vec![53, 1, 3, 50, 4];
        request.extend(offer.address.octets());
        request.extend([54, 4]);
        request.extend(&offer.server);
        let mut ack = self.asks(&request);
        while ack.kind == 2 {
            // An offer to a question of before.
            ack = self.asks(&request);
        }
        ack
    }
}

fn network_nat(scene: &Scene, words: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bridge-scripts"));
    command.arg("network-nat").args(words.split(' ')).env("BRIDGE_SCRIPTS_RUN", scene.run());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// dnsmasq with this configuration, ended with the test.
struct Dnsmasq(Child);

impl Dnsmasq {
    fn start(conf: &Path, log: &Path) -> Self {
        let file = fs::File::create(log).unwrap();
        let mut command = Command::new("dnsmasq");
        command.arg(format!("--conf-file={}", conf.display())).args(["--keep-in-foreground", "--log-facility=-"]);
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).spawn().unwrap())
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn guests_get_their_addresses() {
    alone("guests_get_their_addresses", || {
        if !have("dnsmasq", "DHCP for guests behind NAT") {
            return;
        }
        if !fs::read_to_string("/proc/self/uid_map").unwrap().contains("4294967295") {
            println!("NOT TESTED: DHCP for guests behind NAT: dnsmasq cannot become its own user in a user namespace");
            return;
        }
        let (scene, beside) = (Scene::new(), Beside::new());
        sh("ip link set lo up");
        let _card = beside.pair("eth0", "o-eth0");
        sh("ip addr add 198.51.100.1/24 dev eth0");
        sh("ip link set eth0 up");
        sh("ip route add default via 198.51.100.254");
        // Before any guest is there, as at boot.
        let told = network_nat(&scene, "start dhcp=yes");
        let (run, conf) = (scene.run(), scene.run().join("dnsmasq-xen-nat.conf"));
        assert!(told.contains(&format!("dnsmasq --conf-file={}", conf.display())), "{told}");
        // What is above the run directory is everybody's to pass through, as /run is.
        fs::set_permissions(run.parent().unwrap(), fs::Permissions::from_mode(0o711)).unwrap();
        sh(&format!("dnsmasq --test --conf-file={}", conf.display()));
        let log = run.join("log-of-dnsmasq");
        let dnsmasq = Dnsmasq::start(&conf, &log);
        let begin = Instant::now();
        while !run.join("dnsmasq.pid").exists() && begin.elapsed() < PATIENCE {
            sleep(Duration::from_millis(20));
        }
        let guests = [(62, ONE, "10.0.62.1", [10, 0, 62, 128]), (300, TWO, "10.1.44.1", [10, 1, 44, 128])];
        for (domid, mac, address, router) in guests {
            let cable = beside.pair(&format!("vif{domid}.0"), &format!("guest{domid}"));
            let text = if mac == ONE { "00:16:3e:00:00:01" } else { "00:16:3e:00:00:02" };
            scene.describe(domid, 0, text, &[]);
            assert!(scene.program("vif-nat", domid, 0, &["online", "type_if=vif"]), "{}", scene.log());
            let lease = Guest { cable, mac }.lease();
            let log = fs::read_to_string(&log).unwrap();
            assert_eq!((lease.kind, lease.address.to_string().as_str()), (5, address), "{log}");
            assert_eq!((lease.router, lease.mask), (router.to_vec(), vec![255, 128, 0, 0]), "{log}");
            // What dnsmasq may do to the ARP table has not been done.
            let entries = sh(&format!("ip neigh show dev vif{domid}.0"));
            assert!(entries.contains(&format!("{address} lladdr {text} PERMANENT")), "{entries}");
            println!("domain {domid} got {address} by DHCP");
        }
        assert_eq!(scene.log(), "", "nothing to complain about");
        // A guest of a network that nobody told network-nat of.
        scene.vif(5, 0, "00:16:3e:00:00:05", &[("ip", "192.168.9.7/24")]);
        assert!(scene.program("vif-nat", 5, 0, &["online"]));
        assert!(scene.log().contains("dnsmasq gives no addresses of 192.168.9.7's network"), "{}", scene.log());
        drop(dnsmasq);
        assert!(scene.program("vif-nat", 5, 0, &["offline"]));
        assert!(scene.log().contains("no dnsmasq runs with"), "{}", scene.log());
        network_nat(&scene, "stop");
        assert!(!conf.exists());
    });
}
