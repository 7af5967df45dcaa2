//! Interfaces from the administrator's command line to the bridge and to the guest, and back.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod processes;

use std::sync::Arc;

use hypervisor::Guest;
use hypervisor::emu::GuestSeat;
use netback::front::{Frontend, Options};
use processes::{Dom0, PATIENCE, assert_nothing_left, ip, links, namespace, script, until};
use xenstore_client::Store;
use xenstore_client::xenbus::{State, toolstack};

const HEADER: &str = "Idx BE Mac Addr.         handle state evt-ch   tx-/rx-ring-ref BE-path";

fn connect(guest: &Arc<GuestSeat>, devid: u32) -> Frontend {
    let options = Options { split_channels: false, ..Options::default() };
    Frontend::connect(Arc::clone(guest) as Arc<dyn Guest>, devid, &options).unwrap()
}

/// Lets go of the interface when the backend asks for it.
fn let_go(mut front: Frontend, guest: &GuestSeat) -> std::thread::JoinHandle<()> {
    let store = guest.store().unwrap();
    std::thread::spawn(move || {
        let state = format!("{}/state", front.backend_path());
        toolstack::wait_state(&store, &state, &[State::Closing, State::Closed], PATIENCE).unwrap();
        let queues = front.take_queues();
        front.close(queues, None).unwrap();
    })
}

fn state_of(link: &str) -> String {
    ip(&format!("-o link show {link}"))
}

#[test]
fn from_attach_to_detach() {
    if !namespace("attaching interfaces to a bridge") {
        return;
    }
    let dom0 = Dom0::start();
    let guest = dom0.guest("web");
    let number = guest.domid().to_string();
    let vif = format!("vif{number}.0");
    let before = links();

    let said = dom0.ok(&["attach", "web", "mac=00:16:3E:21:4F:83,", "bridge=xenbr0", "--wait", "0"]);
    assert_eq!(said, format!("{vif} (00:16:3e:21:4f:83) is attached and waits for the guest's driver\n"));
    let link = state_of(&vif);
    assert!(link.contains("master xenbr0") && link.contains("fe:ff:ff:ff:ff:ff"), "{link}");
    let listed = dom0.ok(&["list", "web"]);
    let lines: Vec<&str> = listed.lines().map(str::trim_end).collect();
    let path = format!("/local/domain/0/backend/vif/{number}/0");
    let row = format!("0   0  00:16:3e:21:4f:83     0     1     -1    -1/-1          {path}");
    assert_eq!(lines, [HEADER, &row]);

    // The guest's driver comes: four numbers where there was -1, and a carrier.
    let front = connect(&guest, 0);
    until("carrier", || !state_of(&vif).contains("NO-CARRIER"));
    let listed = dom0.ok(&["network-list", &number]);
    let row = listed.lines().nth(1).unwrap();
    let fields: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(fields[..5], ["0", "0", "00:16:3e:21:4f:83", "0", "4"], "{listed}");
    assert!(fields[5].parse::<u32>().is_ok(), "{listed}");
    let (tx, rx) = fields[6].split_once('/').unwrap();
    assert!(tx.parse::<u32>().is_ok() && rx.parse::<u32>().is_ok(), "{listed}");

    // A second one, with a number and a name of its own, as an administrator of xm's days would type it.
    dom0.ok(&["network-attach", &number, "bridge=xenbr0", "devid=2", "vifname=web2", "--wait", "0"]);
    assert!(state_of("web2").contains("master xenbr0"));
    assert_eq!(dom0.ok(&["list", "web"]).lines().count(), 3);
    assert!(dom0.ok(&["network-detach", &number, "2"]).contains(".2 is detached"));
    assert_eq!(links(), ["lo", &vif, "xenbr0"]);

    // The first goes when its guest has let go of it.
    let guests_half = let_go(front, &guest);
    assert_eq!(dom0.ok(&["detach", "web", "00:16:3e:21:4f:83"]), format!("{vif} is detached\n"));
    guests_half.join().unwrap();
    assert_nothing_left(&dom0, &before);
}

#[test]
fn a_waiting_guest_is_connected_at_once() {
    if !namespace("attaching an interface to a guest that waits for it") {
        return;
    }
    let dom0 = Dom0::start();
    let guest = dom0.guest("web");
    let driver = {
        let (guest, store) = (Arc::clone(&guest), guest.store().unwrap());
        std::thread::spawn(move || {
            let state = format!("{}/device/vif/0/state", guest.domid().home());
            toolstack::wait_state(&store, &state, &[State::Initialising], PATIENCE).unwrap();
            connect(&guest, 0)
        })
    };
    let said = dom0.ok(&["attach", "web", "rate=10Mb/s", "--wait", "60"]);
    assert!(said.contains(" (00:16:3e:") && said.ends_with(") is connected\n"), "{said}");
    assert_eq!(dom0.key(&guest, 0, "rate").as_deref(), Some("62500,50000"));
    assert_eq!(dom0.key(&guest, 0, "state").as_deref(), Some("4"));
    let guests_half = let_go(driver.join().unwrap(), &guest);
    dom0.ok(&["detach", "web", "0"]);
    guests_half.join().unwrap();
    assert_nothing_left(&dom0, &["lo".to_owned(), "xenbr0".to_owned()]);
}

#[test]
fn a_script_of_the_administrators_is_run() {
    if !namespace("hotplug scripts that are not ours") {
        return;
    }
    let dom0 = Dom0::start();
    let guest = dom0.guest("web");
    let (said, go) = (dom0.folder.path().join("said"), dom0.folder.path().join("go"));
    let text = format!(
        "echo \"$1 $2 $vif $XENBUS_PATH $netdev\" >> {}\n\
         while test $1 = online && ! test -e {}; do sleep 0.01; done",
        said.display(),
        go.display()
    );
    let path = script(dom0.folder.path(), "vif-mine", &text);
    // In the place of xenstore-write, which this machine may lack.
    let helper = {
        let (store, guest) = (dom0.store.clone(), guest.domid());
        std::thread::spawn(move || {
            let back = format!("/local/domain/0/backend/vif/{guest}/0");
            toolstack::wait_state(&store, &format!("{back}/state"), &[State::InitWait], PATIENCE).unwrap();
            store.write(&format!("{back}/hotplug-status"), "connected").unwrap();
            std::fs::write(go, "").unwrap();
        })
    };
    dom0.ok(&["attach", "web", &format!("script={path}"), "gatewaydev=eth0", "--wait", "0"]);
    helper.join().unwrap();
    dom0.ok(&["detach", "web", "0"]);
    let number = guest.domid();
    let line = |event: &str| format!("{event} type_if=vif vif{number}.0 backend/vif/{number}/0 eth0\n");
    assert_eq!(std::fs::read_to_string(said).unwrap(), line("online") + &line("offline"));
    assert_nothing_left(&dom0, &["lo".to_owned(), "xenbr0".to_owned()]);
}

#[test]
fn stopping_the_service_takes_the_links_along() {
    if !namespace("interfaces of a backend that is stopped") {
        return;
    }
    let mut dom0 = Dom0::start();
    let guest = dom0.guest("web");
    dom0.ok(&["attach", "web", "--wait", "0"]);
    let front = connect(&guest, 0);
    let guests_half = let_go(front, &guest);
    dom0.stop();
    guests_half.join().unwrap();
    assert_eq!(links(), ["lo", "xenbr0"]);
    // It is still there for whoever lists or detaches it, and the next service takes it up for that.
    let listed = dom0.ok(&["list", "web"]);
    assert!(listed.contains("the backend process was told to stop"), "{listed}");
    dom0.serve();
    dom0.ok(&["detach", "web", "0"]);
    assert_nothing_left(&dom0, &["lo".to_owned(), "xenbr0".to_owned()]);
}

#[test]
fn routed_and_behind_nat() {
    if !namespace("attaching interfaces with vif-route and vif-nat") {
        return;
    }
    let dom0 = Dom0::start();
    let guest = dom0.guest("web");
    let number = guest.domid().to_string();
    ip("link add uplink type bridge");
    ip("address add 192.0.2.1/24 dev uplink");
    ip("link set uplink up");
    let before = links();
    for script in ["vif-route", "vif-nat"] {
        let words = ["attach", &number, &format!("script={script}"), "ip=10.9.8.7", "gatewaydev=uplink", "--wait", "0"];
        dom0.ok(&words);
        let vif = format!("vif{number}.0");
        let routes = ip("route show");
        let route = routes.lines().find(|line| line.starts_with("10.9.8.7 "));
        assert!(route.is_some_and(|line| line.contains(&format!("dev {vif}"))), "{script}: {routes}");
        assert!(!state_of(&vif).contains("master"), "{script}: {}", state_of(&vif));
        dom0.ok(&["detach", &number, "0"]);
        assert!(!ip("route show").contains("10.9.8.7"), "{script}");
        assert_nothing_left(&dom0, &before);
    }
}
