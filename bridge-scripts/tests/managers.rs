//! The real programs that look after a card: ifupdown with dhclient, dhclient and dhcpcd alone, systemd-networkd and
//! NetworkManager, with a DHCP server whose leases are as short as it gives them. `network-bridge start` refuses and says what
//! to do; done as it says, the bridge has the address, and still has it when the card's lease is over.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "common/mod.rs"]
mod common;
mod machine;

use std::thread;
use std::time::{Duration, Instant};

use common::text;
use machine::{LEASE, Machine};

/// One of them, as an administrator has it.
struct Manager {
    name: &'static str,
    /// Programs and their packages.
    needs: &'static [(&'static str, &'static str)],
    /// Configures it and starts it on eth0.
    begin: fn(&Machine),
    /// What the first sentence says.
    says: &'static str,
    /// Does what the message says.
    follow: fn(&Machine, &str),
    /// Whether IPv6's address stays the same.
    same_suffix: bool,
}

const MANAGERS: [Manager; 7] = [
    Manager {
        name: "ifupdown with dhclient",
        needs: &[("ifup", "ifupdown"), ("dhclient", "isc-dhcp-client")],
        begin: |machine| {
            machine.write(
                "/etc/network/interfaces",
                "auto lo\niface lo inet loopback\nsource /etc/network/interfaces.d/*\n",
            );
            machine.write(LAN, "allow-hotplug eth0\niface eth0 inet dhcp\niface eth0 inet6 auto\n");
            machine.sh("ifup eth0 2>/dev/null");
        },
        says: "eth0 has ADDRESS/24 by DHCP: dhclient (process ",
        follow: |machine, message| {
            let lines = written(message, &format!("in {LAN} write, in the place of eth0's lines,"));
            machine.write(LAN, &lines);
            in_one_line(machine, message);
        },
        same_suffix: true,
    },
    Manager {
        name: "dhclient",
        needs: &[("dhclient", "isc-dhcp-client")],
        begin: |machine| {
            machine.sh("ip link set eth0 up; dhclient eth0");
        },
        says: "eth0 has ADDRESS/24 by DHCP: dhclient (process ",
        follow: in_one_line,
        same_suffix: true,
    },
    Manager {
        name: "dhcpcd",
        needs: &[("dhcpcd", "dhcpcd-base")],
        begin: |machine| {
            machine.sh("ip link set eth0 up; dhcpcd -q eth0");
        },
        says: "eth0 has ADDRESS/24 by DHCP: dhcpcd (process ",
        follow: in_one_line,
        same_suffix: false,
    },
    Manager {
        name: "dhcpcd, IPv4 alone",
        needs: &[("dhcpcd", "dhcpcd-base")],
        begin: |machine| {
            machine.sh("ip link set eth0 up; dhcpcd -q -4 eth0");
        },
        says: "eth0 has ADDRESS/24 by DHCP: dhcpcd (process ",
        follow: in_one_line,
        same_suffix: true,
    },
    Manager {
        name: "dhcpcd for all cards",
        needs: &[("dhcpcd", "dhcpcd-base")],
        begin: |machine| {
            machine.sh("ip link set eth0 up; dhcpcd -q");
        },
        says: "eth0 has ADDRESS/24 by DHCP: dhcpcd (process ",
        follow: |machine, message| {
            let lines = written(message, "Write at the end of /etc/dhcpcd.conf");
            machine.sh(&format!("cat >> /etc/dhcpcd.conf <<END\n{lines}END"));
            in_one_line(machine, message);
        },
        same_suffix: false,
    },
    Manager {
        name: "systemd-networkd",
        needs: &[("systemd-networkd", "systemd"), ("networkctl", "systemd"), ("dbus-daemon", "dbus-daemon")],
        begin: |machine| {
            machine.write("/etc/systemd/network/10-lan.network", "[Match]\nName=eth0\n[Network]\nDHCP=yes\n");
            machine.sh("mkdir -p /run/systemd/netif; chown systemd-network:systemd-network /run/systemd/netif");
            machine.sh("dbus-daemon --system --fork --nopidfile");
            machine.daemon("manager", "/usr/lib/systemd/systemd-networkd");
        },
        says: "systemd-networkd looks after eth0 (/etc/systemd/network/10-lan.network), ",
        follow: |machine, message| {
            assert!(message.contains("in /etc/systemd/network, then networkctl reload:"), "{message}");
            let ends = |line: &&str| line.starts_with(' ') || !line.contains(".net");
            for header in message.lines().filter(|line| !ends(line)).skip(1) {
                let name = header.split([':', ' ']).next().unwrap();
                machine.write(&format!("/etc/systemd/network/{name}"), &written(message, header));
            }
            machine.sh("networkctl reload");
        },
        same_suffix: true,
    },
    Manager {
        name: "NetworkManager",
        needs: &[("NetworkManager", "network-manager"), ("nmcli", "network-manager"), ("dbus-daemon", "dbus-daemon")],
        begin: |machine| {
            machine.write(
                "/etc/NetworkManager/system-connections/lan.nmconnection",
                "[connection]\nid=lan\nuuid=27afa607-ee36-43f0-b8c3-9d245cdc4bb3\ntype=ethernet\n[ipv4]\nmethod=auto\n\
                 [ipv6]\nmethod=auto\naddr-gen-mode=stable-privacy\n",
            );
            machine.sh("chmod 600 /etc/NetworkManager/system-connections/*; dbus-daemon --system --fork --nopidfile");
            machine.daemon("manager", "NetworkManager --debug --log-level=INFO");
        },
        says: "NetworkManager looks after eth0, ",
        follow: |machine, message| {
            let lines = written(message, "Let it make the bridge:");
            assert_eq!(lines.matches("nmcli ").count(), 4, "{message}");
            machine.sh(&lines);
        },
        same_suffix: true,
    },
];

const LAN: &str = "/etc/network/interfaces.d/lan";

/// The lines of a message below the one with this text, without their margin.
fn written(message: &str, below: &str) -> String {
    let mut lines = message.lines().skip_while(|line| !line.contains(below));
    assert!(lines.next().is_some(), "no {below:?} in {message}");
    lines.map_while(|line| line.strip_prefix("    ")).fold(String::new(), |all, line| all + line + "\n")
}

/// Runs the line that a message ends with.
fn in_one_line(machine: &Machine, message: &str) {
    let line = written(message, "in one line:");
    assert_eq!(line.lines().count(), 1, "{message}");
    machine.sh(&line);
}

/// An address of a link with its remaining life in seconds.
fn address(machine: &Machine, link: &str, begin: &str) -> Option<(String, u32)> {
    let shown = text(&machine.tries(&format!("ip -o addr show dev {link} scope global -tentative")).stdout);
    shown.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let local = words.iter().find(|word| word.starts_with(begin))?.split_once('/')?.0;
        let valid = words.iter().position(|word| *word == "valid_lft")?;
        Some((local.to_owned(), words[valid + 1].trim_end_matches("sec").parse().ok()?))
    })
}

const V4: &str = "10.1.0.";
const V6: &str = "fd00:5:";

/// Waits until something is so. A lease has to end meanwhile.
fn becomes(machine: &Machine, manager: &Manager, what: &str, mut so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !so() {
        assert!(
            begin.elapsed() < Duration::from_secs(u64::from(LEASE) * 3),
            "{}: did not happen: {what}\n{}\n{}",
            manager.name,
            text(&machine.tries("ip addr; ip route; ip -6 route; ps axww").stdout),
            machine.read("/run/manager.log")
        );
        thread::sleep(Duration::from_millis(200));
    }
}

/// A machine whose eth0 has a leased and an advertised address, by this manager.
fn machine_with(manager: &Manager) -> Option<Machine> {
    let machine = Machine::new(&format!("a card that {} looks after", manager.name), manager.needs)?;
    (manager.begin)(&machine);
    let wait = |what: &str, so: &mut dyn FnMut() -> bool| becomes(&machine, manager, what, so);
    wait("eth0 has both addresses", &mut || both(&machine, "eth0"));
    wait("the outside is eth0's default route", &mut || machine.sh("ip route").contains("default via 10.1.0.1"));
    Some(machine)
}

fn both(machine: &Machine, link: &str) -> bool {
    address(machine, link, V4).is_some() && address(machine, link, V6).is_some()
}

/// force=yes goes on, and says whom it ignores. (The manager may give up when it sees that: a machine for this alone.)
fn is_ignored_by_force(manager: &Manager) {
    let Some(machine) = machine_with(manager) else { return };
    let leased = address(&machine, "eth0", V4).unwrap().0;
    let forced = machine.tries("network-bridge start force=yes");
    let said = text(&forced.stdout) + &text(&forced.stderr);
    let note = format!("note: {}", manager.says.replace("ADDRESS", &leased));
    assert!(forced.status.success() && said.contains(&note), "{}: {said}", manager.name);
    assert_eq!(address(&machine, "xenbr0", V4).unwrap().0, leased, "{}", manager.name);
    machine.sh("network-bridge stop");
    assert_eq!(address(&machine, "eth0", V4).unwrap().0, leased, "{}", manager.name);
}

/// It is refused; and done as it is said, the bridge keeps the addresses.
fn is_refused_and_followed(manager: &Manager) {
    let Some(machine) = machine_with(manager) else { return };
    let wait = |what: &str, so: &mut dyn FnMut() -> bool| becomes(&machine, manager, what, so);
    let (leased, began) = (address(&machine, "eth0", V4).unwrap().0, Instant::now());
    let (advertised, life) = address(&machine, "eth0", V6).unwrap();

    // It is refused, and nothing is done.
    let shown = || machine.sh("ip -br link; ip -br -4 addr; ip -4 route");
    let before = shown();
    let refused = machine.tries("network-bridge start");
    let message = text(&refused.stderr);
    assert!(!refused.status.success(), "{}: it was not refused", manager.name);
    let says = manager.says.replace("ADDRESS", &leased);
    assert!(message.starts_with(&format!("network-bridge: {says}")), "{}: {message}", manager.name);
    assert!(message.contains("Or say force=yes: xenbr0 takes the addresses as they are"), "{message}");
    assert_eq!(shown(), before, "{}", manager.name);

    // As the message says.
    (manager.follow)(&machine, &message);
    let given = machine.acknowledged();
    wait("xenbr0 has both addresses", &mut || both(&machine, "xenbr0"));
    assert_eq!(address(&machine, "xenbr0", V4).unwrap().0, leased, "{}", manager.name);
    if manager.same_suffix {
        assert_eq!(address(&machine, "xenbr0", V6).unwrap().0, advertised, "{}", manager.name);
    }
    wait("the outside reaches the bridge", &mut || machine.is_reached(&leased));
    let again = machine.sh("network-bridge start 2>&1");
    assert!(again.contains("nothing to do"), "{}: {again}", manager.name);

    // The first lease is over, and the address is there because somebody asked for more.
    let over = || began.elapsed() > Duration::from_secs(LEASE.into());
    wait("the lease is renewed on the bridge", &mut || over() && machine.acknowledged() >= given + 2);
    assert!(machine.is_reached(&leased), "{}: {}", manager.name, machine.sh("ip addr"));
    let on_card = machine.sh("ip -o addr show dev eth0 scope global");
    assert_eq!(on_card, "", "{}: the card is still looked after", manager.name);
    // It lives longer than what is left of its first life.
    let heard = |(_, valid): (String, u32)| valid > life - LEASE / 2;
    wait("the router is heard on the bridge", &mut || address(&machine, "xenbr0", V6).is_some_and(heard));
    println!("{}: renewed on the bridge", manager.name);
}

/// All at once: each waits for most of its time.
#[test]
fn who_looks_after_a_card_makes_the_bridge_or_is_handed_over() {
    if !nix::unistd::geteuid().is_root() {
        println!("NOT TESTED: who looks after a card: needs root, for namespaces");
        return;
    }
    if std::env::var_os("QUICK").is_some() {
        println!("NOT TESTED: who looks after a card: waits two minutes for leases to end; tests/run does");
        return;
    }
    let only = std::env::var("MANAGER").ok();
    let chosen = MANAGERS.iter().filter(|manager| only.as_deref().is_none_or(|only| only == manager.name));
    let failed: Vec<&str> = thread::scope(|scope| {
        let all: Vec<_> = chosen
            .map(|manager| {
                (manager.name, scope.spawn(|| (is_ignored_by_force(manager), is_refused_and_followed(manager))))
            })
            .collect();
        all.into_iter().filter_map(|(name, run)| run.join().err().map(|_| name)).collect()
    });
    assert!(failed.is_empty(), "{failed:?}; what went wrong is said above");
}
