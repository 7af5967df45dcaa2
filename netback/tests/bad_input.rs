//! Command lines that cannot be done. Whoever types one reads a sentence that says what is wrong and what to do; nothing
//! is left in XenStore, and nothing in the kernel.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod processes;

use std::process::Command;

use hypervisor::Guest;
use processes::{Dom0, assert_nothing_left, ip, links, namespace, script};

#[test]
fn mistakes_are_explained_and_leave_nothing() {
    if !namespace("wrong command lines") {
        return;
    }
    let dom0 = Dom0::start();
    let guest = dom0.guest("web");
    let folder = dom0.folder.path();
    let failing = script(folder, "vif-failing", "exit 7");
    let silent = script(folder, "vif-silent", "exit 0");
    let plain = folder.join("vif-plain");
    std::fs::write(&plain, "").unwrap();
    ip("link add web9 type bridge");
    let before = links();
    let long = "bridge=abcdefghijklmnop";
    for (words, reasons) in [
        // The specification, with the place.
        (vec!["brigde=xenbr0"], vec!["unknown parameter", "^^^^^^", "did you mean bridge?"]),
        (vec!["mac=00:16:3e:3f:a9"], vec!["missing", "^", "six pairs"]),
        (vec!["mac=00:16:3e:3f:a9:0g"], vec!["'g'", "^"]),
        (vec!["mac=01:00:5e:00:00:01"], vec!["group"]),
        (vec!["mac=ff:ff:ff:ff:ff:ff"], vec!["group"]),
        (vec!["mac=00:00:00:00:00:00"], vec!["zero"]),
        (vec!["mac=fe:ff:ff:ff:ff:ff"], vec!["backend's end"]),
        (vec!["bridge=xenbr0,bridge=xenbr1"], vec!["given twice"]),
        (vec!["bridge=xenbr0", "bridge=xenbr1"], vec!["given twice", "bridge=xenbr0 bridge=xenbr1"]),
        (vec!["bridge=x/y"], vec!["'/'"]),
        (vec![long], vec!["no name of a device", "1 to 15"]),
        (vec!["ip=10.0.0.256"], vec!["no IP address"]),
        (vec!["ip=10.0.0.1/99"], vec!["1 to 32"]),
        (vec!["rate=10"], vec!["no unit", "10Mb/s"]),
        (vec!["rate=0B/s"], vec!["no limit"]),
        (vec!["rate=1B/s"], vec!["less than one byte"]),
        (vec!["rate=10Mb/s@0ms"], vec!["0 is no limit"]),
        (vec!["mtu=20"], vec!["68 to 65517"]),
        (vec!["mtu=1500x"], vec!["68 to 65517"]),
        (vec!["vlan=4095"], vec!["no VLAN 4095"]),
        (vec!["vlan=10/20"], vec!["marked p"]),
        (vec!["devid=x"], vec!["decimal"]),
        (vec!["vifname=a/b"], vec!["'/'"]),
        (vec!["vifname=vif9.0"], vec!["another form"]),
        (vec!["type=e1000"], vec!["vif or ioemu"]),
        (vec!["antispoof=maybe"], vec!["on or off"]),
        (vec!["xenbr0"], vec!["key=value"]),
        (vec!["colo_sock_mirror_id=1"], vec!["COLO"]),
        (vec!["bridge="], vec!["bridge has no value"]),
        // What only the machine knows.
        (vec!["backend=web"], vec!["attach the interface there"]),
        (vec!["backend=nobody"], vec!["no domain \"nobody\"", "(web)"]),
        (vec!["script=/no/such/script"], vec!["No such file"]),
        (vec!["script=vif-openvswitch"], vec!["vif-openvswitch", "vif-bridge, vif-route, vif-nat"]),
        (vec!["script=/etc"], vec!["no file"]),
        (vec!["bridge=xenbr9"], vec!["xenbr9"]),
        (vec!["vifname=web9"], vec!["web9"]),
        (vec!["--wait=-1"], vec!["--wait -1"]),
        (vec!["--wait", "soon"], vec!["soon"]),
    ] {
        let said = dom0.fails(&[&["attach", "web"], words.as_slice()].concat());
        for reason in reasons {
            assert!(said.contains(reason), "{words:?}: no {reason:?} in\n{said}");
        }
        // So that a failure below tells the words.
        println!("{words:?}");
        assert_nothing_left(&dom0, &before);
    }
    for (path, reasons) in [
        (failing, vec!["online failed", "exit status: 7"]),
        (silent, vec!["hotplug-status=connected"]),
        (plain.display().to_string(), vec!["chmod +x"]),
    ] {
        let said = dom0.fails(&["attach", "web", &format!("script={path}")]);
        for reason in reasons {
            assert!(said.contains(reason), "{path}: no {reason:?} in\n{said}");
        }
        assert_nothing_left(&dom0, &before);
    }
    for (words, reason) in [
        (&["attach", "nobody"][..], "no domain \"nobody\""),
        (&["attach", "999"], "(web)"),
        (&["attach"], "<DOMAIN>"),
        (&["detach", "web", "0"], "nor any other"),
        (&["detach", "web", "-1"], "-1"),
        (&["detach", "web", "eth0"], "00:16:3e:3f:a9:06"),
        (&["detach", "web", "00:16:3e:3f:a9"], "missing"),
        (&["detach", "web"], "DEVID|MAC"),
        (&["list"], "<DOMAINS>"),
        (&["list", "web", "nobody"], "no domain \"nobody\""),
        (&["serve", "--queues", "0"], "1..=64"),
        (&["serve", "--cpus", "x"], "'x'"),
    ] {
        let said = dom0.fails(words);
        assert!(said.contains(reason), "{words:?}: no {reason:?} in\n{said}");
    }
    // None of all that stands in the way of a good one; a second one of its number does.
    dom0.ok(&["attach", "web", "devid=0", "--wait", "0"]);
    assert!(dom0.fails(&["attach", "web", "devid=0"]).contains("detach it first"));
    assert!(dom0.fails(&["detach", "web", "1"]).contains("it has 0 (00:16:3e:"));
    dom0.ok(&["detach", &guest.domid().to_string(), "0"]);
    assert_nothing_left(&dom0, &before);
}

#[test]
fn without_a_backend_nothing_is_attached() {
    if !namespace("attaching without a backend") {
        return;
    }
    let dom0 = Dom0::unserved();
    let _guest = dom0.guest("web");
    let said = dom0.fails(&["attach", "web"]);
    assert!(said.contains("is netback serve running?"), "{said}");
    assert_eq!(dom0.traces(), [""; 0]);
}

#[test]
fn without_a_machine_there_is_nothing_to_do() {
    let netback = |words: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_netback")).args(words).output().unwrap();
        assert!(!output.status.success(), "{words:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let said = netback(&["list", "0", "--hypervisor", "emu:/no/such/machine"]);
    assert!(said.contains("/no/such/machine"), "{said}");
    let said = netback(&["list", "0", "--hypervisor", "kvm"]);
    assert!(said.contains("emu:DIR"), "{said}");
}

#[test]
fn serving_needs_root() {
    use std::os::unix::process::CommandExt;

    let program = env!("CARGO_BIN_EXE_netback");
    let mut command = Command::new(program);
    if nix::unistd::Uid::effective().is_root() {
        command.uid(65534).gid(65534);
    }
    let output = match command.args(["serve", "--hypervisor", "emu:/no/such/machine"]).output() {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            println!("NOT TESTED: serving without root: other users cannot reach {program}");
            return;
        }
        outcome => outcome.unwrap(),
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("as root"), "{said}");
}
