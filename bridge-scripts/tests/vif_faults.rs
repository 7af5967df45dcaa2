//! Each step of the hotplug programs fails once: nothing is left, and nothing is lost.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod vif_common;

use bridge_scripts::apply::Fault;
use vif_common::{Scene, alone_with_taps, becomes, nft_reads, now, sh, shown, try_sh};

#[test]
fn a_step_that_fails_leaves_nothing() {
    alone_with_taps("a_step_that_fails_leaves_nothing", || {
        // Somebody else's firewall, which gets a rule where the kernel has br_netfilter.
        nft_reads(
            "table ip filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority 0; policy drop;\n\t}\n}\n",
        )
        .unwrap();
        for (script, keys) in [
            ("vif-bridge", &[("bridge", "xenbr0"), ("ip", "10.0.0.5"), ("vifname", "web0")][..]),
            ("vif-route", &[("ip", "10.0.0.5 192.168.17.1/24 2001:db8::5")][..]),
            ("vif-nat", &[][..]),
        ] {
            let mut scene = Scene::new();
            let _ = try_sh("ip link del xenbr0");
            sh("ip link add xenbr0 type bridge");
            sh("ip addr add 10.0.0.254/24 dev xenbr0");
            sh("ip link set xenbr0 up");
            sh("ip route add default via 10.0.0.1 dev xenbr0");
            scene.vif(1, 0, "00:16:3e:00:00:01", keys);
            let state = || {
                let link = sh("ip -o link show vif1.0");
                // Index and the like stay; what the kernel invents about IPv6 does not matter while it is off.
                link + &sh("ip -o -4 addr show")
                    + &sh("ip route")
                    + &sh("ip neigh show proxy")
                    + &sh("nft list ruleset")
                    + &sh("tc filter show dev vif1.0 ingress")
                    + if sh("tc qdisc show dev vif1.0").contains("clsact") { "clsact" } else { "" }
            };
            // Whether a port of xenbr0 is on is seen at the bridge.
            // And a device that was on once keeps its queue.
            let state =
                || state().replace(" linkdown", "").replace("qdisc noop", "qdisc").replace("qdisc pfifo_fast", "qdisc");
            let before = state();
            let mut steps = 0;
            loop {
                scene.options.fault = Some(Fault::FailAfter(steps));
                match scene.online(script, 1, 0) {
                    Ok(()) => break,
                    Err(error) => {
                        assert!(error.to_string().contains("everything was put back"), "{script} {steps}: {error}");
                    }
                }
                assert_eq!(state(), before, "{script}: step {steps}");
                assert_eq!(scene.key(1, 0, "hotplug-status").as_deref(), Some("error"));
                steps += 1;
            }
            println!("{script}: each of {steps} steps failed once");
            assert!(steps >= 7, "{script}: {steps}");
            scene.options.fault = None;
            // Offline, failing at each step: whatever happens the interface can be taken offline after all.
            for step in 0..steps {
                scene.online(script, 1, 0).unwrap();
                scene.options.fault = Some(Fault::FailAfter(step));
                let failed = scene.offline(script, 1, 0).is_err();
                scene.options.fault = None;
                scene.offline(script, 1, 0).unwrap();
                scene.nothing_left();
                if !failed {
                    break;
                }
            }
            sh("ip link del vif1.0");
        }
    });
}

#[test]
fn a_change_that_fails_changes_nothing() {
    alone_with_taps("a_change_that_fails_changes_nothing", || {
        sh("ip link add xenbr0 type bridge");
        sh("ip addr add 10.0.0.254/24 dev xenbr0");
        sh("ip addr add 2001:db8::fe/64 dev xenbr0 nodad");
        sh("ip link set xenbr0 up");
        sh("ip route add default via 10.0.0.1 dev xenbr0");
        for (script, first, then) in [
            ("vif-bridge", "10.0.0.5", "10.0.0.6"),
            ("vif-route", "10.0.0.5 192.168.17.1/24 2001:db8::5", "10.0.0.6 192.168.18.1/24 2001:db8::5"),
            ("vif-route", "10.0.0.5 10.0.0.6 2001:db8::5", "10.0.0.5"),
            ("vif-nat", "192.168.9.7", "192.168.9.8"),
        ] {
            let mut scene = Scene::new();
            scene.vif(1, 0, "00:16:3e:00:00:01", &[("ip", first)]);
            scene.online(script, 1, 0).unwrap();
            let before = shown();
            scene.set(1, 0, "ip", then);
            let mut steps = 0;
            for fault in (0..).map(Fault::FailAfter) {
                scene.options.fault = Some(fault);
                if scene.online(script, 1, 0).is_ok() {
                    break;
                }
                becomes(now, &before, &format!("{script} {first} to {then}, {fault:?}"));
                steps += 1;
            }
            println!("{script}: each of {steps} steps of a change failed once");
            assert!(steps >= 3, "{script}: {steps}");
            // What is no longer the guest's is gone everywhere.
            let after = shown();
            for gone in first.split(' ').filter(|address| !then.contains(*address)) {
                let address = gone.split('/').next().unwrap();
                let left: Vec<&str> =
                    after.lines().filter(|line| line.split(' ').any(|word| word == address)).collect();
                assert!(left.is_empty(), "{script}: {gone} is left: {left:?}");
            }
            scene.options.fault = None;
            scene.offline(script, 1, 0).unwrap();
            scene.nothing_left();
            sh("ip link del vif1.0");
        }
    });
}
