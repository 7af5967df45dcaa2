//! Our encoding of nf_tables beside the program nft: both must make the kernel have the same table.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod vif_common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bridge_scripts::nft::{
    Action, Chain, Change, CtState, Error, Family, Field, Hook, HookKind, HookPoint, Match, Nft, Policy, Rule, Set,
    SetKind, Table,
};
use vif_common::{alone, have, nft_reads, sh, try_sh};

fn hook(kind: HookKind, point: HookPoint, policy: Policy) -> Hook {
    Hook { kind, point, priority: 0, policy }
}

fn table(family: Family, hook: Hook, rules: impl IntoIterator<Item = Rule>) -> Table {
    let chain = Chain { name: "c".to_owned(), hook: Some(hook), rules: rules.into_iter().collect() };
    let sets = match family {
        Family::Inet => vec![
            Set::of("four", SetKind::Ipv4, [("10.0.0.1".parse().unwrap(), 32), ("10.1.0.0".parse().unwrap(), 16)]),
            Set::of("six", SetKind::Ipv6, [("2001:db8::1".parse().unwrap(), 128), ("fe80::".parse().unwrap(), 10)]),
            Set::of("every", SetKind::Ipv4, [("0.0.0.0".parse().unwrap(), 0)]),
            Set::of("empty", SetKind::Ipv6, []),
        ],
        _ => Vec::new(),
    };
    Table { family, name: "xen-test1.0".to_owned(), sets, chains: vec![chain] }
}

fn forward() -> Hook {
    hook(HookKind::Filter, HookPoint::Forward, Policy::Accept)
}

fn inet(conditions: impl Into<Vec<Match>>, action: Action) -> Table {
    table(Family::Inet, forward(), [Rule::new(conditions, action)])
}

/// Every kind of match and action, in the families that have it.
fn tables() -> Vec<(String, Table)> {
    let mut tables = Vec::new();
    let mut add = |name: &str, table: Table| tables.push((name.to_owned(), table));
    let accept = |conditions: Vec<Match>| inet(conditions, Action::Accept);
    let v4 = Ipv4Addr::new(192, 168, 17, 1);
    let v6: Ipv6Addr = "2001:db8::17".parse().unwrap();
    add("ip saddr", accept(vec![Match::is(Field::IpSaddr, v4)]));
    add("not ip saddr", accept(vec![Match::not(Field::IpSaddr, v4)]));
    add("ip6 saddr", accept(vec![Match::is(Field::Ip6Saddr, v6), Match::not(Field::Iifname, "vif1.0")]));
    add("oifname", inet([Match::not(Field::Oifname, "eth0")], Action::Drop));
    for (prefix, network) in [(1, "128.0.0.0"), (8, "10.0.0.0"), (12, "172.16.0.0"), (24, "10.1.2.0"), (31, "10.0.0.2")]
    {
        let network: IpAddr = network.parse().unwrap();
        add(&format!("{network}/{prefix}"), accept(vec![Match::network(Field::IpSaddr, network, prefix)]));
    }
    add("/32", accept(vec![Match::network(Field::IpSaddr, v4, 32)]));
    add("ff02::/16", accept(vec![Match::network(Field::Ip6Saddr, "ff02::".parse::<Ipv6Addr>().unwrap(), 16)]));
    add("/104", accept(vec![Match::network(Field::Ip6Saddr, "ff02::1:ff00:0".parse::<Ipv6Addr>().unwrap(), 104)]));
    for (field, set) in [(Field::IpSaddr, "four"), (Field::IpSaddr, "every"), (Field::Ip6Saddr, "six")] {
        add(set, accept(vec![Match::not(Field::Iifname, "lo"), Match::within(field, set)]));
    }
    use CtState::{Established, Related};
    add("ct", accept(vec![Match::Ct(vec![Established, Related])]));
    add("ct related", inet([Match::Ct(vec![Related])], Action::Drop));
    let masquerade = || Rule::new([Match::network(Field::IpSaddr, [10, 0, 0, 0], 8)], Action::Masquerade);
    let nat = Hook { priority: 100, ..hook(HookKind::Nat, HookPoint::Postrouting, Policy::Accept) };
    add("masquerade", table(Family::Inet, nat, [masquerade()]));
    let commented = Rule::new([Match::is(Field::Iifname, "eth0")], Action::Drop).counted().comment("it's mine: no way");
    let points = [HookPoint::Prerouting, HookPoint::Forward, HookPoint::Postrouting];
    for (point, family) in points.into_iter().flat_map(|point| [Family::Inet, Family::Ip].map(|f| (point, f))) {
        let hook = hook(HookKind::Filter, point, Policy::Drop);
        add(&format!("{point:?} {family}"), table(family, hook, [commented.clone()]));
    }
    let rules = [Rule::new([Match::is(Field::IpSaddr, v4), Match::is(Field::Iifname, "vif1.0")], Action::Drop)];
    add("ip", table(Family::Ip, forward(), rules));
    add("ip6", table(Family::Ip6, forward(), [Rule::new([Match::is(Field::Ip6Saddr, v6)], Action::Drop)]));
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
        // The administrator's own.
        nft_reads(
            "add table inet filter\n\
             add chain inet filter input { type filter hook input priority 0; }\n\
             add rule inet filter input tcp dport 22 accept\n",
        )
        .unwrap();
        let own = || sh("nft -a list table inet filter");
        let before = own();
        let mut nft = Nft::open().unwrap();
        let good = inet([Match::is(Field::Iifname, "vif1.0")], Action::Drop);
        let name = good.name.clone();
        nft.apply(&[Change::Delete(Family::Inet, name.clone())]).unwrap();
        nft.apply(&[Change::Replace(good)]).unwrap();
        let with_good = sh("nft list ruleset");

        // The second change has a rule that only the kernel refuses (there is no NAT for what was forwarded already):
        // the first is not made either.
        let rule = Rule::new([], Action::Masquerade);
        let mut bad = table(Family::Inet, hook(HookKind::Nat, HookPoint::Postrouting, Policy::Accept), [rule]);
        bad.name = "xen-bad".to_owned();
        bad.chains.push(Chain { name: "d".to_owned(), ..bad.chains[0].clone() });
        bad.chains[1].hook.as_mut().unwrap().priority = i32::MIN;
        let other = inet([Match::is(Field::Iifname, "vif7.0")], Action::Drop);
        let error = nft.apply(&[Change::Replace(other.clone()), Change::Replace(bad)]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Refused { .. }), "{error:?}");
        assert!(text.starts_with("table inet xen-bad: chain d"), "{text}");
        assert_eq!(sh("nft list ruleset"), with_good);

        // A replacement replaces everything, the sets too.
        nft.apply(&[Change::Replace(other.clone())]).unwrap();
        let now = sh("nft -nn list table inet xen-test1.0");
        assert!(now.contains("vif7.0") && !now.contains("vif1.0"), "{now}");
        nft.apply(&[Change::Replace(other.clone()), Change::Replace(other)]).unwrap();
        let names = |nft: &mut Nft| {
            let mut names: Vec<String> = nft.tables().unwrap().iter().map(|(f, name)| format!("{f} {name}")).collect();
            names.sort();
            names
        };
        assert_eq!(names(&mut nft), ["inet filter", "inet xen-test1.0"]);
        nft.apply(&[Change::Delete(Family::Inet, name.clone())]).unwrap();
        nft.apply(&[Change::Delete(Family::Inet, name)]).unwrap();
        nft.apply(&[]).unwrap();
        assert_eq!(names(&mut nft), ["inet filter"]);
        assert_eq!(own(), before);
    });
}

#[test]
fn malformed_tables_never_reach_the_kernel() {
    let v4 = Ipv4Addr::new(10, 0, 0, 1);
    let v6 = Ipv6Addr::LOCALHOST;
    let cases: Vec<(Vec<Match>, Action, &str)> = vec![
        (vec![Match::is(Field::IpSaddr, "eth0")], Action::Drop, "ip saddr is not compared"),
        (vec![Match::is(Field::IpSaddr, v6)], Action::Drop, "ip saddr is not compared"),
        (vec![Match::is(Field::Ip6Saddr, v4)], Action::Drop, "ip6 saddr is not compared"),
        (vec![Match::is(Field::Iifname, v4)], Action::Drop, "iifname is not compared"),
        (vec![Match::is(Field::Iifname, "a-name-that-is-too-long")], Action::Drop, "no name of a device"),
        (vec![Match::is(Field::Iifname, "a b")], Action::Drop, "no name of a device"),
        (vec![Match::within(Field::IpSaddr, "nosuch")], Action::Drop, "there is no set nosuch"),
        (vec![Match::within(Field::IpSaddr, "six")], Action::Drop, "the other kind"),
        (vec![Match::within(Field::Oifname, "four")], Action::Drop, "is no address"),
        (vec![Match::network(Field::IpSaddr, v4, 33)], Action::Drop, "1 to 32 bits"),
        (vec![Match::network(Field::IpSaddr, v4, 0)], Action::Drop, "1 to 32 bits"),
        (vec![Match::Ct(vec![])], Action::Drop, "without a state"),
        (vec![], Action::Masquerade, "masquerade belongs"),
    ];
    for (conditions, action, expected) in cases {
        let error = inet(conditions, action).check().expect_err(expected).to_string();
        assert!(error.contains(expected) && error.contains("table inet xen-test1.0: chain c: rule `"), "{error}");
    }
    let spoilt = |spoil: &dyn Fn(&mut Table), expected: &str| {
        let mut table = inet([Match::is(Field::Ip6Saddr, v6)], Action::Accept);
        spoil(&mut table);
        let error = table.check().expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    spoilt(&|t| t.name = "a b".to_owned(), "no name for nftables");
    spoilt(&|t| t.name = String::new(), "no name for nftables");
    spoilt(&|t| t.chains.push(t.chains[0].clone()), "two of this name");
    spoilt(&|t| t.sets[1].name = "four".to_owned(), "two of this name");
    spoilt(&|t| t.family = Family::Netdev, "not made any more");
    spoilt(&|t| t.family = Family::Ip, "is not seen by the family ip");
    spoilt(&|t| t.chains[0].hook.as_mut().unwrap().kind = HookKind::Nat, "no NAT at this hook");
    spoilt(&|t| t.chains[0].rules[0].comment = Some("\"".to_owned()), "no quotes");
    spoilt(&|t| t.chains[0].rules[0].comment = Some("x".repeat(128)), "at most 127");
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
