//! The filter is there, and not only believed to be: what the kernel has lost, or somebody has deleted, comes back.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod vif_common;

use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bridge_scripts::apply::{FilterGuard, Follower, Guard, look};
use bridge_scripts::state::What;
use bridge_scripts::vif::{Settings, online};
use vif_common::cable::{Beside, has};
use vif_common::frames::{EVERYBODY, ether, ip4, udp};
use vif_common::{PATIENCE, Scene, alone, alone_with_taps, have, nft_reads, sh};

/// One guest online, and its filter as tc lists it.
fn online_guest() -> (Scene, String) {
    let scene = Scene::new();
    sh("ip link add xenbr0 type bridge");
    sh("ip link set xenbr0 up");
    scene.vif(1, 0, "00:16:3e:00:00:01", &[("bridge", "xenbr0"), ("ip", "10.0.0.1 10.0.0.64/28 2001:db8::1")]);
    scene.online("vif-bridge", 1, 0).unwrap();
    let listed = listed("vif1.0");
    (scene, listed)
}

fn listed(device: &str) -> String {
    vif_common::try_sh(&format!("tc filter show dev {device} ingress")).unwrap_or_default()
}

/// Ways to lose a filter. Behind three limits come five programs, and what drops the rest.
const LOSSES: [(&str, &[&str]); 6] = [
    ("the qdisc", &["qdisc del dev vif1.0 clsact"]),
    ("all classifiers", &["filter del dev vif1.0 ingress"]),
    ("the first program", &["filter del dev vif1.0 ingress prio 4"]),
    ("what drops the rest", &["filter del dev vif1.0 ingress prio 9"]),
    (
        "a program that lets all pass",
        &["filter replace dev vif1.0 ingress prio 4 handle 1 bpf da bytecode", "1,6 0 0 0"],
    ),
    ("two of them", &["filter del dev vif1.0 ingress prio 6", "", "filter del dev vif1.0 ingress prio 7"]),
];

/// Words of tc; a text behind them is one word. An empty text begins another command.
fn lose(words: &[&str]) {
    for words in words.split(|words| words.is_empty()) {
        let mut command = Command::new("tc");
        command.args(words[0].split(' ')).args(&words[1..]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn what_the_kernel_lost_is_sent_again() {
    if !have("tc", "lost filters") {
        return;
    }
    alone_with_taps("what_the_kernel_lost_is_sent_again", || {
        let (scene, wanted) = online_guest();
        assert!(wanted.matches("direct-action").count() == 6, "{wanted}");
        scene.online("vif-bridge", 1, 0).unwrap();
        assert_eq!(plan(&scene), "", "nothing is sent that is there");
        for (loss, words) in LOSSES {
            lose(words);
            assert_ne!(listed("vif1.0"), wanted, "{loss}");
            // With the interface switched off meanwhile, as every change is made.
            let plan = plan(&scene);
            let place = |step: &str| plan.find(step).unwrap_or_else(|| panic!("{loss}: {step}: {plan}"));
            assert!(place("switch vif1.0 off") < place("filter what vif1.0 receives"), "{plan}");
            assert!(place("filter what vif1.0 receives") < place("switch vif1.0 on"), "{plan}");
            scene.online("vif-bridge", 1, 0).unwrap();
            assert_eq!(listed("vif1.0"), wanted, "{loss}");
            assert!(sh("ip -o link show vif1.0").contains(",UP"), "{loss}");
        }
        // As a killed backend leaves it: the tap is another one.
        sh("ip link del vif1.0");
        sh("ip tuntap add vif1.0 mode tap");
        scene.online("vif-bridge", 1, 0).unwrap();
        assert_eq!(listed("vif1.0"), wanted);
        scene.offline("vif-bridge", 1, 0).unwrap();
        scene.nothing_left();
    });
}

fn plan(scene: &Scene) -> String {
    let record = std::fs::read_to_string(scene.run().join("vif-vif1.0.json")).unwrap();
    let settings: Settings = serde_json::from_str(&record).unwrap();
    let what = What {
        addresses: true,
        fdb: true,
        tables: true,
        filters: vec!["vif1.0".to_owned()],
        records: vec!["vif-vif1.0.json".to_owned()],
        ..What::links(["vif1.0", "xenbr0"])
    };
    online(&settings, &look(&scene.run(), &what).unwrap()).unwrap().to_string()
}

/// Waits until it is so.
#[track_caller]
fn becomes_so(what: &str, so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !so() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_somebody_deletes_comes_back_by_itself() {
    if !have("tc", "deleted filters") {
        return;
    }
    alone_with_taps("what_somebody_deletes_comes_back_by_itself", || {
        let (scene, wanted) = online_guest();
        let comes_back = |loss: &str| becomes_so(&format!("{loss} comes back"), || listed("vif1.0") == wanted);
        lose(LOSSES[0].1);
        // What went missing before anybody watched.
        let (guard, follower) =
            (FilterGuard::start(scene.options.clone()).unwrap(), Follower::start(scene.options.clone()).unwrap());
        comes_back("the filter");
        for (loss, words) in LOSSES.iter().chain(&LOSSES) {
            lose(words);
            comes_back(loss);
            assert!(sh("ip -o link show vif1.0").contains(",UP"), "{loss}: the interface is on");
        }
        // It is watched under another name too.
        sh("ip link set vif1.0 down");
        sh("ip link set vif1.0 name web");
        assert_eq!(listed("web"), wanted, "a filter stays at its device");
        becomes_so("the record follows", || scene.rules("web").is_some());
        sh("tc qdisc del dev web clsact");
        becomes_so("the filter of a renamed interface comes back", || listed("web") == wanted);
        sh("ip link set web name vif1.0");
        becomes_so("the record follows back", || scene.rules("vif1.0").is_some());
        // An interface that goes offline takes its filter along.
        scene.offline("vif-bridge", 1, 0).unwrap();
        drop((guard, follower));
        scene.nothing_left();
    });
}

/// Where the filter cannot be put back, the guest is cut off.
#[test]
fn without_its_filter_an_interface_is_switched_off() {
    if !have("tc", "filters that cannot come back") {
        return;
    }
    alone_with_taps("without_its_filter_an_interface_is_switched_off", || {
        let (scene, _) = online_guest();
        let _guard = FilterGuard::start(scene.options.clone()).unwrap();
        sh("ip link set vif1.0 down");
        // Somebody else's, in a place of ours: the kernel takes ours no longer.
        lose(&["qdisc del dev vif1.0 clsact"]);
        becomes_so("it is put back", || scene.rules("vif1.0").is_some());
        drop(_guard);
        lose(&["filter del dev vif1.0 ingress prio 5"]);
        lose(&["filter add dev vif1.0 ingress prio 5 protocol ip bpf da bytecode", "1,6 0 0 0"]);
        sh("ip link set vif1.0 up");
        let _guard = FilterGuard::start(scene.options.clone()).unwrap();
        becomes_so("it is switched off", || !sh("ip -o link show vif1.0").contains(",UP"));
        let error = scene.online("vif-bridge", 1, 0).unwrap_err().to_string();
        assert!(error.contains("filter what vif1.0 receives"), "{error}");
        assert!(!sh("ip -o link show vif1.0").contains(",UP"));
    });
}

/// What was said.
static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());

#[test]
fn rates_are_there_or_it_is_said_once_that_they_are_not() {
    if !have("tc", "rates") {
        return;
    }
    alone_with_taps("rates_are_there_or_it_is_said_once_that_they_are_not", || {
        let mut scene = Scene::new();
        scene.options.say = |line| SAID.lock().unwrap().push(line.to_owned());
        sh("ip link add xenbr0 type bridge");
        for domid in [1, 2] {
            scene.vif(domid, 0, &format!("00:16:3e:00:00:0{domid}"), &[("bridge", "xenbr0")]);
            scene.online("vif-bridge", domid, 0).unwrap();
            let (listed, said) = (listed(&format!("vif{domid}.0")), SAID.lock().unwrap().clone());
            assert_eq!(listed.matches("direct-action").count(), 6, "{listed}");
            if said.is_empty() {
                assert_eq!(listed.matches("pkts_rate").count(), 3, "{listed}");
                assert!(listed.contains("pkts_rate 500 pkts_burst 1000"), "{listed}");
            } else {
                assert_eq!(said.len(), 1, "{said:?}");
                assert!(said[0].contains("act_police"), "{said:?}");
                assert!(!listed.contains("police"), "{listed}");
            }
        }
    });
}

/// Before, the filter was a table of nftables with programs in front of it.
#[test]
fn what_a_former_version_left_goes() {
    if !have("tc", "tables of a former version") || !have("nft", "tables of a former version") {
        return;
    }
    alone_with_taps("what_a_former_version_left_goes", || {
        let scene = Scene::new();
        sh("ip link add xenbr0 type bridge");
        let copy = scene.run().join("table-netdev-xen-vif1.0.json");
        let former = || {
            nft_reads(
                "table netdev xen-vif1.0 {\n\tchain ingress {\n\t\ttype filter hook ingress device \"vif1.0\" priority 0; \
                 policy drop;\n\t}\n}\n",
            )
            .unwrap();
            std::fs::create_dir_all(scene.run()).unwrap();
            let hook = r#"{"kind":"filter","point":"ingress","priority":0,"device":"vif1.0","policy":"drop"}"#;
            let rule = r#"{"matches":[{"is":["ether-saddr","ne",{"mac":[0,22,62,0,0,1]}]},{"limit":{"over":true,"rate":500,"burst":1000}}],"counter":true,"action":"drop","comment":"too much"}"#;
            let text = format!(
                r#"{{"family":"netdev","name":"xen-vif1.0","sets":[{{"name":"addresses4","kind":"ipv4","ranges":[["1.0.0.0","126.255.255.255"]]}}],"chains":[{{"name":"ingress","hook":{hook},"rules":[{rule}]}}]}}"#
            );
            std::fs::write(&copy, text).unwrap();
        };
        let gone = || !sh("nft list tables").contains("xen-") && !copy.exists();
        // What was there when the new version came: online again, and offline; the table alone, or its copy alone.
        for (event, what) in
            [("online", ""), ("offline", ""), ("online", "table"), ("online", "copy"), ("offline", "copy")]
        {
            scene.vif(1, 0, "00:16:3e:00:00:01", &[("bridge", "xenbr0")]);
            former();
            lose(&["qdisc add dev vif1.0 clsact"]);
            for priority in 1..=5 {
                let words = format!("filter add dev vif1.0 ingress prio {priority} handle 1 bpf da bytecode");
                lose(&[&words, "1,6 0 0 0"]);
            }
            match what {
                "table" => std::fs::remove_file(&copy).unwrap(),
                "copy" => drop(sh("nft flush ruleset")),
                _ => {}
            }
            // Who watches does not make it again.
            let _guard = Guard::start(scene.options.clone()).unwrap();
            if event == "online" {
                scene.online("vif-bridge", 1, 0).unwrap();
                assert!(gone(), "{what}");
                assert!(scene.rules("vif1.0").is_some(), "{}", listed("vif1.0"));
            }
            scene.offline("vif-bridge", 1, 0).unwrap();
            assert!(gone(), "{what}");
            scene.nothing_left();
            sh("ip link del vif1.0");
        }
        // A backend that buries an interface whose toolstack is gone.
        sh("ip tuntap add vif1.0 mode tap");
        former();
        sh("ip link del vif1.0");
        bridge_scripts::apply::forget_filters(&scene.options, &["vif1.0".to_owned()]).unwrap();
        assert!(gone());
    });
}

/// A guest sends forged frames without a pause while somebody flushes nftables again and again.
#[test]
fn no_forged_frame_passes_during_a_flush() {
    if !have("nft", "forged frames during a flush") || !have("tc", "forged frames during a flush") {
        return;
    }
    alone("no_forged_frame_passes_during_a_flush", || {
        let (scene, beside) = (Scene::new(), Beside::new());
        sh("ip link add xenbr0 type bridge mcast_snooping 0");
        sh("ip link set xenbr0 up");
        let (guest, outside) = (beside.pair("vif1.0", "guest1"), beside.pair("eth0", "outside"));
        sh("ip link set eth0 master xenbr0 up");
        scene.describe(1, 0, "00:16:3e:00:00:01", &[("bridge", "xenbr0"), ("ip", "10.0.0.1")]);
        scene.online("vif-bridge", 1, 0).unwrap();
        let frame = |source: [u8; 4], text: &[u8]| {
            let packet = ip4(source.into(), [10, 0, 0, 9].into(), 17, 0, &udp(1, 2, text));
            ether(EVERYBODY, [0x00, 0x16, 0x3e, 0, 0, 1], 0x0800, &packet)
        };
        let (forged, legal) = (frame([10, 0, 0, 2], b"forged"), frame([10, 0, 0, 1], b"legal"));
        // Without the filter the frame is seen: the test looks at the right place.
        sh("tc qdisc del dev vif1.0 clsact");
        let begin = Instant::now();
        let mut seen = false;
        while !seen {
            assert!(begin.elapsed() < PATIENCE, "nothing arrives");
            guest.send(&forged);
            seen = outside.received().iter().any(|frame| has(frame, b"forged"));
        }
        scene.online("vif-bridge", 1, 0).unwrap();
        while outside.received().iter().any(|frame| has(frame, b"forged")) {}
        let (mut sent, mut passed, mut forgeries) = (0u32, 0u32, 0u32);
        let mut count = |frames: Vec<Vec<u8>>| {
            forgeries += frames.iter().filter(|frame| has(frame, b"forged")).count() as u32;
            passed += frames.iter().filter(|frame| has(frame, b"legal")).count() as u32;
        };
        for _ in 0..50 {
            nft_reads("flush ruleset").unwrap();
            for _ in 0..20 {
                guest.send(&forged);
                sent += 1;
            }
            guest.send(&legal);
            count(outside.received());
        }
        let begin = Instant::now();
        let mut last = false;
        while !last {
            assert!(begin.elapsed() < PATIENCE, "what is legal does not arrive");
            guest.send(&legal);
            let frames = outside.received();
            last = frames.iter().any(|frame| has(frame, b"legal"));
            count(frames);
        }
        println!("{sent} forged frames sent in 50 flushes, {forgeries} arrived; {passed} legal ones did");
        assert_eq!(forgeries, 0);
        // The kernel counts what is dropped.
        let counted = sh("tc -s qdisc show dev vif1.0 clsact");
        let dropped = counted.split("dropped ").nth(1).and_then(|text| text.split(',').next()?.parse::<u32>().ok());
        assert!(dropped.is_some_and(|dropped| dropped >= sent), "{counted}");
    });
}
