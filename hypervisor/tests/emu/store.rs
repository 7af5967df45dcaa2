//! XenStore as a part of the machine: who is who, what a domain's life leaves in it.

use std::time::Duration;

use hypervisor::{Backend, DomId, Guest};
use xenstore_client::{Client, ErrorCode, Store};

use crate::rig::{Rig, everywhere};

#[test]
fn each_seat_speaks_as_its_domain() {
    everywhere(|rig| {
        let (guest, driver) = (rig.guest(), rig.driver(9).unwrap());
        let (dom0, front, back) = (rig.dom0.store().unwrap(), guest.store().unwrap(), driver.store().unwrap());
        let home = guest.domid().home();
        assert_eq!(front.read_str("domid").unwrap(), guest.domid().to_string());
        assert_eq!(back.read_str("name").unwrap(), "driver-9");
        assert_eq!(dom0.read_str("/local/domain/0/name").unwrap(), "Domain-0");
        assert_eq!(dom0.read_str(&format!("{home}/name")).unwrap(), "guest-1");
        front.write("data/mine", "1").unwrap();
        for (client, path) in [(&front, "name"), (&front, "/local/domain/0/x"), (&back, &*format!("{home}/data/mine"))]
        {
            let refused = client.write(path, "no").unwrap_err();
            assert_eq!(refused.code(), Some(&ErrorCode::Access), "{path}");
        }
        dom0.write(&format!("{home}/device/vbd/51712/state"), "1").unwrap();
    });
}

#[test]
fn a_death_is_announced_and_leaves_nothing() {
    everywhere(|rig| {
        let dom0 = rig.dom0.store().unwrap();
        let watcher = dom0.watcher().unwrap();
        for special in ["@introduceDomain", "@releaseDomain"] {
            watcher.add(special, special).unwrap();
            assert_eq!(watcher.wait(Duration::from_secs(60)).unwrap().unwrap().path, special, "fires once when set");
        }
        let guest = rig.guest();
        let home = guest.domid().home();
        assert_eq!(watcher.wait(Duration::from_secs(60)).unwrap().unwrap().path, "@introduceDomain");
        let backend = format!("/local/domain/0/backend/vbd/{}/51712", guest.domid());
        dom0.write(&format!("{backend}/state"), "4").unwrap();
        let client = guest.store().unwrap();
        rig.dom0.destroy(guest.domid()).unwrap();
        assert_eq!(watcher.wait(Duration::from_secs(60)).unwrap().unwrap().path, "@releaseDomain");
        assert_eq!(dom0.read_opt(&format!("{home}/name")).unwrap(), None);
        assert_eq!(dom0.read_opt(&format!("{backend}/state")).unwrap(), None);
        assert!(client.read("domid").is_err(), "its connections are cut");
    });
}

#[test]
fn dom0s_programs_use_the_socket() {
    let rig = Rig::served();
    let client = Client::connect_unix(rig.dir().join("xenstored.sock")).unwrap();
    client.write("/tool/x", "1").unwrap();
    assert_eq!(rig.machine().store(DomId::DOM0).unwrap().read_str("/tool/x").unwrap(), "1");
}
