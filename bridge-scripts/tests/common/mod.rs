//! A network namespace for one test, with cards whose other ends are in a second one, "the outside".

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) mod settled;

pub(crate) use settled::PATIENCE;

pub(crate) struct World {
    pub(crate) run: TempDir,
    outside: Child,
}

/// A program that goes on until it is dropped.
pub(crate) struct Program(Child);

impl Program {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl World {
    /// A namespace of the calling thread's own. `None`, with a line that says so, where there is no permission.
    pub(crate) fn new(what: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("NOT TESTED: {what}: needs root, for network namespaces");
            return None;
        }
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        // A namespace is held by a process in it, which ends with its standard input.
        let mut outside = Command::new("unshare")
            .args(["-n", "sh", "-c", "echo; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        outside.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let world = Self { run: TempDir::new().unwrap(), outside };
        world.ip("link set lo up");
        // No duplicate detection, so that snapshots need not wait for the kernel's link-local addresses.
        std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
        world.outside("ip link set lo up");
        Some(world)
    }

    /// A card `name` with `addresses`, up, whose other end outside is `o-name` with `theirs`.
    pub(crate) fn card(&self, name: &str, addresses: &[&str], theirs: &[&str]) {
        let (pid, other) = (self.outside.id(), format!("o-{name}"));
        self.ip(&format!("link add {name} type veth peer name {other} netns {pid}"));
        self.ip(&format!("link set {name} up"));
        self.outside(&format!("ip link set {other} up"));
        for address in addresses {
            self.ip(&format!("addr add {address} dev {name}{}", nodad(address)));
        }
        for address in theirs {
            self.outside(&format!("ip addr add {address} dev {other}{}", nodad(address)));
        }
    }

    /// A card with everything that has to move: two networks, a label, a lifetime, IPv6, routes with metrics and in other
    /// tables, a static neighbour.
    pub(crate) fn rich_card(&self, name: &str) {
        self.card(name, &["10.1.0.2/24", "fd00:1::2/64"], &["10.1.0.1/24", "fd00:1::1/64"]);
        for command in [
            "addr add 10.1.0.3/24 dev NAME label NAME:1",
            "addr add 10.7.0.2/16 brd + dev NAME valid_lft 3000 preferred_lft 2000",
            "addr add fd00:7::2/64 dev NAME nodad noprefixroute",
            "route add default via 10.1.0.1 dev NAME metric 100 mtu 1400",
            "route add default via 10.1.0.9 dev NAME metric 200",
            "route add 192.168.5.0/24 via 10.1.0.1 dev NAME src 10.1.0.3 table 77",
            "route add 192.168.6.0/24 dev NAME scope link",
            "route add 192.168.7.0/24 nexthop via 10.1.0.1 dev NAME weight 2 nexthop via 10.1.0.9 dev NAME weight 1",
            "-6 route add default via fd00:1::1 dev NAME metric 1024",
            "-6 route add fd00:9::/64 via fe80::99 dev NAME table 77",
            "neigh add 10.1.0.77 lladdr 02:00:00:00:00:77 dev NAME nud permanent",
        ] {
            self.ip(&command.replace("NAME", name));
        }
        self.settle();
    }

    /// Waits until the kernel has done what it does by itself after a change, here and outside: see `settled`.
    pub(crate) fn settle(&self) {
        settled::wait(&[&|words| self.ip(words), &|words| self.outside(&format!("ip {words}"))]);
    }

    pub(crate) fn ip(&self, words: &str) -> String {
        ok(Command::new("ip").args(words.split(' ').filter(|word| !word.is_empty())))
    }

    /// A command in the outside namespace.
    pub(crate) fn outside(&self, words: &str) -> String {
        let pid = self.outside.id().to_string();
        ok(Command::new("nsenter").args(["-t", &pid, "-n"]).args(words.split(' ')))
    }

    /// A program outside, which goes on until it is dropped.
    pub(crate) fn outside_program(&self, words: &[&str]) -> Program {
        let pid = self.outside.id().to_string();
        Program::start(Command::new("nsenter").args(["-t", &pid, "-n"]).args(words))
    }

    /// A router outside advertises itself and a /64 for autoconfiguration at a card's other end (RFC 4861, 4.2 and 4.6.2).
    pub(crate) fn advertise(&self, card: &str, prefix: &str) {
        // The card may have got its carrier just now.
        let program = format!(
            r#"
import socket, struct, time
message = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
message += struct.pack("!BBBBIII", 3, 4, 64, 0xc0, 3600, 1800, 0) + socket.inet_pton(socket.AF_INET6, "{prefix}")
raw = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
for patience in range(100):
    try:
        raw.sendto(message, ("ff02::1", 0, 0, socket.if_nametoindex("{card}")))
        break
    except OSError:
        time.sleep(0.05)
else:
    raise SystemExit("cannot send")
"#
        );
        let pid = self.outside.id().to_string();
        ok(Command::new("nsenter").args(["-t", &pid, "-n", "python3", "-c", &program]));
    }

    /// The program, with this world's run directory.
    pub(crate) fn command(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bridge-scripts"));
        command.args(words.split(' ').filter(|word| !word.is_empty())).env("BRIDGE_SCRIPTS_RUN", self.run.path());
        command
    }

    /// Runs the program, which has to succeed; gives what it printed.
    pub(crate) fn does(&self, words: &str) -> String {
        ok(&mut self.command(words))
    }

    /// Runs the program, which has to fail; gives what it complained.
    pub(crate) fn fails(&self, words: &str) -> String {
        let output = self.command(words).output().unwrap();
        assert!(!output.status.success(), "{words} did not fail: {}", text(&output.stdout));
        text(&output.stderr)
    }

    /// An echo server outside.
    pub(crate) fn echo(&self, address: &str) -> SocketAddr {
        let (pid, address) = (self.outside.id(), address.parse::<SocketAddr>().unwrap());
        let (ready, wait) = std::sync::mpsc::channel();
        thread::spawn(move || {
            setns(File::open(format!("/proc/{pid}/ns/net")).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            let listener = TcpListener::bind(address).unwrap();
            ready.send(listener.local_addr().unwrap()).unwrap();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    let mut buffer = [0; 4096];
                    // A connection that breaks ends here; the client's side is what the test looks at.
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        if stream.write_all(&buffer[..length]).is_err() {
                            break;
                        }
                    }
                });
            }
        });
        wait.recv().unwrap()
    }

    /// Everything iproute2 shows of this namespace, without what changes by itself; once the kernel has settled.
    pub(crate) fn shown(&self) -> BTreeMap<&'static str, Value> {
        self.settle();
        self.now()
    }

    fn now(&self) -> BTreeMap<&'static str, Value> {
        let mut shown = BTreeMap::new();
        for words in [
            "-j -d link",
            "-j addr",
            "-j -4 route show table all",
            "-j -6 route show table all",
            "-j neigh show nud permanent",
            "-j rule",
            "-j -6 rule",
        ] {
            let mut value = json(&self.ip(words));
            strip(&mut value);
            if let Some(routes) = value.as_array_mut().filter(|_| words.contains("route")) {
                // Those of the local table are listed as they came.
                routes.sort_by_key(|route| (route["table"] == "local").then(|| route.to_string()));
            }
            shown.insert(words, value);
        }
        let mut bridges = json(&ok(Command::new("bridge").args(["-j", "-d", "link"])));
        strip(&mut bridges);
        shown.insert("bridge", bridges);
        shown.insert("nft", Value::String(ok(Command::new("nft").args(["list", "ruleset"]))));
        let of = |path: &str| Value::String(std::fs::read_to_string(Path::new("/proc/sys/net").join(path)).unwrap());
        for path in
            ["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/conf/all/rp_filter", "ipv4/conf/default/forwarding"]
        {
            shown.insert(path, of(path));
        }
        shown
    }

    /// The same without devices' numbers: a device that is made again has another.
    pub(crate) fn shown_without_indices(&self) -> BTreeMap<&'static str, Value> {
        without_any_index(self.shown())
    }

    /// Everything becomes as it was shown: the kernel finishes some things by a worker, a little later.
    pub(crate) fn is_as(&self, wanted: &BTreeMap<&'static str, Value>, when: &str) {
        becomes(wanted, when, || self.now());
    }

    /// The same, whatever numbers devices have.
    pub(crate) fn is_like(&self, wanted: &BTreeMap<&'static str, Value>, when: &str) {
        becomes(wanted, when, || without_any_index(self.now()));
    }

    /// Sysctls of a link.
    pub(crate) fn sysctl(&self, path: &str) -> String {
        std::fs::read_to_string(Path::new("/proc/sys/net").join(path)).unwrap().trim().to_owned()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // It may have ended already; only its zombie would stay.
        let _ = self.outside.kill();
        let _ = self.outside.wait();
    }
}

fn nodad(address: &str) -> &'static str {
    if address.contains(':') { " nodad" } else { "" }
}

fn json(text: &str) -> Value {
    if text.trim().is_empty() { Value::Null } else { serde_json::from_str(text).unwrap() }
}

/// Leaves out what changes by itself: lives that run down, states of the carrier, indices of devices outside.
fn strip(value: &mut Value) {
    match value {
        Value::Array(items) => {
            items.retain(|item| {
                !matches!(item.as_str(), Some("LOWER_UP" | "NO-CARRIER" | "linkdown" | "offload" | "dead"))
            });
            items.iter_mut().for_each(strip);
            items.retain(|item| item.as_object().is_none_or(|map| !map.is_empty()));
        }
        Value::Object(map) => {
            for key in [
                "operstate",
                "tentative",
                "stats64",
                "linkmode",
                "carrier_changes",
                "expires",
                "gc_timer",
                "hello_timer",
            ] {
                map.remove(key);
            }
            for key in ["valid_life_time", "preferred_life_time"] {
                let forever = map.get(key).and_then(Value::as_u64) == Some(u32::MAX.into());
                if let Some(life) = map.get_mut(key) {
                    *life = Value::Bool(forever);
                }
            }
            map.values_mut().for_each(strip);
        }
        _ => (),
    }
}

fn without_indices(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(without_indices),
        Value::Object(map) => {
            for key in ["ifindex", "link_index", "no", "id", "port_no", "gc_timer", "hello_timer"] {
                map.remove(key);
            }
            map.values_mut().for_each(without_indices);
        }
        _ => (),
    }
}

fn without_any_index(mut shown: BTreeMap<&'static str, Value>) -> BTreeMap<&'static str, Value> {
    shown.values_mut().for_each(without_indices);
    // The order of devices is that of their numbers.
    for list in shown.values_mut().filter_map(Value::as_array_mut) {
        list.sort_by_key(|value| value.to_string());
    }
    shown
}

fn becomes(wanted: &BTreeMap<&'static str, Value>, when: &str, shown: impl Fn() -> BTreeMap<&'static str, Value>) {
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        if shown() == *wanted {
            return;
        }
        thread::sleep(Duration::from_millis(30));
    }
    same(wanted, &shown(), when);
}

/// The first difference of two snapshots, for a message.
fn same(before: &BTreeMap<&'static str, Value>, after: &BTreeMap<&'static str, Value>, when: &str) {
    for (part, value) in before {
        let (was, is) =
            (serde_json::to_string_pretty(value).unwrap(), serde_json::to_string_pretty(&after[part]).unwrap());
        if was != is {
            let lost: Vec<&str> = was.lines().filter(|line| !is.contains(line)).collect();
            let new: Vec<&str> = is.lines().filter(|line| !was.contains(line)).collect();
            panic!("{when}: {part} differs; lost {lost:#?}, new {new:#?}\nbefore {was}\nafter {is}");
        }
    }
}

pub(crate) fn ok(command: &mut Command) -> String {
    let output: Output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A connection over which words come back.
pub(crate) struct Line(TcpStream);

impl Line {
    pub(crate) fn open(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// The same from an address of one's own choice.
    pub(crate) fn open_from(from: SocketAddr, to: SocketAddr) -> Self {
        use rustix::net::{AddressFamily, SocketType, bind, connect, socket};

        let family = if from.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = socket(family, SocketType::STREAM, None).unwrap();
        bind(&socket, &from).unwrap();
        connect(&socket, &to).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// Sends something, and waits until it has come back.
    pub(crate) fn says(&mut self, words: &str) {
        self.0.write_all(words.as_bytes()).unwrap();
        let mut back = vec![0; words.len()];
        self.0.read_exact(&mut back).unwrap();
        assert_eq!(back, words.as_bytes());
    }
}

/// The time is generous, and nothing is said about it.
pub(crate) fn wait_until(done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "it did not happen");
        thread::sleep(Duration::from_millis(50));
    }
}
