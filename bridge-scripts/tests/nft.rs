//! Our encoding of nf_tables beside the program nft: both must make the kernel have the same table.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod vif_common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bridge_scripts::nft::{
    Action, Base, Chain, Change, CtState, Error, Family, Field, Hook, HookKind, HookPoint, Match, Nft, Op, Policy,
    Rule, Set, SetKind, Table, Value,
};
use vif_common::{alone, have, nft_reads, sh, try_sh};

const MAC: [u8; 6] = [0x00, 0x16, 0x3e, 0x5f, 0x77, 0xfd];

fn hook(kind: HookKind, point: HookPoint, device: Option<&str>, policy: Policy) -> Option<Hook> {
    Some(Hook { kind, point, priority: 0, device: device.map(str::to_owned), policy })
}

fn chain(hook: Option<Hook>, rules: impl IntoIterator<Item = Rule>) -> Chain {
    Chain { name: "c".to_owned(), hook, rules: rules.into_iter().collect() }
}

fn table(family: Family, chain: Chain) -> Table {
    let jumped_to = Chain { name: "other".to_owned(), hook: None, rules: vec![Rule::new([], Action::Return)] };
    let sets = match family {
        Family::Netdev | Family::Inet => vec![
            Set::of("four", SetKind::Ipv4, [("10.0.0.1".parse().unwrap(), 32), ("10.1.0.0".parse().unwrap(), 16)]),
            Set::of("six", SetKind::Ipv6, [("2001:db8::1".parse().unwrap(), 128), ("fe80::".parse().unwrap(), 10)]),
            Set::of("every", SetKind::Ipv4, [("0.0.0.0".parse().unwrap(), 0)]),
            Set::of("empty", SetKind::Ipv6, []),
        ],
        _ => Vec::new(),
    };
    Table { family, name: "xen-test1.0".to_owned(), sets, chains: vec![jumped_to, chain] }
}

fn netdev(conditions: impl Into<Vec<Match>>) -> Table {
    let rule = Rule::new(conditions, Action::Accept);
    table(Family::Netdev, chain(hook(HookKind::Filter, HookPoint::Ingress, Some("tap0"), Policy::Drop), [rule]))
}

fn inet(conditions: impl Into<Vec<Match>>, action: Action) -> Table {
    let rule = Rule::new(conditions, action);
    table(Family::Inet, chain(hook(HookKind::Filter, HookPoint::Forward, None, Policy::Accept), [rule]))
}

/// Every kind of match and action, in the families that have it.
fn tables() -> Vec<(String, Table)> {
    let mut tables = Vec::new();
    let mut add = |name: &str, table: Table| tables.push((name.to_owned(), table));
    let numbers = [
        (Field::Protocol, 0x0800),
        (Field::L4proto, 17),
        (Field::EtherType, 0x88a8),
        (Field::VlanId, 411),
        (Field::ArpHtype, 1),
        (Field::ArpPtype, 0x0800),
        (Field::ArpHlen, 6),
        (Field::ArpPlen, 4),
        (Field::ArpOperation, 2),
        (Field::IpVersion, 4),
        (Field::IpLength, 68),
        (Field::IpFragOff, 0x2000),
        (Field::IpProtocol, 17),
        (Field::Ip6Version, 6),
        (Field::Ip6Length, 24),
        (Field::Ip6Nexthdr, 58),
        (Field::Ip6Hoplimit, 255),
        (Field::IcmpType, 5),
        (Field::IgmpType, 0x11),
        (Field::Icmpv6Type, 134),
        (Field::Icmpv6Code, 0),
        (Field::TcpSport, 80),
        (Field::TcpDport, 80),
        (Field::UdpSport, 67),
        (Field::UdpDport, 68),
        (Field::Raw(Base::Network, 320, 64), 0x3a00_0502_0000_0100),
        (Field::Raw(Base::Network, 320, 8), 58),
        (Field::Raw(Base::Link, 0, 48), 5),
        (Field::Raw(Base::Transport, 32, 16), 0xffff),
    ];
    for (field, number) in numbers {
        add(&format!("{field}"), netdev([Match::is(field, number)]));
        let routed = inet([Match::not(field, number)], Action::Drop);
        if routed.check().is_ok() {
            add(&format!("{field} in inet"), routed);
        }
    }
    for op in [Op::Lt, Op::Le, Op::Gt, Op::Ge] {
        add(&format!("{op}"), netdev([Match::Is(Field::IpLength, op, Value::Number(68))]));
        add(&format!("{op} type"), netdev([Match::Is(Field::Protocol, op, Value::Number(0x600))]));
    }
    let v4 = Ipv4Addr::new(192, 168, 17, 1);
    let v6: Ipv6Addr = "2001:db8::17".parse().unwrap();
    add("ether saddr", netdev([Match::not(Field::EtherSaddr, MAC)]));
    add("ether daddr", netdev([Match::is(Field::EtherDaddr, MAC)]));
    add("arp saddr ether", netdev([Match::is(Field::ArpSaddrEther, MAC)]));
    add("arp saddr ip", netdev([Match::is(Field::ArpSaddrIp, v4)]));
    add("raw mac", netdev([Match::is(Field::Raw(Base::Network, 528, 48), MAC)]));
    add("arp daddr ip", netdev([Match::is(Field::ArpDaddrIp, v4)]));
    add("ip saddr", netdev([Match::is(Field::IpSaddr, v4), Match::not(Field::IpDaddr, v4)]));
    add("ip6 saddr", netdev([Match::is(Field::Ip6Saddr, v6), Match::not(Field::Ip6Daddr, v6)]));
    add("inet both", inet([Match::is(Field::Ip6Saddr, v6), Match::is(Field::UdpDport, 53)], Action::Accept));
    for (prefix, network) in [(1, "128.0.0.0"), (8, "10.0.0.0"), (12, "172.16.0.0"), (24, "10.1.2.0"), (31, "10.0.0.2")]
    {
        let network: IpAddr = network.parse().unwrap();
        add(&format!("{network}/{prefix}"), netdev([Match::network(Field::IpSaddr, network, prefix)]));
    }
    add("/32", netdev([Match::network(Field::IpSaddr, v4, 32)]));
    add("ff02::/16", netdev([Match::network(Field::Ip6Daddr, "ff02::".parse::<Ipv6Addr>().unwrap(), 16)]));
    add("solicited", netdev([Match::network(Field::Ip6Daddr, "ff02::1:ff00:0".parse::<Ipv6Addr>().unwrap(), 104)]));
    let ten = IpAddr::from([10, 0, 0, 0]);
    let outside = Match::Network { field: Field::IpSaddr, not: true, network: ten, prefix: 8 };
    add("not in a network", netdev([outside]));
    for not in [false, true] {
        let name = if not { "outside" } else { "between" };
        let ports = Match::Range { field: Field::UdpDport, not, from: 5000.into(), to: 5010.into() };
        add(&format!("{name} ports"), netdev([ports]));
        let vlans = Match::Range { field: Field::VlanId, not, from: 100.into(), to: 199.into() };
        add(&format!("{name} vlans"), netdev([vlans]));
        let addresses = Match::Range { field: Field::IpSaddr, not, from: v4.into(), to: Ipv4Addr::BROADCAST.into() };
        add(&format!("{name} addresses"), netdev([addresses]));
        let set = |field, set: &str| Match::Set { field, not, set: set.to_owned() };
        add(&format!("{name} sets"), netdev([set(Field::IpSaddr, "four")]));
        add(&format!("{name} arp sets"), netdev([set(Field::ArpSaddrIp, "every")]));
        add(&format!("{name} six sets"), inet([set(Field::Ip6Saddr, "six")], Action::Accept));
    }
    add("fragments", netdev([Match::Masked(Field::IpFragOff, 0x1fff, Op::Ne, 0)]));
    add("second fragment", netdev([Match::Masked(Field::IpFragOff, 0x1fff, Op::Eq, 1)]));
    add("limit", netdev([Match::Limit { over: false, rate: 100, burst: 5 }]));
    add(
        "limit over",
        netdev([Match::is(Field::Protocol, 0x0806), Match::Limit { over: true, rate: 2000, burst: 4000 }]),
    );
    use CtState::{Established, Invalid, New, Related};
    add("ct", inet([Match::Ct(vec![Established, Related])], Action::Accept));
    add("ct invalid", inet([Match::Ct(vec![Invalid])], Action::Drop));
    add("ct new", inet([Match::is(Field::Iifname, "vif1.0"), Match::Ct(vec![New])], Action::Return));
    add("oifname", inet([Match::not(Field::Oifname, "eth0")], Action::Continue));
    add("nfproto", inet([Match::is(Field::Nfproto, 2)], Action::Accept));
    add("jump", inet([], Action::Jump("other".to_owned())));
    add("goto", inet([Match::is(Field::UdpSport, 1)], Action::Goto("other".to_owned())));
    let masquerade = Rule::new([Match::network(Field::IpSaddr, [10, 0, 0, 0], 8)], Action::Masquerade);
    let mut nat = chain(hook(HookKind::Nat, HookPoint::Postrouting, None, Policy::Accept), [masquerade]);
    nat.hook.as_mut().unwrap().priority = 100;
    add("masquerade", table(Family::Inet, nat));
    let commented = Rule::new([Match::is(Field::UdpDport, 68)], Action::Drop).counted().comment("it's DHCP: no way");
    let points = [HookPoint::Prerouting, HookPoint::Input, HookPoint::Output, HookPoint::Postrouting];
    for (point, family) in points.into_iter().flat_map(|point| [Family::Inet, Family::Ip].map(|f| (point, f))) {
        let chain = chain(hook(HookKind::Filter, point, None, Policy::Drop), [commented.clone()]);
        add(&format!("{point:?} {family}"), table(family, chain));
    }
    let forward = || hook(HookKind::Filter, HookPoint::Forward, None, Policy::Accept);
    let rules = || [Rule::new([Match::is(Field::IpSaddr, v4), Match::is(Field::Iifname, "vif1.0")], Action::Drop)];
    add("bridge", table(Family::Bridge, chain(forward(), rules())));
    add("ip", table(Family::Ip, chain(forward(), rules())));
    let rules = [Rule::new([Match::is(Field::Ip6Saddr, v6)], Action::Drop)];
    add("ip6", table(Family::Ip6, chain(forward(), rules)));
    let input = hook(HookKind::Filter, HookPoint::Input, None, Policy::Accept);
    let rules = [Rule::new([Match::is(Field::ArpSaddrIp, v4), Match::is(Field::ArpOperation, 2)], Action::Drop)];
    add("arp", table(Family::Arp, chain(input, rules)));
    tables
}

/// What `nft` says of a table, numbers as numbers and counters left out: as text, as JSON, and as the kernel's own
/// instructions.
fn listed(table: &Table) -> [String; 3] {
    let of = |options: &str| sh(&format!("nft {options} list table {} {}", table.family, table.name));
    let json = of("-s -j");
    // Handles count up.
    let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
    strip_handles(&mut json);
    [of("-s -nn"), json.to_string(), of("-s -nn --debug=netlink")]
}

fn strip_handles(json: &mut serde_json::Value) {
    match json {
        serde_json::Value::Object(map) => {
            map.remove("handle");
            map.values_mut().for_each(strip_handles);
        }
        serde_json::Value::Array(list) => list.iter_mut().for_each(strip_handles),
        _ => {}
    }
}

#[test]
fn the_kernel_gets_what_nft_would_send() {
    if !have("nft", "tables beside the program nft") {
        return;
    }
    alone("the_kernel_gets_what_nft_would_send", || {
        sh("ip tuntap add tap0 mode tap");
        let mut nft = Nft::open().unwrap();
        let mut differ = Vec::new();
        let tables = tables();
        for (name, table) in &tables {
            table.check().unwrap_or_else(|error| panic!("{name}: {error}"));
            nft.apply(&[Change::Replace(table.clone())]).unwrap_or_else(|error| panic!("{name}: {error}\n{table}"));
            assert!(nft.holds(table).unwrap(), "{name}: what the kernel tells is not recognised");
            let ours = listed(table);
            nft.apply(&[Change::Delete(table.family, table.name.clone())]).unwrap();
            nft_reads(&table.to_string()).unwrap_or_else(|error| panic!("{name}: nft: {error}\n{table}"));
            let theirs = listed(table);
            // The instructions may differ (nft shortens comparisons of whole bytes); what they mean may not.
            if ours[..2] != theirs[..2] {
                differ.push(format!(
                    "--- {name}\n{table}ours:\n{}theirs:\n{}{}{}",
                    ours[0], theirs[0], ours[2], theirs[2]
                ));
            }
        }
        println!("{} tables", tables.len());
        assert!(differ.is_empty(), "{}", differ.join("\n"));
    });
}

#[test]
fn all_or_nothing() {
    if !have("nft", "that batches are atomic") {
        return;
    }
    alone("all_or_nothing", || {
        sh("ip tuntap add tap0 mode tap");
        // The administrator's own.
        nft_reads(
            "add table inet filter\n\
             add chain inet filter input { type filter hook input priority 0; }\n\
             add rule inet filter input tcp dport 22 accept\n\
             add table netdev own\n\
             add chain netdev own c { type filter hook ingress device \"tap0\" priority 5; }\n\
             add rule netdev own c ip saddr 10.9.9.9 drop\n",
        )
        .unwrap();
        let own = || sh("nft -a list table inet filter") + &sh("nft -a list table netdev own");
        let before = own();
        let mut nft = Nft::open().unwrap();
        let good = netdev([Match::is(Field::EtherSaddr, MAC)]);
        let name = good.name.clone();
        nft.apply(&[Change::Delete(Family::Netdev, name.clone())]).unwrap();
        nft.apply(&[Change::Replace(good)]).unwrap();
        let with_good = sh("nft list ruleset");

        // The second change has a loop of jumps, which only the kernel finds: the first is not made either.
        let mut bad = looping();
        bad.name = "xen-bad".to_owned();
        let other = netdev([Match::is(Field::UdpDport, 7)]);
        let error = nft.apply(&[Change::Replace(other.clone()), Change::Replace(bad)]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Refused { .. }), "{error:?}");
        assert!(text.starts_with("table netdev xen-bad: chain c: rule `jump other`: Too many links"), "{text}");
        assert_eq!(sh("nft list ruleset"), with_good);

        // A replacement replaces everything, the sets too.
        nft.apply(&[Change::Replace(other.clone())]).unwrap();
        let now = sh("nft -nn list table netdev xen-test1.0");
        assert!(now.contains("udp dport 7 accept") && !now.contains("ether saddr"), "{now}");
        nft.apply(&[Change::Replace(other.clone()), Change::Replace(other)]).unwrap();
        let names = |nft: &mut Nft| {
            let mut names: Vec<String> = nft.tables().unwrap().iter().map(|(f, name)| format!("{f} {name}")).collect();
            names.sort();
            names
        };
        assert_eq!(names(&mut nft), ["inet filter", "netdev own", "netdev xen-test1.0"]);

        // Rules outlive their device; deleting them then still works, twice.
        sh("ip link del tap0");
        nft.apply(&[Change::Delete(Family::Netdev, name.clone())]).unwrap();
        nft.apply(&[Change::Delete(Family::Netdev, name)]).unwrap();
        nft.apply(&[]).unwrap();
        assert!(names(&mut nft).iter().all(|name| !name.contains("xen-")));
        assert_eq!(sh("nft -a list table inet filter"), before[..before.find("table netdev").unwrap()]);
    });
}

/// A table that passes our check and not the kernel's.
fn looping() -> Table {
    let mut table = netdev([]);
    table.chains[0].rules = vec![Rule::new([], Action::Jump("again".to_owned()))];
    table.chains[1].rules = vec![
        Rule::new([Match::is(Field::EtherSaddr, MAC)], Action::Accept),
        Rule::new([], Action::Jump("other".to_owned())),
    ];
    let again = Rule::new([Match::is(Field::UdpDport, 5)], Action::Jump("other".to_owned()));
    table.chains.insert(1, Chain { name: "again".to_owned(), hook: None, rules: vec![again] });
    table.check().unwrap();
    table
}

#[test]
fn malformed_tables_never_reach_the_kernel() {
    let with = |conditions: Vec<Match>, action| {
        let mut table = netdev([]);
        table.chains[1].rules = vec![Rule::new(conditions, action)];
        table.check().map_err(|error| error.to_string())
    };
    let v4 = Ipv4Addr::new(10, 0, 0, 1);
    let v6 = Ipv6Addr::LOCALHOST;
    let limit = |rate, burst| Match::Limit { over: true, rate, burst };
    let cases: Vec<(Vec<Match>, Action, &str)> = vec![
        (vec![Match::is(Field::IpSaddr, 5)], Action::Drop, "ip saddr is not compared"),
        (vec![Match::is(Field::IpSaddr, v6)], Action::Drop, "ip saddr is not compared"),
        (vec![Match::is(Field::Ip6Saddr, v4)], Action::Drop, "ip6 saddr is not compared"),
        (vec![Match::is(Field::EtherSaddr, v4)], Action::Drop, "ether saddr is not compared"),
        (vec![Match::is(Field::VlanId, 4096)], Action::Drop, "vlan id is not compared"),
        (vec![Match::is(Field::L4proto, 256)], Action::Drop, "meta l4proto is not compared"),
        (vec![Match::is(Field::UdpDport, 65536)], Action::Drop, "udp dport is not compared"),
        (vec![Match::is(Field::Iifname, "a-name-that-is-too-long")], Action::Drop, "no name of a device"),
        (vec![Match::is(Field::Iifname, "a b")], Action::Drop, "no name of a device"),
        (vec![Match::is(Field::UdpDport, "eth0")], Action::Drop, "udp dport is not compared"),
        (vec![Match::is(Field::Raw(Base::Network, 4, 8), 1)], Action::Drop, "does not begin and end"),
        (vec![Match::is(Field::Raw(Base::Network, 8, 0), 1)], Action::Drop, "does not begin and end"),
        (vec![Match::is(Field::Raw(Base::Network, 8, 136), 1)], Action::Drop, "does not begin and end"),
        (vec![Match::within(Field::IpSaddr, "nosuch")], Action::Drop, "there is no set nosuch"),
        (vec![Match::within(Field::IpSaddr, "six")], Action::Drop, "the other kind"),
        (vec![Match::within(Field::UdpDport, "four")], Action::Drop, "is no address"),
        (vec![Match::network(Field::IpSaddr, v4, 33)], Action::Drop, "1 to 32 bits"),
        (vec![Match::network(Field::IpSaddr, v4, 0)], Action::Drop, "1 to 32 bits"),
        (vec![Match::Masked(Field::IpFragOff, 0x1_0000, Op::Eq, 0)], Action::Drop, "the mask"),
        (vec![Match::Masked(Field::IpFragOff, 0x1fff, Op::Eq, 0x2000)], Action::Drop, "the mask"),
        (vec![limit(0, 5)], Action::Drop, "a limit of nothing"),
        (vec![limit(5, 0)], Action::Drop, "a limit of nothing"),
        (vec![Match::Ct(vec![CtState::New])], Action::Drop, "no connection tracking"),
        (
            vec![Match::Range { field: Field::UdpDport, not: false, from: 9.into(), to: 8.into() }],
            Action::Drop,
            "from the lower to the higher",
        ),
        (vec![], Action::Jump("nosuch".to_owned()), "there is no chain nosuch"),
        (vec![], Action::Jump("c".to_owned()), "has a hook"),
        (vec![], Action::Masquerade, "masquerade belongs"),
    ];
    for (conditions, action, expected) in cases {
        let error = with(conditions, action).expect_err(expected);
        assert!(error.contains(expected) && error.contains("table netdev xen-test1.0: chain c: rule `"), "{error}");
    }
    let spoilt = |spoil: &dyn Fn(&mut Table), expected: &str| {
        let mut table = netdev([]);
        spoil(&mut table);
        let error = table.check().expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    let inet = |field, number: u64| {
        let table = inet([Match::is(field, number)], Action::Accept);
        let error = table.check().expect_err("a field of another family").to_string();
        assert!(error.contains("is not seen by the family inet"), "{error}");
    };
    inet(Field::ArpOperation, 1);
    inet(Field::VlanId, 1);
    inet(Field::EtherType, 1);
    spoilt(&|t| t.name = "a b".to_owned(), "no name for nftables");
    spoilt(&|t| t.name = String::new(), "no name for nftables");
    spoilt(&|t| t.chains[1].name = "other".to_owned(), "two of this name");
    spoilt(&|t| t.sets[1].name = "four".to_owned(), "two of this name");
    spoilt(&|t| t.chains[1].hook.as_mut().unwrap().device = None, "needs a device");
    spoilt(&|t| t.chains[1].hook.as_mut().unwrap().point = HookPoint::Input, "only one");
    spoilt(&|t| t.family = Family::Inet, "ingress is the hook of the family netdev");
    spoilt(&|t| t.chains[1].rules[0].comment = Some("\"".to_owned()), "no quotes");
    spoilt(&|t| t.chains[1].rules[0].comment = Some("x".repeat(128)), "at most 127");
    spoilt(&|t| t.sets[0].ranges.reverse(), "not in order");
    spoilt(&|t| t.sets[0].ranges[0].1 = Ipv6Addr::LOCALHOST.into(), "no range of this set's kind");
}

#[test]
fn a_table_survives_being_stored() {
    for (name, table) in tables() {
        let text = serde_json::to_string(&table).unwrap();
        assert_eq!(serde_json::from_str::<Table>(&text).unwrap(), table, "{name}");
    }
}

#[test]
fn who_may_not_is_told_what_is_missing() {
    // As nobody, in a namespace that root owns.
    alone("who_may_not_is_told_what_is_missing", || {
        let program = if try_sh("setpriv --version").is_ok() { "setpriv" } else { "" };
        if program.is_empty() {
            println!("NOT TESTED: tables without CAP_NET_ADMIN: there is no program setpriv");
            return;
        }
        if std::env::var_os("NFT_AS_NOBODY").is_some() {
            return;
        }
        let status = std::process::Command::new("setpriv")
            .args(["--reuid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["refused_without_the_capability", "--exact", "--ignored", "--nocapture"])
            .output();
        match status {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
            Err(error) => println!("NOT TESTED: tables without CAP_NET_ADMIN: {error}"),
        }
    });
}

/// The part of the test above that runs as nobody.
#[test]
#[ignore = "started by another test"]
fn refused_without_the_capability() {
    let mut nft = Nft::open().unwrap();
    let error = nft.apply(&[Change::Delete(Family::Inet, "xen-nat".to_owned())]).unwrap_err().to_string();
    assert!(error.contains("CAP_NET_ADMIN"), "{error}");
}
