//! vif-bridge, vif-route and vif-nat on namespaces of their own, with taps in place of guests' interfaces and an embedded
//! XenStore.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod vif_common;

use bridge_scripts::network;
use vif_common::{Scene, alone_with_taps, settle, sh};

#[test]
fn a_port_of_a_bridge() {
    alone_with_taps("a_port_of_a_bridge", || {
        let scene = Scene::new();
        sh("ip link add xenbr0 type bridge");
        sh("ip link set xenbr0 mtu 1400 up");
        scene.vif(1, 0, "00:16:3e:00:00:01", &[("bridge", "xenbr0"), ("ip", "10.0.0.1")]);
        let before = sh("ip -d -o link show vif1.0");
        assert!(before.contains("state DOWN"), "{before}");
        scene.online("vif-bridge", 1, 0).unwrap();
        let link = sh("ip -d -o link show vif1.0");
        for word in [
            "master xenbr0",
            "mtu 1400",
            "fe:ff:ff:ff:ff:ff",
            ",UP",
            "guard on",
            "root_block on",
            "learning off",
            "flood off",
            "isolated off",
            "mcast_flood on",
        ] {
            assert!(link.contains(word), "{word}: {link}");
        }
        assert!(sh("bridge fdb show dev vif1.0").contains("00:16:3e:00:00:01 master xenbr0 static"));
        let allowed = || scene.rules("vif1.0").map(|rules| rules.addresses);
        assert_eq!(allowed(), Some(vec![("10.0.0.1".parse().unwrap(), 32)]));
        assert_eq!(scene.key(1, 0, "hotplug-status").as_deref(), Some("connected"));
        assert_eq!(scene.read("/local/domain/1/device/vif/0/mtu").as_deref(), Some("1400"));

        // Again: nothing changes.
        let filter = sh("tc filter show dev vif1.0 ingress");
        scene.online("vif-bridge", 1, 0).unwrap();
        assert_eq!(sh("tc filter show dev vif1.0 ingress"), filter);
        assert_eq!(sh("ip -d -o link show vif1.0"), link);

        // Another address is narrower; the filter is another, the port stays.
        scene.set(1, 0, "ip", "10.0.0.2");
        scene.online("vif-bridge", 1, 0).unwrap();
        assert_eq!(allowed(), Some(vec![("10.0.0.2".parse().unwrap(), 32)]));
        assert!(sh("bridge fdb show dev vif1.0").contains("00:16:3e:00:00:01 master xenbr0 static"));

        scene.offline("vif-bridge", 1, 0).unwrap();
        let link = sh("ip -d -o link show vif1.0");
        assert!(!link.contains("master") && link.contains("state DOWN"), "{link}");
        scene.nothing_left();
        scene.offline("vif-bridge", 1, 0).unwrap();

        // A bridge that is not named: the first.
        scene.vif(2, 1, "00:16:3e:00:00:02", &[]);
        scene.online("vif-bridge", 2, 1).unwrap();
        assert!(sh("ip -o link show vif2.1").contains("master xenbr0"));
        // The interface is gone, and its directory too: what is left is removed.
        sh("ip link del vif2.1");
        scene.forget(2, 1);
        assert!(scene.run().join("filter-vif2.1.json").exists());
        scene.offline("vif-bridge", 2, 1).unwrap();
        scene.nothing_left();
    });
}

#[test]
fn names_and_bridges_of_old() {
    alone_with_taps("names_and_bridges_of_old", || {
        let scene = Scene::new();
        sh("ip link add eth1 type bridge");
        scene.vif(5, 0, "00:16:3e:00:00:05", &[("bridge", "xenbr1"), ("vifname", "web0"), ("mtu", "1450")]);
        scene.online("vif-bridge", 5, 0).unwrap();
        let link = sh("ip -o link show web0");
        assert!(link.contains("master eth1") && link.contains("mtu 1450"), "{link}");
        assert!(scene.rules("web0").is_some());
        scene.online("vif-bridge", 5, 0).unwrap();
        // The name is taken: by another guest's interface, and by anything else.
        scene.vif(6, 0, "00:16:3e:00:00:06", &[("bridge", "xenbr1"), ("vifname", "web0")]);
        let error = scene.online("vif-bridge", 6, 0).unwrap_err().to_string();
        assert!(error.contains("cannot rename vif6.0 to web0"), "{error}");
        assert_eq!(scene.key(6, 0, "hotplug-status").as_deref(), Some("error"));
        assert_eq!(scene.key(6, 0, "hotplug-error"), Some(error));
        // Neither has the other's interface when it goes.
        scene.offline("vif-bridge", 6, 0).unwrap();
        assert!(sh("ip -o link show web0").contains("master eth1"));
        assert!(scene.rules("web0").is_some());
        scene.offline("vif-bridge", 5, 0).unwrap();
        scene.nothing_left();
    });
}

#[test]
fn what_cannot_be_done_says_why() {
    alone_with_taps("what_cannot_be_done_says_why", || {
        let scene = Scene::new();
        scene.vif(1, 0, "00:16:3e:00:00:01", &[]);
        let refused = |keys: &[(&str, &str)], script: &str, words: &str| {
            for key in
                ["ip", "bridge", "vlan", "mtu", "vifname", "gatewaydev", "antispoof", "hotplug-status", "hotplug-error"]
            {
                scene.unset(1, 0, key);
            }
            scene.set(1, 0, "mac", "00:16:3e:00:00:01");
            keys.iter().for_each(|(key, value)| scene.set(1, 0, key, value));
            let error = scene.online(script, 1, 0).expect_err(words).to_string();
            assert!(error.contains(words), "{error}");
            assert_eq!(scene.key(1, 0, "hotplug-status").as_deref(), Some("error"), "{words}");
            assert!(scene.key(1, 0, "hotplug-error").unwrap().contains(words));
            assert!(sh("ip -o link show vif1.0").contains("state DOWN"), "{words}");
            scene.nothing_left();
        };
        refused(&[], "vif-bridge", "there is no bridge on this machine");
        refused(&[("bridge", "xenbr7")], "vif-bridge", "there is no bridge \"xenbr7\"");
        sh("ip link add xenbr0 type bridge");
        sh("ip tuntap add tap0 mode tap");
        refused(&[("bridge", "tap0")], "vif-bridge", "tap0 is no bridge");
        refused(&[("mac", "01:16:3e:00:00:01")], "vif-bridge", "this is the address of a group");
        refused(&[("ip", "10.0.0.1 10.0.0.300")], "vif-bridge", "^^^^^^^^^^");
        refused(&[("vlan", "10/20")], "vif-bridge", "no VLAN is marked p");
        refused(&[("mtu", "20")], "vif-bridge", "no MTU");
        refused(&[("vifname", "a/b")], "vif-bridge", "'/'");
        refused(&[("antispoof", "of")], "vif-bridge", "write on or off");
        refused(&[], "vif-route", "name the guest's addresses");
        refused(&[("ip", "10.0.0.1")], "vif-route", "no default route");
        refused(&[("ip", "10.0.0.1"), ("gatewaydev", "nosuch")], "vif-route", "no device \"nosuch\"");
        refused(&[("ip", "10.0.0.1"), ("gatewaydev", "tap0")], "vif-route", "tap0 has no IPv4 address");
        refused(&[("ip", "10.1.0.0/16")], "vif-nat", "is for single addresses");
        refused(&[("vlan", "10")], "vif-nat", "use the script vif-bridge");
        refused(&[], "vif-openvswitch", "none of vif-bridge");
        sh("ip link del vif1.0");
        scene.unset(1, 0, "hotplug-error");
        let error = scene.online("vif-bridge", 1, 0).unwrap_err().to_string();
        assert!(error.contains("there is no network device \"vif1.0\""), "{error}");
        scene.forget(1, 0);
        let error = scene.online("vif-bridge", 1, 0).unwrap_err().to_string();
        assert!(error.contains("has no key mac"), "{error}");
    });
}

#[test]
fn without_antispoofing_it_says_so() {
    alone_with_taps("without_antispoofing_it_says_so", || {
        let scene = Scene::new();
        sh("ip link add xenbr0 type bridge");
        scene.vif(1, 0, "00:16:3e:00:00:01", &[("bridge", "xenbr0")]);
        let run = |words: &[&str]| scene.program("vif-bridge", 1, 0, words);
        assert!(run(&["online", "type_if=vif"]));
        assert!(scene.rules("vif1.0").is_some());
        assert_eq!(scene.log(), "");
        scene.set(1, 0, "antispoof", "off");
        assert!(run(&["online", "type_if=vif"]));
        assert!(scene.rules("vif1.0").is_none());
        assert!(sh("ip -d -o link show vif1.0").contains("learning on"));
        assert!(scene.log().contains("WARNING: antispoof=off: domain 1"), "{}", scene.log());
        assert!(run(&["offline", "type_if=vif"]));
        scene.nothing_left();
        // XenStore's word is before the command line's, which is before the machine's settings.
        scene.unset(1, 0, "antispoof");
        assert!(run(&["online", "antispoof=off"]));
        assert!(scene.rules("vif1.0").is_none());
        scene.settings("xenbr0.antispoof = off\n");
        assert!(run(&["online", "antispoof=on"]));
        assert!(scene.rules("vif1.0").is_some());
        assert!(run(&["online"]));
        assert!(scene.rules("vif1.0").is_none());
        scene.settings("antispof = off\n");
        assert!(!run(&["online"]));
        assert!(scene.log().contains(":1: unknown key"), "{}", scene.log());
    });
}

#[test]
fn what_was_said_of_the_bridge() {
    alone_with_taps("what_was_said_of_the_bridge", || {
        let scene = Scene::new();
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let start = |text: &str| {
            let mut told = String::new();
            let mut print = |line: &str| told = format!("{told}{line}\n");
            network::run(network::Program::Dummy, &words(text), scene.options.clone(), &mut print).unwrap();
            told
        };
        let told = start("start bridge=xenbr7 antispoof=no");
        assert!(told.contains("WARNING: antispoof=no: guests on xenbr7"), "{told}");
        start("start bridge=xenbr8 antispoof=yes");
        let filtered = || scene.rules("vif1.0").is_some();
        scene.vif(1, 0, "00:16:3e:00:00:01", &[("bridge", "xenbr7")]);
        let run = |words: &[&str]| scene.program("vif-bridge", 1, 0, words);
        assert!(run(&["online"]) && !filtered());
        let said = "antispoof=off: said of the bridge xenbr7 (network-bridge start antispoof=no)";
        assert!(scene.log().contains(said), "{}", scene.log());
        assert!(scene.log().contains("WARNING: antispoof=off: domain 1"), "{}", scene.log());
        // It holds for the backend's own way too.
        scene.offline("vif-bridge", 1, 0).unwrap();
        scene.online("vif-bridge", 1, 0).unwrap();
        assert!(!filtered());
        // The bridge's word is before the machine's, behind the command line's, and that behind XenStore's.
        scene.settings("antispoof = on\nxenbr7.antispoof = on\n");
        assert!(run(&["online"]) && !filtered());
        assert!(run(&["online", "antispoof=on"]) && filtered());
        scene.set(1, 0, "antispoof", "off");
        assert!(run(&["online", "antispoof=on"]) && !filtered());
        scene.unset(1, 0, "antispoof");
        // And the other way round; where the bridge has no record, the machine's word counts.
        scene.set(1, 0, "bridge", "xenbr8");
        scene.settings("antispoof = off\n");
        assert!(run(&["online"]) && filtered());
        sh("ip link add xenbr9 type bridge");
        scene.set(1, 0, "bridge", "xenbr9");
        assert!(run(&["online"]) && !filtered());
        assert!(scene.log().contains("settings says so"), "{}", scene.log());
        // A bridge that nobody named is the machine's first.
        scene.unset(1, 0, "bridge");
        scene.settings("");
        assert!(run(&["online"]) && !filtered());
        assert!(sh("ip -o link show vif1.0").contains("master xenbr7"));
        // A mistake in the machine's settings keeps nothing from going offline.
        scene.settings("antispof = off\n");
        assert!(run(&["offline"]));
    });
}

#[test]
fn the_programs_as_libxl_runs_them() {
    alone_with_taps("the_programs_as_libxl_runs_them", || {
        let scene = Scene::new();
        sh("ip link add xenbr0 type bridge");
        scene.vif(62, 2, "00:16:3e:00:00:01", &[("bridge", "xenbr0")]);
        let run = |words: &[&str]| scene.program("/etc/xen/scripts/vif-bridge", 62, 2, words);
        // Not for us: udev's events of interfaces, libxl's of taps.
        assert!(run(&["add", "type_if=vif"]) && run(&["online", "type_if=tap"]));
        assert!(!sh("ip -o link show vif62.2").contains("master"));
        // A plan changes nothing.
        assert!(run(&["online", "type_if=vif", "--plan"]));
        assert!(!sh("ip -o link show vif62.2").contains("master"));
        assert_eq!(scene.key(62, 2, "hotplug-status").as_deref(), Some(""));
        assert!(run(&["online", "type_if=vif"]));
        assert!(sh("ip -o link show vif62.2").contains("master xenbr0"));
        assert_eq!(scene.key(62, 2, "hotplug-status").as_deref(), Some("connected"));
        // An emulated card of the same guest.
        sh("ip tuntap add vif62.2-emu mode tap");
        assert!(run(&["add", "type_if=tap"]));
        assert!(sh("ip -o link show vif62.2-emu").contains("master xenbr0"));
        assert!(scene.rules("vif62.2-emu").is_some());
        assert!(run(&["remove", "type_if=tap"]));
        assert!(run(&["offline", "type_if=vif"]));
        scene.nothing_left();
        for wrong in [&["status"][..], &[], &["online", "offline"], &["online", "type_if=disk"]] {
            assert!(!run(wrong), "{wrong:?}");
        }
        assert!(scene.log().contains("type_if=disk is neither"), "{}", scene.log());
    });
}

#[test]
fn routed() {
    alone_with_taps("routed", || {
        let scene = Scene::new();
        sh("ip link set lo up");
        sh("ip link add eth0 type veth peer name outside");
        sh("ip addr add 10.0.0.254/24 dev eth0");
        sh("ip addr add 2001:db8::fe/64 dev eth0 nodad");
        sh("ip link set eth0 up");
        sh("ip link set outside up");
        sh("ip route add default via 10.0.0.1");
        let eth0 = || {
            settle();
            (sh("ip -o addr show eth0"), sh("ip route"), sh("ip neigh show proxy"))
        };
        let before = eth0();
        // The handbook's: a network of the guest's own.
        scene.vif(12, 0, "00:16:3e:00:00:01", &[("ip", "192.168.17.1/24")]);
        scene.online("vif-route", 12, 0).unwrap();
        assert!(sh("ip -o addr show vif12.0").contains("inet 192.168.17.254/24"));
        assert!(sh("ip route").contains("192.168.17.0/24 dev vif12.0"));
        assert!(sh("ip neigh show dev vif12.0").contains("192.168.17.1 lladdr 00:16:3e:00:00:01 PERMANENT"));
        let sysctl = |path: &str| std::fs::read_to_string(format!("/proc/sys/{path}")).unwrap().trim().to_owned();
        assert_eq!(sysctl("net/ipv4/conf/vif12.0/rp_filter"), "1");
        assert_eq!(sysctl("net/ipv4/conf/vif12.0/proxy_arp"), "1");
        assert_eq!(sysctl("net/ipv4/ip_forward"), "1");
        assert_eq!(sysctl("net/ipv6/conf/vif12.0/disable_ipv6"), "1");
        // Addresses of dom0's own network.
        scene.vif(13, 0, "00:16:3e:00:00:02", &[("ip", "10.0.0.5, 10.7.0.0/16 2001:db8::5"), ("gatewaydev", "eth0")]);
        scene.online("vif-route", 13, 0).unwrap();
        let routes = sh("ip route");
        assert!(routes.contains("10.0.0.5 dev vif13.0") && routes.contains("src 10.0.0.254"), "{routes}");
        assert!(routes.contains("10.7.0.0/16 dev vif13.0"), "{routes}");
        assert!(sh("ip -6 route").contains("2001:db8::5 dev vif13.0"));
        assert!(sh("ip -o addr show vif13.0").contains("10.0.0.254/32"));
        assert!(sh("ip neigh show proxy").contains("10.0.0.5 dev eth0"));
        assert!(sh("ip -6 neigh show proxy").contains("2001:db8::5 dev eth0"));
        assert!(sh("ip -6 neigh show dev vif13.0").contains("2001:db8::5 lladdr 00:16:3e:00:00:02 PERMANENT"));
        assert_eq!(sysctl("net/ipv6/conf/all/forwarding"), "1");
        assert_eq!(sysctl("net/ipv6/conf/eth0/proxy_ndp"), "1");
        let state = || {
            settle();
            sh("ip -o addr show") + &sh("ip route") + &sh("ip -6 route") + &sh("nft -a list ruleset")
        };
        let all = state();
        scene.online("vif-route", 12, 0).unwrap();
        scene.online("vif-route", 13, 0).unwrap();
        assert_eq!(state(), all);
        // Another address: the old one's route goes.
        scene.offline("vif-route", 13, 0).unwrap();
        assert!(!sh("ip neigh show proxy").contains("10.0.0.5"));
        assert!(!sh("ip -o addr show vif13.0").contains("10.0.0.254"));
        sh("ip link del vif12.0");
        scene.offline("vif-route", 12, 0).unwrap();
        assert_eq!(eth0(), before);
        scene.nothing_left();
    });
}

#[test]
fn behind_nat() {
    alone_with_taps("behind_nat", || {
        let scene = Scene::new();
        sh("ip link add eth0 type veth peer name outside");
        sh("ip addr add 198.51.100.1/24 dev eth0");
        sh("ip link set eth0 up");
        sh("ip link set outside up");
        sh("ip route add default via 198.51.100.254");
        scene.vif(62, 0, "00:16:3e:00:00:01", &[]);
        scene.vif(62, 1, "00:16:3e:00:00:02", &[("ip", "192.168.9.7/24")]);
        scene.online("vif-nat", 62, 0).unwrap();
        scene.online("vif-nat", 62, 1).unwrap();
        assert!(sh("ip -o addr show vif62.0").contains("10.0.62.128/32"));
        let routes = sh("ip route");
        assert!(routes.contains("10.0.62.1 dev vif62.0") && routes.contains("src 10.0.62.128"), "{routes}");
        assert!(routes.contains("192.168.9.7 dev vif62.1"), "{routes}");
        let rules = sh("nft list ruleset");
        assert!(rules.contains("ip saddr 10.0.62.1 oifname \"eth0\" masquerade"), "{rules}");
        assert!(rules.contains("ip saddr 192.168.9.7 oifname \"eth0\" masquerade"), "{rules}");
        let hosts = || std::fs::read_to_string(scene.run().join("dnsmasq-hosts")).unwrap_or_default();
        assert_eq!(hosts(), "00:16:3e:00:00:01,10.0.62.1,dom62\n00:16:3e:00:00:02,192.168.9.7,dom62-2\n");
        let all = sh("nft -a list ruleset") + &sh("ip route");
        scene.online("vif-nat", 62, 0).unwrap();
        scene.online("vif-nat", 62, 1).unwrap();
        assert_eq!(sh("nft -a list ruleset") + &sh("ip route"), all);
        scene.offline("vif-nat", 62, 0).unwrap();
        assert_eq!(hosts(), "00:16:3e:00:00:02,192.168.9.7,dom62-2\n");
        scene.offline("vif-nat", 62, 1).unwrap();
        assert_eq!(hosts(), "");
        assert!(!sh("ip route").contains("vif62"));
        scene.nothing_left();
    });
}

/// As text, because this kernel may have no VLAN filtering to try it on.
#[test]
fn vlans_of_a_port() {
    use std::collections::BTreeMap;

    use bridge_scripts::state::{Kind, LinkState, Mac, State};
    use bridge_scripts::vif::{Script, Settings, online, vlan};

    let bridge = |filtering: Option<u8>| {
        // IFLA_BR_VLAN_FILTERING of linux/if_link.h.
        Kind::Bridge(filtering.map(|on| (7, vec![on])).into_iter().collect::<BTreeMap<_, _>>())
    };
    let state = |filtering, others: &[&str]| {
        let mut state = State::default();
        state.links.insert("xenbr0".into(), LinkState::new(bridge(filtering)));
        state.links.insert("vif1.0".into(), LinkState::new(Kind::Tun));
        for other in others {
            let port = LinkState { master: Some("xenbr0".into()), ..LinkState::new(Kind::Physical) };
            state.links.insert((*other).into(), port);
        }
        state
    };
    let mut settings = Settings::new(Script::Bridge, "vif1.0", Mac([0, 0x16, 0x3e, 0, 0, 1]));
    settings.bridge = Some("xenbr0".into());
    settings.vlans = Some(vlan::parse("10p/20-21").unwrap());
    let plan = online(&settings, &state(Some(1), &["eth0"])).unwrap().to_string();
    for line in [
        "no longer let VLAN 1 through at port vif1.0",
        "let VLAN 10 through at port vif1.0, for untagged frames, leaving untagged",
        "let VLAN 20 through at port vif1.0\n",
        "let VLAN 21 through at port vif1.0\n",
        "add static forwarding entry 00:16:3e:00:00:01 at port vif1.0 in VLAN 21",
    ] {
        assert!(plan.contains(line), "{line}: {plan}");
    }
    let order = |text: &str| plan.find(text).unwrap_or_else(|| panic!("{text}: {plan}"));
    assert!(order("filter what vif1.0 receives") < order("put vif1.0 into xenbr0"), "{plan}");
    assert!(order("add static forwarding entry") < order("switch vif1.0 on"), "{plan}");
    let alone = online(&settings, &state(Some(0), &[])).unwrap().to_string();
    assert!(alone.contains("switch VLAN filtering on on xenbr0"), "{alone}");
    let error = online(&settings, &state(Some(0), &["eth0"])).unwrap_err().to_string();
    assert!(error.contains("its other ports (eth0)") && error.contains("vlan_filtering 1"), "{error}");
    let error = online(&settings, &state(None, &[])).unwrap_err().to_string();
    assert!(error.contains("CONFIG_BRIDGE_VLAN_FILTERING"), "{error}");
}
