//! Programs that are killed, at any step and at any time: the next run repairs. And changes that nobody confirms.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use bridge_scripts::apply::Pending;
use common::{World, text, wait_until};
use std::fs;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

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
    let seed = given.unwrap_or(now.as_nanos() as u64);
    println!("SEED={seed}");
    seed
}

fn kills(layout: &str, rounds: u32) {
    let Some(world) = World::new("killed runs") else { return };
    let mut numbers = Numbers(seed());
    world.rich_card("eth0");
    let (start, stop) = (format!("network-bridge start {layout}"), "network-bridge stop".to_owned());
    let before = world.shown_without_indices();
    world.does(&start);
    let started = world.shown_without_indices();
    let steps = |words: &str| world.does(&format!("{words} --plan")).lines().count() as u64;
    let to_stop = steps(&stop);
    world.does(&stop);
    world.is_like(&before, "after the first stop");
    let to_start = steps(&start);
    let (mut repaired, mut died) = (0, 0);
    for round in 0..rounds {
        let up = world.run.path().join("bridge-xenbr0.json").exists();
        let (words, count) = if up { (&stop, to_stop) } else { (&start, to_start) };
        let step = numbers.below(count);
        let mut command = world.command(words);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let kind = numbers.below(4);
        let how = match kind {
            0 => format!("kill-before={step}"),
            1 => format!("kill-after={step}"),
            _ => String::new(),
        };
        let mut child = command.env("BRIDGE_SCRIPTS_FAULT", &how).spawn().unwrap();
        if kind > 1 {
            sleep(Duration::from_micros(numbers.below(12_000)));
            // It may have ended already.
            let _ = child.kill();
        }
        died += u32::from(child.wait().unwrap().code().is_none());
        // Now and then the repair is killed as well.
        if numbers.below(4) == 0 {
            let at = numbers.below(count);
            let mut again = world.command("network-bridge stop bridge=none");
            again.env("BRIDGE_SCRIPTS_FAULT", format!("kill-undo={at}")).stdout(Stdio::null()).stderr(Stdio::null());
            again.spawn().unwrap().wait().unwrap();
        }
        // Any program repairs; this one has nothing else to do.
        let output = world.command("network-bridge stop bridge=none").output().unwrap();
        assert!(output.status.success(), "round {round} {words} {how}: {}", text(&output.stderr));
        repaired += u32::from(text(&output.stderr).contains("it has been taken back"));
        let wanted = if world.run.path().join("bridge-xenbr0.json").exists() { &started } else { &before };
        world.is_like(wanted, &format!("round {round}: {words} {how}"));
        if numbers.below(3) == 0 {
            world.does(words);
        }
    }
    println!("{layout}: {died} of {rounds} runs died, {repaired} were taken back by the run after the last");
    assert!(died > rounds / 4 && repaired > rounds / 10, "{died} died, {repaired} repaired");
    world.does(&stop);
    world.is_like(&before, "at the end");
}

#[test]
fn a_hundred_kills_of_todays_layout() {
    kills("layout=bridge", 100);
}

#[test]
fn a_hundred_kills_of_xen_3s_layout() {
    kills("layout=xen3", 100);
}

/// Seconds until a change that nobody confirms is taken back: more than what comes before takes on any machine.
const LIMIT: u64 = 20;

#[test]
fn without_confirmation_it_reverts() {
    let Some(world) = World::new("--confirm") else { return };
    world.rich_card("eth0");
    let before = world.shown();
    let said = world.does(&format!("network-bridge start --confirm {LIMIT}"));
    assert!(said.contains(&format!("taken back in {LIMIT} s")), "{said}");
    assert!(world.ip("addr show dev xenbr0").contains("10.1.0.2/24"));
    let refused = world.fails("network-bridge stop");
    assert!(refused.contains("has not been confirmed yet"), "{refused}");
    let status = world.does("network-bridge status");
    assert!(status.contains("waits for `network-bridge confirm`"), "{status}");
    wait_until(|| !world.run.path().join("pending.json").exists());
    world.is_as(&before, "after the time");
    assert!(world.fails("network-bridge confirm").contains("nothing waits"));
}

#[test]
fn with_confirmation_it_stays() {
    let Some(world) = World::new("network-bridge confirm") else { return };
    world.rich_card("eth0");
    world.does(&format!("network-bridge start --confirm={LIMIT}"));
    let started = world.shown();
    assert_eq!(waiters(&world).len(), 1, "one process waits");
    let said = world.does("network-bridge confirm");
    assert!(said.contains("stays"), "{said}");
    wait_until(|| waiters(&world).is_empty());
    world.is_as(&started, "after the process that waited");
    assert_eq!(world.does("network-bridge start").trim(), "nothing to do");
}

#[test]
fn if_the_waiting_process_is_killed_the_next_run_reverts() {
    let Some(world) = World::new("--confirm with a killed process") else { return };
    world.rich_card("eth0");
    let before = world.shown();
    world.does(&format!("network-bridge start --confirm {LIMIT}"));
    let [waiter] = waiters(&world)[..] else { panic!("one process waits") };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(waiter), nix::sys::signal::Signal::SIGKILL).unwrap();
    let left = || Pending::find(world.run.path()).unwrap().map(|pending| pending.seconds);
    wait_until(|| left() == Some(0));
    assert!(world.ip("addr show dev xenbr0").contains("10.1.0.2/24"), "nobody was there to revert");
    let output = world.command("network-route stop netdev=eth0").output().unwrap();
    assert!(text(&output.stderr).contains("was not confirmed"), "{}", text(&output.stderr));
    world.is_as(&before, "after the next run");
}

#[test]
fn if_the_run_is_killed_the_waiting_process_repairs() {
    let Some(world) = World::new("--confirm with a killed run") else { return };
    world.rich_card("eth0");
    let before = world.shown();
    let mut command = world.command(&format!("network-bridge start --confirm {LIMIT}"));
    command.env("BRIDGE_SCRIPTS_FAULT", "kill-after=12").stdout(Stdio::null()).stderr(Stdio::null());
    assert!(command.spawn().unwrap().wait().unwrap().code().is_none());
    assert!(world.run.path().join("journal.json").exists());
    wait_until(|| !world.run.path().join("journal.json").exists());
    world.is_as(&before, "after the time");
}

#[test]
fn only_one_at_a_time() {
    let Some(world) = World::new("the lock") else { return };
    world.card("eth0", &["10.1.0.2/24"], &[]);
    let before = world.shown();
    let children: Vec<_> = (0..8)
        .map(|number| {
            let word = if number % 2 == 0 { "start" } else { "stop" };
            world.command(&format!("network-bridge {word} netdev=eth0")).stdout(Stdio::null()).spawn().unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    world.does("network-bridge stop netdev=eth0");
    world.is_as(&before, "after eight at once");
}

/// The processes that wait for a confirmation in this world.
fn waiters(world: &World) -> Vec<i32> {
    let run = format!("BRIDGE_SCRIPTS_RUN={}", world.run.path().display());
    let is_ours = |pid: &i32| {
        let of = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        text(&of("cmdline")).contains("revert-when-due") && text(&of("environ")).split('\0').any(|item| item == run)
    };
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(is_ours).collect()
}
