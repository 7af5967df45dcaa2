use super::*;
use crate::network::owners::Client;
use crate::state::{Kind, LinkState};

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
                "DHCP=yes",
            ],
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
        ("dhcpcd eth0 [ip4]", "dhcpcd xenbr0"),
        ("dhcpcd [manager] [ip4] [ip6]", "dhcpcd xenbr0"),
    ] {
        let said = said(&state, &Owners { clients: vec![client(line)], ..Owners::default() });
        assert_eq!(said.is_empty(), on_the_bridge.is_empty(), "{line}: {said}");
        let wanted = format!("kill 812; network-bridge start netdev=eth0 bridge=xenbr0 force=yes; {on_the_bridge}\n");
        assert!(said.is_empty() || said.contains(&wanted) && said.contains("192.0.2.2/24"), "{line}: {said}");
    }
}

#[test]
fn ifupdowns_lines() {
    let state = machine("0", &[("192.0.2.2", 24, 3600, None)]);
    let clients = vec![client("dhclient -4 eth0")];
    let of = |interfaces: &str, clients: &[Client]| {
        said(&state, &Owners { interfaces: interfaces.into(), clients: clients.to_vec(), ..Owners::default() })
    };
    let text = of(
        "auto lo\niface lo inet loopback\nallow-hotplug eth0\niface eth0 inet dhcp\niface eth0 inet6 auto\n",
        &clients,
    );
    for part in [
        "    iface eth0 inet manual\n    auto xenbr0\n    iface xenbr0 inet dhcp\n        bridge_ports eth0\n        bridge_stp off\n        bridge_fd 0\n    iface xenbr0 inet6 auto\n",
        "bridge-utils",
        "dhclient, process 812",
        "ifdown eth0; ifup xenbr0",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    // Another card's lines, and a client without ifupdown's knowledge.
    assert!(of("iface eth1 inet dhcp\n", &clients).contains("kill 812"));
    assert_eq!(of("iface eth0 inet static\n    address 192.0.2.2/24\n", &[]), "");
    assert_eq!(of("iface eth0 inet dhcp\n", &[]), "", "ifupdown itself does nothing to a card that is up");
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
