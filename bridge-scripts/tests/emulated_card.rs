//! HVM guests have two ports in the bridge with one Ethernet address (libxl's VIF_IOEMU): the paravirtual card's, and the
//! tap of the device model's emulated card. Whichever is live is reached, whatever the other one does.
//!
//! Pairs of veth play both: the far end of a port is the guest's card, a far end that is off is a port without carrier,
//! and a pair that is deleted is a tap whose device model has closed it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod vif_common;

use std::time::{Duration, Instant};

use vif_common::cable::{Beside, Cable, has};
use vif_common::frames::{EVERYBODY, Mac, ether, ip4, udp};
use vif_common::{PATIENCE, Scene, alone, becomes, now, sh, shown};

const GUEST: Mac = [0x00, 0x16, 0x3e, 0, 0, 1];
const OTHER: Mac = [0x00, 0x16, 0x3e, 0, 0, 2];
const STATION: Mac = [0x00, 0x50, 0x56, 0, 0, 9];

struct Stage {
    scene: Scene,
    beside: Beside,
    /// A station on the card's network.
    outside: Cable,
    /// The guest's paravirtual card.
    paravirtual: Cable,
    /// Its emulated one.
    emulated: Option<Cable>,
    sent: std::cell::Cell<u32>,
}

impl Stage {
    /// A guest at the moment when libxl has run both hotplug programs: the frontend is not connected.
    fn new(keys: &[(&str, &str)]) -> Self {
        let (scene, beside) = (Scene::new(), Beside::new());
        sh("ip link add xenbr0 type bridge mcast_snooping 0");
        sh("ip link set xenbr0 mtu 1400 up");
        let outside = beside.pair("eth0", "outside");
        sh("ip link set eth0 master xenbr0 up");
        let paravirtual = beside.pair("vif1.0", "pv");
        let stage = Self { scene, beside, outside, paravirtual, emulated: None, sent: std::cell::Cell::new(0) };
        stage.connect(false);
        let mut all = vec![("bridge", "xenbr0")];
        all.extend(keys);
        stage.scene.describe(1, 0, "00:16:3e:00:00:01", &all);
        assert!(stage.program(&["online", "type_if=vif"]));
        stage
    }

    fn program(&self, words: &[&str]) -> bool {
        self.scene.program("vif-bridge", 1, 0, words)
    }

    /// The device model starts.
    fn plug(&mut self) {
        self.emulated = Some(self.beside.pair("vif1.0-emu", "emu"));
        assert!(self.program(&["add", "type_if=tap"]), "{}", self.scene.log());
        self.carries("vif1.0-emu");
    }

    /// The device model closes its tap: nobody is told.
    fn unplug(&mut self) {
        sh("ip link del vif1.0-emu");
        self.emulated = None;
    }

    /// The frontend connects, or leaves.
    fn connect(&self, on: bool) {
        self.beside.run(&format!("ip link set pv {}", if on { "up" } else { "down" }));
        if on {
            self.carries("vif1.0");
        }
    }

    /// Waits until the bridge forwards to a port.
    fn carries(&self, port: &str) {
        let begin = Instant::now();
        while !sh(&format!("bridge link show dev {port}")).contains("state forwarding") {
            assert!(begin.elapsed() < PATIENCE, "{port} does not forward");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn text(&self) -> String {
        self.sent.set(self.sent.get() + 1);
        format!("number {:04}", self.sent.get())
    }

    fn frame(to: Mac, from: Mac, source: [u8; 4], text: &str) -> Vec<u8> {
        ether(to, from, 0x0800, &ip4(source.into(), [10, 0, 0, 9].into(), 17, 0, &udp(1, 2, text.as_bytes())))
    }

    /// A frame for the guest's address arrives at the card that is live, and one for a stranger does not.
    #[track_caller]
    fn reaches(&self, card: &Cable, when: &str) {
        card.received();
        let (stranger, text) = (self.text(), self.text());
        self.outside.send(&Self::frame([0, 0x16, 0x3e, 9, 9, 9], STATION, [10, 0, 0, 9], &stranger));
        self.outside.send(&Self::frame(GUEST, STATION, [10, 0, 0, 9], &text));
        let (begin, mut got) = (Instant::now(), Vec::new());
        while !got.iter().any(|frame: &Vec<u8>| has(frame, text.as_bytes())) {
            assert!(begin.elapsed() < PATIENCE, "{when}: the guest is not reached\n{}", self.ports());
            std::thread::sleep(Duration::from_millis(1));
            got.extend(card.received());
        }
        assert!(
            !got.iter().any(|frame| has(frame, stranger.as_bytes())),
            "{when}: what is for others reaches the guest"
        );
    }

    /// What the guest sends from a card arrives outside; what is forged does not.
    #[track_caller]
    fn sends(&self, card: &Cable, when: &str) {
        self.outside.received();
        let (forged, also, text) = (self.text(), self.text(), self.text());
        card.send(&Self::frame(EVERYBODY, OTHER, [10, 0, 0, 11], &forged));
        card.send(&Self::frame(EVERYBODY, GUEST, [10, 0, 0, 12], &also));
        card.send(&Self::frame(EVERYBODY, GUEST, [10, 0, 0, 11], &text));
        let (begin, mut got) = (Instant::now(), Vec::new());
        while !got.iter().any(|frame: &Vec<u8>| has(frame, text.as_bytes())) {
            assert!(begin.elapsed() < PATIENCE, "{when}: nothing arrives outside\n{}", self.ports());
            std::thread::sleep(Duration::from_millis(1));
            got.extend(self.outside.received());
        }
        for text in [forged, also] {
            assert!(!got.iter().any(|frame| has(frame, text.as_bytes())), "{when}: a forged frame gets through");
        }
    }

    fn ports(&self) -> String {
        sh("bridge -d link") + &sh("bridge fdb show br xenbr0") + &self.scene.log()
    }
}

#[test]
fn the_live_card_of_an_hvm_guest_is_reached() {
    alone("the_live_card_of_an_hvm_guest_is_reached", || {
        let mut stage = Stage::new(&[("ip", "10.0.0.11")]);
        // Twice: the second time as after a reboot, which makes a new domain and all devices anew.
        for round in 0..2 {
            stage.plug();
            let card = stage.emulated.take().unwrap();
            assert!(sh("ip -o link show vif1.0-emu").contains("mtu 1400"));
            stage.reaches(&card, "before the unplug, silent");
            stage.sends(&card, "before the unplug");
            stage.reaches(&card, "before the unplug");
            assert!(stage.scene.rules("vif1.0-emu").is_some());
            stage.unplug();
            // Between the unplug and the connection nobody is there. Then nothing but the carrier tells the bridge.
            stage.connect(true);
            stage.reaches(&stage.paravirtual, "after the unplug, silent");
            stage.sends(&stage.paravirtual, "after the unplug");
            stage.reaches(&stage.paravirtual, "after the unplug");
            assert!(stage.program(&["remove", "type_if=tap"]));
            stage.reaches(&stage.paravirtual, "after the tap's hotplug program");
            if round == 0 {
                assert!(stage.program(&["offline", "type_if=vif"]));
                stage.scene.nothing_left();
                sh("ip link del vif1.0");
                stage.paravirtual = stage.beside.pair("vif1.0", "pv");
                stage.connect(false);
                assert!(stage.program(&["online", "type_if=vif"]));
            }
        }
        assert!(stage.program(&["offline", "type_if=vif"]));
        stage.scene.nothing_left();
    });
}

#[test]
fn an_emulated_card_alone_is_reached_for_ever() {
    alone("an_emulated_card_alone_is_reached_for_ever", || {
        let mut stage = Stage::new(&[("ip", "10.0.0.11")]);
        stage.plug();
        let card = stage.emulated.take().unwrap();
        stage.sends(&card, "without drivers");
        stage.reaches(&card, "without drivers");
        // Once more, and nothing changes.
        let before = shown();
        assert!(stage.program(&["online", "type_if=vif"]) && stage.program(&["add", "type_if=tap"]));
        becomes(now, &before, "called once more");
        // The backend is killed, and its interface goes; the emulated card is found by what it sends.
        sh("ip link del vif1.0");
        stage.sends(&card, "without a backend");
        stage.reaches(&card, "without a backend");
        // It comes back, as netback makes it again.
        stage.paravirtual = stage.beside.pair("vif1.0", "pv");
        stage.connect(false);
        assert!(stage.program(&["online", "type_if=vif"]));
        stage.reaches(&card, "with the backend back");
        stage.sends(&card, "with the backend back");
        stage.reaches(&card, "with the backend back, heard");
        // A guest that connects without an unplug has both; then the paravirtual card gets the frames.
        stage.connect(true);
        stage.sends(&card, "with both cards");
        stage.reaches(&stage.paravirtual, "with both cards");
        stage.sends(&stage.paravirtual, "with both cards");
        // It leaves: the emulated card is live again.
        stage.connect(false);
        stage.reaches(&card, "after the frontend has left");
        assert!(stage.program(&["remove", "type_if=tap"]) && stage.program(&["offline", "type_if=vif"]));
        stage.scene.nothing_left();
    });
}

#[test]
fn names_and_vlans_hold_for_both_cards() {
    alone("names_and_vlans_hold_for_both_cards", || {
        let mut stage = Stage::new(&[("ip", "10.0.0.11"), ("vifname", "web")]);
        stage.emulated = Some(stage.beside.pair("vif1.0-emu", "emu"));
        assert!(stage.program(&["add", "type_if=tap"]), "{}", stage.scene.log());
        stage.carries("web-emu");
        let card = stage.emulated.take().unwrap();
        stage.sends(&card, "under another name");
        stage.reaches(&card, "under another name");
        sh("ip link del web-emu");
        stage.beside.run("ip link set pv up");
        stage.carries("web");
        stage.reaches(&stage.paravirtual, "under another name, after the unplug");
        assert!(stage.program(&["remove", "type_if=tap"]) && stage.program(&["offline", "type_if=vif"]));
        stage.scene.nothing_left();
    });
}

/// As text, because this kernel may have no VLAN filtering to try it on.
#[test]
fn vlans_of_both_cards() {
    use std::collections::BTreeMap;

    use bridge_scripts::plan::Plan;
    use bridge_scripts::state::{Kind, LinkState, Mac, State};
    use bridge_scripts::vif::{Script, Settings, online, vlan};

    let mut state = State::default();
    // IFLA_BR_VLAN_FILTERING of linux/if_link.h.
    state.links.insert("xenbr0".into(), LinkState::new(Kind::Bridge(BTreeMap::from([(7, vec![1])]))));
    for port in ["vif1.0", "vif1.0-emu"] {
        let link = LinkState { mac: Some(Mac::XEN), ..LinkState::new(Kind::Tun) };
        state.links.insert(port.into(), link);
    }
    let settings = |vif: &str| Settings {
        bridge: Some("xenbr0".into()),
        vlans: Some(vlan::parse("10p/20").unwrap()),
        ..Settings::new(Script::Bridge, vif, Mac(GUEST))
    };
    let first = online(&settings("vif1.0"), &state).unwrap();
    assert!(!first.to_string().contains("sticky"), "{first}");
    let state = first.outcome(&state);
    let plan = online(&settings("vif1.0-emu"), &state).unwrap();
    let text = plan.to_string();
    for line in [
        "let VLAN 10 through at port vif1.0-emu, for untagged frames, leaving untagged",
        "let VLAN 20 through at port vif1.0-emu\n",
        "static forwarding entry 00:16:3e:00:00:01 at port vif1.0 in VLAN 10, sticky",
        "static forwarding entry 00:16:3e:00:00:01 at port vif1.0 in VLAN 20, sticky",
        "send the frames for vif1.0 to vif1.0-emu while it has no carrier",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert!(!text.contains("switch vif1.0 off"), "{text}");
    // And back: the entries are the former ones again.
    let after = plan.outcome(&state);
    let mut undo = Plan::new("back");
    undo.steps = plan.undo(&state).into_iter().rev().flatten().collect();
    let back = undo.outcome(&after);
    let sorted = |state: &State| {
        let mut entries: Vec<String> = state.fdb.iter().map(ToString::to_string).collect();
        entries.sort();
        (entries, state.links.clone())
    };
    assert_eq!(sorted(&back), sorted(&state));
}
