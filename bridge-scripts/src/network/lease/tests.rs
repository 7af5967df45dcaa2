use super::*;
use crate::network::owners::Client;
use crate::state::{Address, Kind, LinkState};

const MAC: Mac = Mac([0, 0x16, 0x3e, 0, 0, 1]);

fn machine(mode: &str, addresses: &[(&str, u8, u32, Option<u8>)]) -> State {
    let mut state = State::default();
    for name in ["eth0", "eth1"] {
        state.links.insert(name.into(), LinkState { mac: Some(MAC), ..LinkState::new(Kind::Physical) });
    }
    state.sysctls.insert("net/ipv6/conf/eth0/addr_gen_mode".into(), mode.into());
    for (local, prefix, valid, protocol) in addresses {
        let address = Address::new("eth0", local.parse().unwrap(), *prefix);
        state.addresses.push(Address { valid: *valid, preferred: *valid, protocol: *protocol, ..address });
    }
    state
}

fn client(line: &str) -> Client {
    Client { pid: 812, words: line.split(' ').map(str::to_owned).collect() }
}

fn pair() -> Pair {
    Pair { netdev: "eth0".into(), bridge: "xenbr0".into() }
}

/// What is said of eth0; nothing where there is nothing against it.
fn said(state: &State, owners: &Owners) -> String {
    objection(state, owners, &pair()).unwrap_or_default()
}

#[test]
fn managers_of_links() {
    let state = machine("0", &[("192.0.2.2", 24, FOREVER, None)]);
    let manager =
        |text: &str| Owners { network_manager: [("eth0".to_owned(), text.to_owned())].into(), ..Owners::default() };
    let networkd = |text: &str| Owners { networkd: [("eth0".to_owned(), text.to_owned())].into(), ..Owners::default() };
    for (owners, says) in [
        (
            manager("[device]\nmanaged=true\nconnection-uuid=12-34\n"),
            &[
                "NetworkManager looks after eth0",
                "nmcli connection modify 12-34 connection.autoconnect no",
                "type bridge ifname xenbr0 con-name xenbr0 bridge.stp no bridge.mac-address 00:16:3e:00:00:01",
                "bridge.mac-address 00:16:3e:00:00:01 connection.autoconnect-slaves 1\n",
                "type bridge-slave ifname eth0 con-name xenbr0-eth0 master xenbr0",
                "force=yes",
            ][..],
        ),
        (manager("[device]\nmanaged=false\n"), &[]),
        (manager("[device]\nperm-hw-addr-fake=02:00:00:00:00:01\n"), &[]),
        (
            networkd("ADMIN_STATE=configured\nNETWORK_FILE=/etc/systemd/network/10-dhcp.network\n"),
            &[
                "(/etc/systemd/network/10-dhcp.network)",
                "[NetDev]\n    Name=xenbr0\n    Kind=bridge\n    MACAddress=00:16:3e:00:00:01\n",
                "[Match]\n    Name=eth0\n    [Network]\n    Bridge=xenbr0\n",
                "05-xenbr0-port.network:\n",
                "05-xenbr0.network (instead of DHCP=yes",
            ],
        ),
        // The first file that matches counts.
        (
            networkd("ADMIN_STATE=configured\nNETWORK_FILE=/etc/systemd/network/05-lan.network\n"),
            &["00-xenbr0-port.network:\n", "00-xenbr0.network (instead"],
        ),
        (
            networkd("ADMIN_STATE=configured\nNETWORK_FILE=/etc/systemd/network/00-a.network\n"),
            &["--xenbr0-port.network:\n"],
        ),
        (
            networkd("ADMIN_STATE=configuring\nNETWORK_FILE=/run/systemd/network/10-netplan-eth0.network\n"),
            &[
                "netplan and systemd-networkd look after eth0",
                "        xenbr0:\n          interfaces: [eth0]\n          macaddress: 00:16:3e:00:00:01\n",
            ],
        ),
        (networkd("ADMIN_STATE=unmanaged\nOPER_STATE=routable\n"), &[]),
        (networkd("ADMIN_STATE=pending\n"), &[]),
    ] {
        let said = said(&state, &owners);
        assert_eq!(said.is_empty(), says.is_empty(), "{owners:?}: {said}");
        says.iter().for_each(|part| assert!(said.contains(part), "no {part:?} in {said}"));
    }
}

#[test]
fn clients_on_a_card() {
    let state = machine("0", &[("192.0.2.2", 24, 3600, None)]);
    for (line, on_the_bridge) in [
        ("dhclient -4 -v -pf /run/dhclient.eth0.pid eth0", "dhclient -4 -v -pf /run/dhclient.eth0.pid xenbr0"),
        ("/sbin/dhclient", "/sbin/dhclient xenbr0"),
        ("dhclient eth1", ""),
        ("udhcpc -b -i eth0 -s /x", "udhcpc -b -i xenbr0 -s /x"),
        ("/bin/busybox udhcpc -ieth0", "/bin/busybox udhcpc -ixenbr0"),
        ("udhcpc --interface=eth0", "udhcpc --interface=xenbr0"),
        ("udhcpc", "udhcpc -i xenbr0"),
        ("udhcpc -i eth1", ""),
    ] {
        let said = said(&state, &Owners { clients: vec![client(line)], ..Owners::default() });
        assert_eq!(said.is_empty(), on_the_bridge.is_empty(), "{line}: {said}");
        let wanted = format!("kill 812; network-bridge start netdev=eth0 bridge=xenbr0 force=yes; {on_the_bridge}\n");
        assert!(said.is_empty() || said.contains(&wanted) && said.contains("192.0.2.2/24"), "{line}: {said}");
    }
}

/// IPv6 has a client of its own, which has to follow too.
#[test]
fn two_clients_on_a_card() {
    let state = machine("0", &[("192.0.2.2", 24, 3600, None), ("2001:db8::7", 128, 3600, None)]);
    let other = Client { pid: 900, ..client("dhclient -6 eth0") };
    let said = said(&state, &Owners { clients: vec![client("dhclient -4 eth0"), other], ..Owners::default() });
    let line = "    kill 812; kill 900; network-bridge start netdev=eth0 bridge=xenbr0 force=yes; dhclient -4 xenbr0; \
                dhclient -6 xenbr0\n";
    assert!(said.contains(line) && said.contains("eth0 has 192.0.2.2/24, 2001:db8::7/128 by DHCP"), "{said}");
}

/// It shows a text of its own instead of its command line, and waits for its end itself.
#[test]
fn dhcpcd_on_a_card() {
    let state = machine("0", &[("192.0.2.2", 24, 3600, None)]);
    let start = "network-bridge start netdev=eth0 bridge=xenbr0 force=yes";
    for (shown, lines) in [
        (
            "dhcpcd eth0 [ip4] [ip6]",
            format!("Hand it over, in one line:\n    dhcpcd -x eth0; {start}; dhcpcd xenbr0\n"),
        ),
        ("dhcpcd eth0 [ip4]", format!("    dhcpcd -x -4 eth0; {start}; dhcpcd -4 xenbr0\n")),
        (
            "dhcpcd [manager] [ip4] [ip6]",
            format!(
                "Write at the end of /etc/dhcpcd.conf\n    denyinterfaces eth0 vif*\n    interface xenbr0\nand then, in one \
                 line:\n    dhcpcd -x; {start}; dhcpcd\n"
            ),
        ),
    ] {
        let said = said(&state, &Owners { clients: vec![client(shown)], ..Owners::default() });
        assert!(said.contains(&lines), "{shown}: {said}");
    }
    // Its manager need not have this card.
    let state = machine("0", &[("192.0.2.2", 24, FOREVER, None)]);
    let owners = Owners { clients: vec![client("dhcpcd [manager] [ip4] [ip6]")], ..Owners::default() };
    assert_eq!(said(&state, &owners), "");
}

/// NetworkManager would make the bridge's address from its name.
#[test]
fn networkmanager_keeps_the_suffix_of_an_advertised_address() {
    let text = "[device]\nmanaged=true\nconnection-uuid=12-34\n".to_owned();
    let owners = Owners { network_manager: [("eth0".to_owned(), text)].into(), ..Owners::default() };
    let (eui, secret) =
        (("2001:db8::216:3eff:fe00:1", 64, 3600, None), ("2001:db8::221f:e7e7:c7f9:dfc", 64, 3600, None));
    let other = ("2001:db8::1234:5678:9abc:def0", 64, 600, None);
    for (addresses, words) in [
        (&[eui, other][..], " ipv6.addr-gen-mode eui64 connection"),
        (&[secret], " ipv6.addr-gen-mode eui64 ipv6.token ::221f:e7e7:c7f9:dfc connection"),
        (&[secret, other], " bridge.mac-address 00:16:3e:00:00:01 connection"),
    ] {
        let said = said(&machine("0", addresses), &owners);
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn ifupdowns_lines() {
    let state = machine("0", &[("192.0.2.2", 24, 3600, None), ("2001:db8::216:3eff:fe00:1", 64, 3600, Some(2))]);
    let line = "dhclient -4 -v -pf /run/dhclient.eth0.pid -lf /var/lib/dhcp/dhclient.eth0.leases eth0";
    let clients = vec![client(line)];
    let of = |interfaces: &[(&str, &str)], clients: &[Client]| {
        let interfaces = interfaces.iter().map(|(file, text)| ((*file).to_owned(), (*text).to_owned())).collect();
        said(&state, &Owners { interfaces, clients: clients.to_vec(), ..Owners::default() })
    };
    let loopback = ("/etc/network/interfaces", "auto lo\niface lo inet loopback\nsource interfaces.d/*\n");
    let card = ("/etc/network/interfaces.d/lan", "allow-hotplug eth0\niface eth0 inet dhcp\niface eth0 inet6 auto\n");
    let text = of(&[loopback, card], &clients);
    for part in [
        "eth0 has 192.0.2.2/24 by DHCP: dhclient (process 812) ",
        "in /etc/network/interfaces.d/lan write, in the place of eth0's lines,\n",
        "    iface eth0 inet manual\n    auto xenbr0\n    iface xenbr0 inet dhcp\n        bridge_ports eth0\n        bridge_stp off\n        bridge_fd 0\n    iface xenbr0 inet6 auto\n",
        "bridge-utils",
        // `ifdown` ends only what the new lines have; the client has to be asked for the same address again.
        "in one line:\n    kill 812; ifdown eth0; sed s/eth0/xenbr0/ /var/lib/dhcp/dhclient.eth0.leases > \
         /var/lib/dhcp/dhclient.xenbr0.leases; ifup xenbr0\n",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    // Another card's lines, and a client without ifupdown's knowledge.
    let file = "/etc/network/interfaces";
    assert!(of(&[(file, "iface eth1 inet dhcp\n")], &clients).contains("kill 812; network-bridge"));
    assert_eq!(of(&[(file, "iface eth0 inet static\n    address 192.0.2.2/24\n")], &[]), "");
    assert_eq!(of(&[(file, "iface eth0 inet dhcp\n")], &[]), "", "ifupdown itself does nothing to a card that is up");
}

#[test]
fn advertised_addresses() {
    let eui = "2001:db8::216:3eff:fe00:1";
    for (mode, address, token) in [
        ("0", (eui, 64, 3600, Some(2)), ""),
        ("2", (eui, 64, 3600, Some(2)), ""),
        ("2", ("2001:db8::1234:5678:9abc:def0", 64, 3600, Some(2)), "ip token set ::1234:5678:9abc:def0 dev xenbr0"),
        ("3", ("2001:db8::1234:5678:9abc:def0", 64, FOREVER, Some(2)), ""),
        ("2", ("2001:db8::1234:5678:9abc:def0", 64, 3600, None), ""),
    ] {
        let said = said(&machine(mode, &[address]), &Owners::default());
        assert_eq!(said.is_empty(), token.is_empty(), "{mode} {address:?}: {said}");
        assert!(said.contains(token), "{said}");
    }
}
