//! Hotplug programs as libxl starts them, killed at any step and at any time: the next run repairs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod vif_common;

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use vif_common::{Scene, alone_with_taps, becomes, have, now, settle, sh};

/// Numbers that look random and can be had again (Knuth's constants).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

fn seed() -> u64 {
    let given = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = given.unwrap_or(u64::from(now.subsec_nanos()));
    println!("SEED={seed}");
    seed
}

/// One interface, vif1.0, and the directory with the links that libxl runs.
struct Guest {
    scene: Scene,
    scripts: tempfile::TempDir,
    script: &'static str,
}

impl Guest {
    fn new(script: &'static str, keys: &[(&str, &str)]) -> Self {
        let (scene, scripts) = (Scene::new(), tempfile::tempdir().unwrap());
        symlink(env!("CARGO_BIN_EXE_bridge-scripts"), scripts.path().join(script)).unwrap();
        scene.vif(1, 0, "00:16:3e:00:00:01", keys);
        Self { scene, scripts, script }
    }

    /// The program with the environment that libxl gives it (libxl_linux.c, get_hotplug_env) and no other.
    fn command(&self, event: &str) -> Command {
        let program: PathBuf = self.scripts.path().join(self.script);
        let mut command = Command::new(&program);
        command.args([event, "type_if=vif"]).env_clear().stdin(Stdio::null());
        command.env("script", &program).env("XENBUS_TYPE", "vif").env("XENBUS_BASE_PATH", "backend");
        command.env("XENBUS_PATH", "backend/vif/1/0").env("netdev", "").env("vif", "vif1.0");
        command.env("HYPERVISOR", self.scene.hypervisor()).env("BRIDGE_SCRIPTS_RUN", self.scene.run());
        command.env("XEN_HOTPLUG_LOG", self.scripts.path().join("log"));
        command
    }

    /// Runs it, which has to succeed.
    #[track_caller]
    fn does(&self, event: &str) -> Output {
        let output = self.command(event).output().unwrap();
        assert!(output.status.success(), "{} {event}: {}", self.script, String::from_utf8_lossy(&output.stderr));
        output
    }

    fn steps(&self, event: &str) -> usize {
        let output = self.command(event).arg("--plan").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().filter(|line| line.split_once(". ").is_some_and(|(n, _)| n.trim().parse::<u32>().is_ok())).count()
    }

    /// Everything that a program of ours may have changed.
    fn shown(&self) -> String {
        settle();
        self.now()
    }

    fn now(&self) -> String {
        let files = std::fs::read_dir(self.scene.run()).unwrap();
        let mut files: Vec<_> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        files.retain(|name| name != "lock");
        files.sort();
        let hosts = std::fs::read_to_string(self.scene.run().join("dnsmasq-hosts")).unwrap_or_default();
        format!("{}{files:?}\n{hosts}", now())
    }

    #[track_caller]
    fn is(&self, wanted: &str, when: &str) {
        becomes(|| self.now(), wanted, &format!("{} {when}", self.script));
    }
}

fn kills(script: &'static str, keys: &[(&str, &str)], rounds: u32) {
    let mut numbers = Numbers(seed());
    let guest = Guest::new(script, keys);
    // Once there and back: some of what changes stays, such as the kernel being a router.
    guest.does("online");
    guest.does("offline");
    let off = guest.shown();
    let to_come = guest.steps("online");
    let begin = Instant::now();
    guest.does("online");
    let mut time = begin.elapsed();
    let on = guest.shown();
    let to_go = guest.steps("offline");
    assert!(to_come >= 7 && to_go >= 4, "{script}: {to_come} {to_go}");
    guest.does("offline");
    guest.is(&off, "offline");
    let wanted = |event: &str| if event == "online" { &on } else { &off };
    let other = |event: &str| if event == "online" { "offline" } else { "online" };
    let (mut died, mut repaired) = (0, 0);
    let mut check = |event: &str, how: &str, then: &str| {
        let output = guest.does(then);
        repaired += u32::from(String::from_utf8_lossy(&output.stderr).contains("it has been taken back"));
        guest.is(wanted(then), &format!("{event} {how}, then {then}"));
        if then == "online" {
            assert_eq!(guest.scene.key(1, 0, "hotplug-status").as_deref(), Some("connected"));
        }
    };
    // Each step, before and after it, and while it is taken back.
    for (event, count) in [("online", to_come), ("offline", to_go)] {
        for step in 0..count {
            for (kill, again) in [("kill-before", event), ("kill-after", other(event))] {
                guest.does(other(event));
                guest.scene.set(1, 0, "hotplug-status", "");
                let how = format!("{kill}={step}");
                let output = guest.command(event).env("BRIDGE_SCRIPTS_FAULT", &how).output().unwrap();
                assert!(output.status.code().is_none(), "{script} {event} {how}: it did not die");
                died += 1;
                if kill == "kill-after" {
                    let undo = format!("kill-undo={}", step / 2);
                    let output = guest.command(again).env("BRIDGE_SCRIPTS_FAULT", &undo).output().unwrap();
                    died += u32::from(output.status.code().is_none());
                }
                check(event, &how, again);
            }
        }
    }
    println!("{script}: killed at each of {to_come} and {to_go} steps");
    // At any time.
    let (mut in_time, mut round) = (0, 0);
    let mut up = true;
    guest.does("online");
    while in_time < rounds {
        round += 1;
        assert!(round < 20 * rounds, "{script}: only {in_time} of {round} runs died");
        let event = if up { "offline" } else { "online" };
        let mut child = guest.command(event).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        sleep(Duration::from_micros(numbers.below(u64::try_from(time.as_micros()).unwrap().max(500))));
        // It may have ended already; then it is killed earlier next time.
        let _ = child.kill();
        let died = child.wait().unwrap().code().is_none();
        in_time += u32::from(died);
        time = if died { time * 21 / 20 } else { time * 9 / 10 };
        let then = if numbers.below(2) == 0 { event } else { other(event) };
        check(event, &format!("killed in round {round}"), then);
        up = then == "online";
    }
    guest.does("offline");
    guest.is(&off, "at the end");
    println!("{script}: {died} died at steps, {in_time} of {round} at any time; {repaired} were taken back");
    assert!(repaired > died / 4, "{repaired} of {died}");
    guest.scene.nothing_left();
}

fn world() {
    sh("ip link set lo up");
    sh("ip link add xenbr0 type bridge");
    sh("ip addr add 10.0.0.254/24 dev xenbr0");
    sh("ip addr add 2001:db8::fe/64 dev xenbr0 nodad");
    sh("ip link set xenbr0 up");
    sh("ip route add default via 10.0.0.1 dev xenbr0");
}

#[test]
fn vif_bridge() {
    alone_with_taps("vif_bridge", || {
        if have("nft", "killed hotplug programs") {
            world();
            kills("vif-bridge", &[("bridge", "xenbr0"), ("ip", "10.0.0.5"), ("vifname", "web0")], 80);
        }
    });
}

#[test]
fn vif_route() {
    alone_with_taps("vif_route", || {
        if have("nft", "killed hotplug programs") {
            world();
            kills("vif-route", &[("ip", "10.0.0.5 192.168.17.1/24 2001:db8::5")], 60);
        }
    });
}

#[test]
fn vif_nat() {
    alone_with_taps("vif_nat", || {
        if have("nft", "killed hotplug programs") {
            world();
            kills("vif-nat", &[], 60);
        }
    });
}
