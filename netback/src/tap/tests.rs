use std::rc::Rc;

use hypervisor::memory::Mapping;
use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs `test` on a thread in a network namespace of its own; false where that cannot be.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(|| {
        let root = nix::unistd::geteuid().is_root();
        let user = if root { CloneFlags::empty() } else { CloneFlags::CLONE_NEWUSER };
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET | user) {
            eprintln!("NOT TESTED: taps: no network namespace: {error}");
            return;
        }
        if !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("NOT TESTED: taps: no /dev/net/tun");
            return;
        }
        test();
    })
    .join()
    .unwrap();
}

fn sys(name: &str, file: &str) -> String {
    // /sys shows the namespace of who mounted it; netlink and ioctls that of the thread.
    let output = std::process::Command::new("ip").args(["-o", "link", "show", name]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    format!("{file}: {text}")
}

#[test]
fn frames_are_not_queued_before_a_tap() {
    in_namespace(|| {
        let tap = KernelTaps.open("vif7.0", 0).unwrap();
        let up = std::process::Command::new("ip").args(["link", "set", "vif7.0", "up"]).status();
        assert!(up.is_ok_and(|status| status.success()));
        tap.set_carrier(true).unwrap();
        let said = sys("vif7.0", "link");
        assert!(said.contains("UP") && said.contains("qdisc noqueue"), "{said}");
    });
}

/// As a port of Linux' netback: a bridge with a spanning tree must not prefer the way through a guest.
#[test]
fn a_tap_costs_a_bridge_as_much_as_a_vif_of_the_kernels() {
    in_namespace(|| {
        let tap = Tap::create("vif7.0").unwrap();
        for words in ["link add br0 type bridge", "link set vif7.0 master br0", "link set vif7.0 up", "link set br0 up"]
        {
            let done = std::process::Command::new("ip").args(words.split(' ')).status();
            assert!(done.is_ok_and(|status| status.success()), "{words}");
        }
        tap.set_carrier(true).unwrap();
        let output = std::process::Command::new("ip").args(["-d", "-o", "link", "show", "vif7.0"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains(" cost 100 "), "{said}");
    });
}

#[test]
fn a_tap_is_made_down_and_without_carrier() {
    in_namespace(|| {
        let tap = Tap::create("vif7.0").unwrap();
        assert_eq!(tap.name().unwrap().as_deref(), Some("vif7.0"));
        let said = sys("vif7.0", "link");
        assert!(said.contains("fe:ff:ff:ff:ff:ff") && !said.contains("UP"), "{said}");
        let second = Tap::attach_queue("vif7.0").unwrap();
        for features in [
            Features::default(),
            Features { checksum: true, ..Features::default() },
            Features { checksum: true, tso4: true, tso6: true },
        ] {
            tap.set_features(features).unwrap();
        }
        second.set_carrier(true).unwrap();
        assert_eq!(tap.limit_mtu(1500).unwrap(), None);
        assert_eq!(second.limit_mtu(1400).unwrap(), Some(1500));
        assert_eq!(tap.limit_mtu(1400).unwrap(), None);
        assert!(sys("vif7.0", "link").contains("mtu 1400 "));
        let error = Tap::create("vif7.0").unwrap_err();
        assert!(error.to_string().contains("TUNSETIFF of vif7.0"), "{error}");
        let error = Tap::create("a-name-that-is-too-long").unwrap_err();
        assert!(error.to_string().contains("no interface can have this name"), "{error}");
        drop((tap, second));
        // A program that another test starts at this moment holds copies of both until it runs.
        let began = std::time::Instant::now();
        while let Err(error) = Tap::create("vif7.0") {
            assert!(began.elapsed() < std::time::Duration::from_secs(60), "{error}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    });
}

#[test]
fn frames_stay_apart() {
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let tap = Tap::from_fd(ours).unwrap();
    let memory = Rc::new(Mapping::anonymous(8192).unwrap());
    let mut list = IoList::default();
    list.push(&memory, 0, 4096);
    assert_eq!(tap.read(&list).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    rustix::io::write(&theirs, &[7; 100]).unwrap();
    rustix::io::write(&theirs, &[8; 200]).unwrap();
    assert_eq!((tap.read(&list).unwrap(), tap.read(&list).unwrap()), (100, 200));
    list.clear();
    list.push(&memory, 0, 12);
    list.push(&memory, 4096, 30);
    assert_eq!(tap.write(&list).unwrap(), 42);
    let mut back = [0; 100];
    assert_eq!(rustix::io::read(&theirs, &mut back).unwrap(), 42);
    assert_eq!(back[..12], [8; 12]);
}
