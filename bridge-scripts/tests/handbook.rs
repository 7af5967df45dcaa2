//! What administrators have typed since 2007, line for line, with the program's links in a directory as /etc/xen/scripts.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{World, ok, text};
use hypervisor::emu::{Limits, Machine, Running};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Output};
use tempfile::TempDir;
use xenstore_client::{Client, Store};

/// A machine with two cards, the scripts, and a XenStore.
struct Dom0 {
    world: World,
    dir: TempDir,
    store: Client,
    _machine: Running,
}

impl Dom0 {
    fn new(what: &str) -> Option<Self> {
        let world = World::new(what)?;
        world.card("eth0", &["10.1.0.2/24"], &["10.1.0.1/24"]);
        world.card("eth1", &["10.2.0.2/24"], &["10.2.0.1/24"]);
        world.ip("route add default via 10.1.0.1");
        world.settle();
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("scripts")).unwrap();
        for name in "network-bridge network-vlan network-dummy network-route network-nat vif-bridge vif-route vif-nat \
                     from-xend"
            .split_whitespace()
        {
            symlink(env!("CARGO_BIN_EXE_bridge-scripts"), dir.path().join("scripts").join(name)).unwrap();
        }
        let machine = Machine::start(dir.path().join("machine"), Limits::default()).unwrap();
        let store = hypervisor::Machine::Emulated(dir.path().join("machine")).store().unwrap();
        Some(Self { world, dir, store, _machine: machine })
    }

    fn script(&self, name: &str) -> PathBuf {
        self.dir.path().join("scripts").join(name)
    }

    /// A file in the directory of scripts.
    fn wrapper(&self, name: &str, text: &str) {
        use std::os::unix::fs::PermissionsExt as _;

        fs::write(self.script(name), text).unwrap();
        fs::set_permissions(self.script(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A command line whose first word is a script.
    fn run(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let mut command = Command::new(self.script(words.next().unwrap()));
        command.args(words).env("BRIDGE_SCRIPTS_RUN", self.world.run.path()).output().unwrap()
    }

    #[track_caller]
    fn does(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    #[track_caller]
    fn fails(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(!output.status.success(), "{line} did not fail: {}", text(&output.stdout));
        text(&output.stderr)
    }

    /// xend's configuration in today's commands, run as they are printed.
    fn as_xend_did(&self, sxp: &str) -> String {
        let file = self.dir.path().join("xend-config.sxp");
        fs::write(&file, sxp).unwrap();
        let told = self.does(&format!("from-xend {}", file.display()));
        for line in told.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            self.does(line);
        }
        told
    }

    /// A guest's interface, as libxl writes what stands in `vif = [ '...' ]`, and the hotplug program as it runs it.
    fn guest(&self, script: &str, domid: u16, handle: u32, spec: &str) {
        let name = format!("vif{domid}.{handle}");
        self.world.ip(&format!("tuntap add {name} mode tap"));
        let backend = format!("/local/domain/0/backend/vif/{domid}/{handle}");
        let set = |key: &str, value: &str| self.store.write(&format!("{backend}/{key}"), value).unwrap();
        set("frontend", &format!("/local/domain/{domid}/device/vif/{handle}"));
        set("frontend-id", &domid.to_string());
        set("handle", &handle.to_string());
        set("hotplug-status", "");
        set("mac", &format!("00:16:3e:00:{domid:02x}:{handle:02x}"));
        for part in spec.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap();
            // type= and model= are the emulated card's, and stay in the device model's configuration.
            if !["type", "model"].contains(&key) {
                set(key, value);
            }
        }
        self.hotplug(script, "online", domid, handle);
        assert_eq!(self.store.read_opt(&format!("{backend}/hotplug-status")).unwrap().as_deref(), Some("connected"));
        if spec.contains("type=ioemu") {
            self.world.ip(&format!("tuntap add {name}-emu mode tap"));
            self.hotplug(script, "add", domid, handle);
        }
    }

    fn hotplug(&self, script: &str, event: &str, domid: u16, handle: u32) {
        let (name, tap) = (format!("vif{domid}.{handle}"), event == "add" || event == "remove");
        let mut command = Command::new(self.script(script));
        command.arg(event).arg(if tap { "type_if=tap" } else { "type_if=vif" });
        command.env("XENBUS_TYPE", "vif").env("XENBUS_PATH", format!("backend/vif/{domid}/{handle}"));
        command.env("vif", &name).env("INTERFACE", format!("{name}-emu")).env("netdev", "");
        command.env("HYPERVISOR", format!("emu:{}", self.dir.path().join("machine").display()));
        command.env("BRIDGE_SCRIPTS_RUN", self.world.run.path());
        command.env("XEN_HOTPLUG_LOG", self.dir.path().join("log"));
        ok(&mut command);
    }

    /// The ports of a bridge.
    fn ports(&self, bridge: &str) -> Vec<String> {
        let told = self.world.ip(&format!("-br link show master {bridge}"));
        let name = |line: &str| line.split([' ', '@']).next().unwrap().to_owned();
        let mut ports: Vec<String> = told.lines().map(name).collect();
        ports.sort();
        ports
    }
}

/// Two bridges by one wrapper, as it stands in the handbooks.
const WRAPPER: &str = "#!/bin/sh
dir=$(dirname \"$0\")
\"$dir/network-bridge\" \"$@\" vifnum=0 netdev=eth0 bridge=xenbr0
\"$dir/network-bridge\" \"$@\" vifnum=1 netdev=eth1 bridge=xenbr1
";

#[test]
fn the_picture_of_xen_3() {
    let Some(dom0) = Dom0::new("Xen 3's bridge") else { return };
    let mac = |device: &str| {
        dom0.world.ip(&format!("-o link show {device}")).split("link/ether ").nth(1).unwrap()[..17].to_owned()
    };
    let card = mac("eth0");
    let told = dom0.as_xend_did("(network-script network-bridge)\n(vif-script vif-bridge)\n");
    assert!(told.contains("Add layout=xen3"), "{told}");
    dom0.does("network-bridge stop");
    dom0.does("network-bridge start layout=xen3");
    dom0.guest("vif-bridge", 5, 0, "bridge=xenbr0");
    dom0.guest("vif-bridge", 2, 0, "mac=00:16:3e:3f:a9:06, bridge=xenbr0");
    assert_eq!(dom0.ports("xenbr0"), ["peth0", "vif0.0", "vif2.0", "vif5.0"]);
    let bridge = dom0.world.ip("-d link show xenbr0");
    assert!(bridge.contains("stp_state 0") && bridge.contains("bridge_id 8000.fe:ff:ff:ff:ff:ff"), "{bridge}");
    assert!(dom0.world.ip("-o link show peth0").contains("NOARP"));
    assert_eq!((mac("peth0").as_str(), mac("eth0")), ("fe:ff:ff:ff:ff:ff", card));
    assert!(dom0.world.ip("-o addr show dev eth0").contains("10.1.0.2/24"));
    dom0.world.outside("ping -c 1 -W 10 10.1.0.2");
    // Again changes nothing, whether the layout is said or not.
    assert_eq!(dom0.does("network-bridge start").trim(), "nothing to do");
    assert_eq!(dom0.does("network-bridge start layout=xen3").trim(), "nothing to do");
    assert!(dom0.fails("network-bridge start layout=bridge").contains("layout=xen3"));
    assert!(dom0.fails("network-bridge stop").contains("in use by vif2.0, vif5.0"));
    for domid in [2, 5] {
        dom0.hotplug("vif-bridge", "offline", domid, 0);
    }
    dom0.does("network-bridge stop");
    assert!(dom0.world.ip("-o addr show dev eth0").contains("10.1.0.2/24"));
}

#[test]
fn two_cards_by_a_wrapper() {
    let Some(dom0) = Dom0::new("two cards by a wrapper") else { return };
    dom0.wrapper("my-network-script", WRAPPER);
    dom0.does("my-network-script start");
    dom0.does("my-network-script status");
    dom0.does("my-network-script start");
    let cards = [
        (1, 0, "mac=00:16:3e:5f:77:fd, bridge=xenbr0"),
        (1, 1, "mac=00:16:3e:5f:77:fc, bridge=xenbr1"),
        (2, 0, "bridge=xenbr0"),
        (2, 1, "bridge=xenbr1"),
    ];
    for (guest, card, spec) in cards {
        dom0.guest("vif-bridge", guest, card, spec);
    }
    assert_eq!(dom0.ports("xenbr0"), ["eth0", "vif1.0", "vif2.0"]);
    assert_eq!(dom0.ports("xenbr1"), ["eth1", "vif1.1", "vif2.1"]);
    dom0.world.outside("ping -c 1 -W 10 10.1.0.2");
    dom0.world.outside("ping -c 1 -W 10 10.2.0.2");
    for (guest, card, _) in cards {
        dom0.hotplug("vif-bridge", "offline", guest, card);
    }
    dom0.does("my-network-script stop");
    // With the number alone.
    dom0.does("network-bridge start vifnum=1");
    assert_eq!(dom0.ports("xenbr1"), ["eth1"]);
    dom0.does("network-bridge stop vifnum=1");
    dom0.does("network-bridge start vifnum=0");
    let refused = dom0.fails("network-bridge start netdev=eth1");
    assert!(refused.contains("say which bridge eth1 is for, as in bridge=xenbr1"), "{refused}");
    dom0.does("network-bridge stop vifnum=0");
    // The wrapper, named in xend's configuration.
    let told = dom0.as_xend_did("(network-script my-network-script)\n(vif-script vif-bridge)\n");
    assert!(told.contains("network-bridge start vifnum=1 netdev=eth1 bridge=xenbr1"), "{told}");
    assert_eq!((dom0.ports("xenbr0"), dom0.ports("xenbr1")), (vec!["eth0".to_owned()], vec!["eth1".to_owned()]));
}

#[test]
fn cards_come_and_go() {
    let Some(dom0) = Dom0::new("network-attach and -detach") else { return };
    dom0.does("network-dummy start bridge=xenbr2");
    dom0.does("network-bridge start");
    dom0.guest("vif-bridge", 62, 0, "bridge=xenbr0");
    // xm network-attach 62 bridge=xenbr2
    dom0.guest("vif-bridge", 62, 2, "bridge=xenbr2");
    assert!(dom0.ports("xenbr2").contains(&"vif62.2".to_owned()));
    // xm network-detach 62 2: the device is gone before the program runs.
    dom0.world.ip("link del vif62.2");
    dom0.hotplug("vif-bridge", "offline", 62, 2);
    assert!(!dom0.ports("xenbr2").contains(&"vif62.2".to_owned()));
    assert!(dom0.ports("xenbr0").contains(&"vif62.0".to_owned()));
    // A guest that restarts: another number, the same address.
    dom0.world.ip("link del vif62.0");
    dom0.hotplug("vif-bridge", "offline", 62, 0);
    dom0.guest("vif-bridge", 63, 0, "bridge=xenbr0, mac=00:16:3e:00:3e:00");
    let filters = ok(Command::new("tc").args(["filter", "show", "dev", "vif63.0", "ingress"]));
    assert!(filters.contains("direct-action"), "{filters}");
    assert_eq!(ok(Command::new("nft").args(["list", "tables"])), "");
}

#[test]
fn bridges_named_after_cards_and_emulated_cards() {
    let Some(dom0) = Dom0::new("bridges named after cards") else { return };
    // Of /etc/network/interfaces: the card below, the bridge named as the card was.
    for line in ["link set eth1 down", "link set eth1 name peth1", "link add eth1 type bridge", "link set peth1 up"] {
        dom0.world.ip(line);
    }
    dom0.world.ip("link set peth1 master eth1");
    dom0.world.ip("link set eth1 up");
    dom0.guest("vif-bridge", 7, 0, "type=ioemu,mac=00:16:3e:00:15:01,bridge=eth1");
    dom0.guest("vif-bridge", 8, 0, "mac=00:16:3e:00:15:02,bridge=eth1,model=ne2k_pci");
    // The configuration still names xenbr1.
    dom0.guest("vif-bridge", 9, 0, "bridge=xenbr1");
    assert_eq!(dom0.ports("eth1"), ["peth1", "vif7.0", "vif7.0-emu", "vif8.0", "vif9.0"]);
    dom0.does("network-dummy start");
    // A bridge for a VLAN has a dot in its name.
    dom0.world.ip("link add eth2.2 type bridge");
    dom0.guest("vif-bridge", 10, 0, "bridge=eth2.2");
    assert_eq!(dom0.ports("eth2.2"), ["vif10.0"]);
    let refused = dom0.fails("network-bridge start netdev=eth1");
    assert!(refused.contains("eth1 is a bridge itself: guests can use it as it is"), "{refused}");
}

#[test]
fn vlans() {
    let Some(dom0) = Dom0::new("VLANs") else { return };
    let wrapper = "#!/bin/sh
dir=$(dirname \"$0\")
\"$dir/network-bridge\" \"$@\" netdev=eth0.411 vifnum=0 bridge=xenbr411
\"$dir/network-bridge\" \"$@\" netdev=eth0.412 vifnum=1 bridge=xenbr412
";
    dom0.wrapper("vlan-script", wrapper);
    let plan = dom0.does("vlan-script start --plan");
    assert!(plan.contains("make eth0.411, VLAN 411 of eth0") && plan.contains("put eth0.412 into xenbr412"), "{plan}");
    let has_vlans = dom0.run("network-vlan start netdev=eth0 vlan=411,412");
    if has_vlans.status.success() {
        assert_eq!(dom0.ports("xenbr411"), ["eth0.411"]);
        dom0.does("network-vlan stop netdev=eth0");
        dom0.does("vlan-script start layout=xen3");
        dom0.guest("vif-bridge", 1, 0, "bridge=xenbr411");
        assert!(dom0.ports("xenbr411").contains(&"peth0.411".to_owned()));
        return;
    }
    let said = text(&has_vlans.stderr);
    assert!(said.contains("8021q") && said.contains("everything was put back"), "{said}");
    println!("NOT TESTED: VLANs of a card (vconfig add eth0 411): this kernel has no 8021q");
    // With a device of the name in the VLAN's place.
    dom0.world.card("eth0.411", &["10.4.0.2/24"], &[]);
    dom0.world.card("eth0.412", &[], &[]);
    dom0.world.ip("link set eth0.411 mtu 1492");
    dom0.world.settle();
    dom0.does("vlan-script start layout=xen3");
    dom0.guest("vif-bridge", 1, 0, "bridge=xenbr411");
    assert_eq!(dom0.ports("xenbr411"), ["peth0.411", "vif0.0", "vif1.0"]);
    assert!(dom0.world.ip("-o link show vif1.0").contains("mtu 1492"));
    assert_eq!(dom0.ports("xenbr412"), ["peth0.412", "vif0.1"]);
}

#[test]
fn routing() {
    let Some(dom0) = Dom0::new("network-route") else { return };
    dom0.as_xend_did("(network-script network-route)\n(vif-script vif-route)\n");
    dom0.guest("vif-route", 12, 0, "ip=192.168.17.1/24");
    assert!(dom0.world.ip("-o addr show dev vif12.0").contains("192.168.17.254/24"));
    assert!(dom0.world.ip("route").contains("192.168.17.0/24 dev vif12.0"));
    assert_eq!(dom0.world.sysctl("ipv4/ip_forward"), "1");
    dom0.hotplug("vif-route", "offline", 12, 0);
    assert!(!dom0.world.ip("route").contains("vif12.0"));
    dom0.does("network-route stop");
    // The machine was none before.
    assert_eq!(dom0.world.sysctl("ipv4/ip_forward"), "0");
}

#[test]
fn nat() {
    let Some(dom0) = Dom0::new("network-nat") else { return };
    // The administrator's own rules, and libvirt's bridge.
    for line in [
        "add table ip nat",
        "add chain ip nat POSTROUTING { type nat hook postrouting priority 100; }",
        "add rule ip nat POSTROUTING ip saddr 192.168.122.0/24 masquerade",
    ] {
        ok(Command::new("nft").arg(line));
    }
    dom0.world.ip("link add virbr0 type bridge");
    let theirs = || ok(Command::new("nft").args(["list", "table", "ip", "nat"]));
    let before = theirs();
    let told = dom0.as_xend_did("(network-script network-nat)\n(vif-script vif-nat)\n");
    assert!(told.contains("script=vif-nat"), "{told}");
    dom0.guest("vif-nat", 6, 0, "ip=10.0.6.1");
    let rules = ok(Command::new("nft").args(["list", "table", "inet", "xen-nat"]));
    assert!(rules.contains("oifname \"eth0\" masquerade"), "{rules}");
    assert_eq!(theirs(), before);
    assert!(dom0.ports("virbr0").is_empty());
    dom0.hotplug("vif-nat", "offline", 6, 0);
    dom0.does("network-nat stop");
    assert_eq!(ok(Command::new("nft").args(["list", "tables"])).trim(), "table ip nat");
}

#[test]
fn guests_alone() {
    let Some(dom0) = Dom0::new("host-only networks") else { return };
    // modprobe dummy numdummies=5, and then a dummy device in the card's place.
    let dummy = Command::new("ip").args(["link", "add", "dummy0", "type", "dummy"]).output().unwrap();
    if dummy.status.success() {
        dom0.does("network-bridge start netdev=dummy0 bridge=xenbr3");
        assert_eq!(dom0.ports("xenbr3"), ["dummy0"]);
    } else {
        println!("NOT TESTED: a dummy device in the card's place: this kernel has none");
        let refused = dom0.fails("network-bridge start netdev=dummy0 bridge=xenbr3");
        assert!(refused.contains("network-dummy start bridge=xenbr3"), "{refused}");
        dom0.does("network-dummy start bridge=xenbr3");
    }
    dom0.guest("vif-bridge", 1, 0, "bridge=xenbr3");
    dom0.guest("vif-bridge", 2, 0, "bridge=xenbr3");
    let ports = dom0.ports("xenbr3");
    assert!(ports.contains(&"vif1.0".to_owned()) && ports.contains(&"vif2.0".to_owned()), "{ports:?}");
    assert!(!ports.contains(&"eth0".to_owned()));
    // An empty network-dummy as network-script: the distribution made the bridges.
    let told = dom0.as_xend_did("(network-script network-dummy)\n(vif-script vif-bridge)\n");
    assert!(told.contains("network-dummy"), "{told}");
}
