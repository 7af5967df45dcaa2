//! The filter is there, and not only believed to be: what the kernel has lost, or somebody has deleted, comes back.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod vif_common;

use std::time::{Duration, Instant};

use bridge_scripts::apply::Guard;
use vif_common::{Scene, alone_with_taps, have, sh};

const TABLE: &str = "netdev xen-vif1.0";

/// One guest online, and its table as nft lists it.
fn online() -> (Scene, String) {
    let scene = Scene::new();
    sh("ip link add xenbr0 type bridge");
    sh("ip link set xenbr0 up");
    scene.vif(1, 0, "00:16:3e:00:00:01", &[("bridge", "xenbr0"), ("ip", "10.0.0.1 10.0.0.64/28 2001:db8::1")]);
    scene.online("vif-bridge", 1, 0).unwrap();
    let listed = rules();
    (scene, listed)
}

fn rules() -> String {
    vif_common::try_sh(&format!("nft -s list table {TABLE}")).unwrap_or_default()
}

/// Ways to lose a filter, of which the table's name tells nothing.
const LOSSES: [(&str, &str); 7] = [
    // What kernels before 6.16 do by themselves when the device goes.
    ("the chain at the device", "delete chain netdev xen-vif1.0 ingress"),
    ("the rules of a chain", "flush chain netdev xen-vif1.0 guest_ip4"),
    ("an address more", "add element netdev xen-vif1.0 addresses4 { 10.0.0.2 }"),
    ("an address less", "delete element netdev xen-vif1.0 addresses6 { 2001:db8::1 }"),
    ("a rule more", "insert rule netdev xen-vif1.0 ingress accept"),
    ("the table", "delete table netdev xen-vif1.0"),
    ("everything", "flush ruleset"),
];

fn lose(command: &str) {
    vif_common::nft_reads(command).unwrap_or_else(|error| panic!("{command}: {error}"));
}

#[test]
fn what_the_kernel_lost_is_sent_again() {
    if !have("nft", "lost filters") {
        return;
    }
    alone_with_taps("what_the_kernel_lost_is_sent_again", || {
        let (scene, wanted) = online();
        let whole = sh("nft -a list ruleset");
        scene.online("vif-bridge", 1, 0).unwrap();
        assert_eq!(sh("nft -a list ruleset"), whole, "nothing is sent that is there");
        for (loss, command) in LOSSES {
            lose(command);
            assert_ne!(rules(), wanted, "{loss}");
            // With the interface switched off meanwhile, as every change is made.
            let plan = plan(&scene);
            let place = |step: &str| plan.find(step).unwrap_or_else(|| panic!("{loss}: {step}: {plan}"));
            assert!(place("switch vif1.0 off") < place("nftables table netdev xen-vif1.0"), "{plan}");
            assert!(place("nftables table netdev xen-vif1.0") < place("switch vif1.0 on"), "{plan}");
            scene.online("vif-bridge", 1, 0).unwrap();
            assert_eq!(rules(), wanted, "{loss}");
            assert!(sh("ip -o link show vif1.0").contains(",UP"), "{loss}");
        }
        // As a killed backend leaves it: the tap is another one.
        sh("ip link del vif1.0");
        lose("delete chain netdev xen-vif1.0 ingress");
        sh("ip tuntap add vif1.0 mode tap");
        scene.online("vif-bridge", 1, 0).unwrap();
        assert_eq!(rules(), wanted);
        scene.offline("vif-bridge", 1, 0).unwrap();
        scene.nothing_left();
    });
}

fn plan(scene: &Scene) -> String {
    use bridge_scripts::apply::look;
    use bridge_scripts::state::What;
    use bridge_scripts::vif::{Settings, online};

    let record = std::fs::read_to_string(scene.run().join("vif-vif1.0.json")).unwrap();
    let settings: Settings = serde_json::from_str(&record).unwrap();
    let what = What {
        addresses: true,
        fdb: true,
        tables: true,
        records: vec!["vif-vif1.0.json".to_owned()],
        ..What::links(["vif1.0", "xenbr0"])
    };
    online(&settings, &look(&scene.run(), &what).unwrap()).unwrap().to_string()
}

/// Waits until the table is as it was.
#[track_caller]
fn comes_back(wanted: &str, loss: &str) {
    let begin = Instant::now();
    while rules() != wanted {
        assert!(begin.elapsed() < Duration::from_secs(60), "{loss}: the filter does not come back: {}", rules());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_somebody_deletes_comes_back_by_itself() {
    if !have("nft", "deleted filters") {
        return;
    }
    alone_with_taps("what_somebody_deletes_comes_back_by_itself", || {
        let (scene, wanted) = online();
        vif_common::nft_reads("table inet admin { chain c { tcp dport 22 accept; }\n}\n").unwrap();
        lose("flush ruleset");
        // What went missing before anybody watched.
        let guard = Guard::start(scene.options.clone()).unwrap();
        comes_back(&wanted, "before the start");
        for (loss, command) in LOSSES.iter().chain(&LOSSES) {
            lose(command);
            comes_back(&wanted, loss);
        }
        // What is the administrator's stays deleted; and an interface that goes offline takes its filter along.
        assert!(!sh("nft list tables").contains("admin"));
        scene.offline("vif-bridge", 1, 0).unwrap();
        lose("flush ruleset");
        drop(guard);
        scene.nothing_left();
    });
}
