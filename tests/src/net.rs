//! Networks for whole-system tests: hosts, each a network namespace that a process holds, real tools inside them, and
//! netback in dom0's.
//!
//! As an ordinary user all of it happens in a user namespace. Nothing of the machine's own network is touched.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hypervisor::emu::Member;
use hypervisor::{Backend, DomId};
use xenstore_client::Client;

use crate::{Process, have, program, run};

/// A host of a network: a namespace, held by a process that ends with the test.
#[derive(Debug)]
pub struct Host {
    holder: Child,
    /// Whether it is inside a user namespace.
    user: bool,
}

impl Host {
    /// The first host; `None`, said loudly, where the machine forbids it.
    pub fn first() -> Option<Self> {
        let user = !nix::unistd::geteuid().is_root();
        let mut command = Command::new("unshare");
        if user {
            command.args(["--user", "--map-root-user"]);
        }
        Self::hold(command, user)
    }

    /// Another host beside this one.
    ///
    /// # Panics
    /// When it cannot be.
    pub fn beside(&self) -> Self {
        let command = if self.user {
            let mut command = Command::new("nsenter");
            command.args(["--user", "--preserve-credentials", "--target", &self.pid().to_string(), "unshare"]);
            command
        } else {
            Command::new("unshare")
        };
        Self::hold(command, self.user).expect("there is one already")
    }

    /// cat ends when its input does: when this process is gone, however it went.
    fn hold(mut unshare: Command, user: bool) -> Option<Self> {
        unshare.args(["--net", "sh", "-c", "ip link set lo up && echo ready && exec cat"]);
        let child = unshare.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut holder = child.unwrap_or_else(|error| panic!("{unshare:?}: {error}"));
        let mut line = String::new();
        let stdout = holder.stdout.as_mut().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("a line of the holder");
        let host = Self { holder, user };
        if line.trim() == "ready" {
            return Some(host);
        }
        println!("NOT TESTED: networks: this machine makes no network namespace for us");
        None
    }

    /// The process that holds it.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// A command that runs inside.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &self.pid().to_string()]);
        if self.user {
            command.args(["--user", "--preserve-credentials"]);
        }
        command.arg("--").arg(program);
        command
    }

    /// Runs a tool inside, its arguments given as one line.
    ///
    /// # Panics
    /// When it fails; with what it said.
    pub fn run(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        run(self.command(words.next().expect("a program")).args(words))
    }

    /// Makes a cable from an interface here to one of another host; both are up.
    pub fn cable(&self, name: &str, other: &Self, peer: &str, mtu: u32) {
        self.run(&format!("ip link add {name} mtu {mtu} type veth peer name {peer} mtu {mtu} netns {}", other.pid()));
        self.run(&format!("ip link set {name} up"));
        other.run(&format!("ip link set {peer} up"));
    }

    /// The names of its interfaces.
    pub fn links(&self) -> Vec<String> {
        let listed = self.run("ip -o link show");
        let name = |line: &str| Some(line.split(": ").nth(1)?.split('@').next()?.to_owned());
        listed.lines().filter_map(name).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It ends with its input; killed is quicker, and it may have ended already.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// How guests reach each other and the outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topology {
    /// A bridge, with the outside on it too.
    Bridge,
    /// dom0 routes.
    Route,
    /// dom0 routes, and lends its address to what goes out.
    Nat,
}

/// The MTU of bridges and cables that are to carry any.
pub const JUMBO: u32 = 9000;

/// An emulated machine with netback in its dom0, and a host outside at the end of dom0's interface `uplink`.
#[derive(Debug)]
pub struct Network {
    // Dropped in this order.
    /// netback.
    pub netback: Process,
    /// The machine.
    pub emu_xen: Process,
    /// Outside, 10.0.0.200 on a bridge, else 192.0.2.2.
    pub outside: Host,
    /// dom0, 192.0.2.1 unless on a bridge.
    pub dom0: Host,
    topology: Topology,
    folder: tempfile::TempDir,
}

/// What every test here needs.
const TOOLS: [&str; 4] = ["unshare", "nsenter", "ip", "nft"];

impl Network {
    /// Starts it. `None`, said loudly, where that cannot be.
    pub fn start(topology: Topology) -> Option<Self> {
        if !TOOLS.iter().all(|tool| have(tool, "networks")) {
            return None;
        }
        if !Path::new("/dev/net/tun").exists() {
            println!("NOT TESTED: networks: there is no /dev/net/tun here");
            return None;
        }
        let dom0 = Host::first()?;
        let outside = dom0.beside();
        dom0.cable("uplink", &outside, "eth0", JUMBO);
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("machine");
        let emu_xen = Process::start("emu-xen", [OsStr::new("serve"), OsStr::new("--dir"), dir.as_os_str()]);
        emu_xen.expect("ready");
        let netback = Self::serve(&dom0, folder.path());
        let network = Self { netback, emu_xen, outside, dom0, topology, folder };
        network.configure();
        Some(network)
    }

    fn serve(dom0: &Host, folder: &Path) -> Process {
        let mut command = dom0.command(program("netback"));
        let machine = format!("emu:{}", folder.join("machine").display());
        command.args(["serve", "--hypervisor", &machine]).env("BRIDGE_SCRIPTS_RUN", folder);
        let netback = Process::spawn("netback", command);
        netback.expect("serving");
        netback
    }

    fn configure(&self) {
        let Self { dom0, outside, .. } = self;
        match self.topology {
            Topology::Bridge => {
                dom0.run(&format!("ip link add xenbr0 mtu {JUMBO} type bridge"));
                dom0.run("ip link set xenbr0 up");
                dom0.run("ip link set uplink master xenbr0");
                outside.run("ip address add 10.0.0.200/24 dev eth0");
            }
            Topology::Route => {
                dom0.run("ip address add 192.0.2.1/24 dev uplink");
                run(&mut self.scripts(&["network-route", "start", "netdev=uplink"]));
                outside.run("ip address add 192.0.2.2/24 dev eth0");
                outside.run("ip route add 10.0.0.0/24 via 192.0.2.1");
            }
            Topology::Nat => {
                dom0.run("ip address add 192.0.2.1/24 dev uplink");
                run(&mut self.scripts(&["network-nat", "start", "netdev=uplink"]));
                outside.run("ip address add 192.0.2.2/24 dev eth0");
            }
        }
    }

    /// Starts netback anew, after the last one was stopped.
    pub fn restart_netback(&mut self) {
        self.netback = Self::serve(&self.dom0, self.folder.path());
    }

    /// The machine's folder.
    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("machine")
    }

    /// A file beside the machine.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn hypervisor(&self) -> String {
        format!("emu:{}", self.dir().display())
    }

    /// The command `netback ARGS` in dom0.
    pub fn netback<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.dom0.command(program("netback"));
        command.args(args).arg("--hypervisor").arg(self.hypervisor()).env("BRIDGE_SCRIPTS_RUN", self.folder.path());
        command
    }

    /// One of bridge-scripts' programs, the first word its name, in dom0.
    pub fn scripts(&self, words: &[&str]) -> Command {
        let mut command = self.dom0.command(program("bridge-scripts"));
        command.args(words).env("BRIDGE_SCRIPTS_RUN", self.folder.path());
        command
    }

    /// dom0's connection to XenStore.
    pub fn store(&self) -> Client {
        let dom0 = Member::join(self.dir(), DomId::DOM0).expect("dom0");
        dom0.store().expect("XenStore")
    }

    /// What interfaces have in dom0 beside themselves: tables of nftables, and records of filters.
    pub fn kept(&self) -> String {
        let files = std::fs::read_dir(self.folder.path()).expect("the run directory");
        let names = files.map(|file| file.expect("a file").file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> = names.filter(|name| name.starts_with("filter-")).collect();
        names.sort_unstable();
        format!("{}{names:?}", self.dom0.run("nft list tables"))
    }

    /// A guest that waits for its vif 0. Its number makes its addresses: 10.0.0.NUMBER and 00:16:3e:00:00:NUMBER.
    pub fn guest(&self, number: u8, further: &[&str]) -> Guest {
        let host = self.dom0.beside();
        let name = format!("guest{number}");
        let (hypervisor, netns) = (self.hypervisor(), format!("pid:{}", host.pid()));
        let mut args = vec!["guest", "--hypervisor", &hypervisor, "--name", &name, "--vif", "0", "--netns", &netns];
        args.extend(further);
        let process = Process::start("dom0-bench", &args);
        let first = process.expect("waits for its vif 0");
        let domid = first.split(' ').nth(1).expect("domain N").to_owned();
        Guest { process, host, domid, name, number }
    }

    /// The specification of a guest's vif.
    pub fn spec(&self, guest: &Guest, mtu: u32) -> String {
        let common = format!("mac=00:16:3e:00:00:{:02x},mtu={mtu}", guest.number);
        match self.topology {
            Topology::Bridge => format!("{common},bridge=xenbr0"),
            Topology::Route => format!("{common},script=vif-route,ip={},gatewaydev=uplink", guest.address()),
            Topology::Nat => format!("{common},script=vif-nat,ip={},gatewaydev=uplink", guest.address()),
        }
    }

    /// Attaches a guest's vif, waits until the guest has it, and does there what the guest's own scripts would.
    pub fn attach(&self, guest: &Guest, mtu: u32) {
        run(&mut self.netback(["attach", &guest.name, &self.spec(guest, mtu), "--wait", "60"]));
        guest.process.expect("eth0 is connected");
        let address = guest.address();
        match self.topology {
            Topology::Bridge => {
                guest.host.run(&format!("ip address add {address}/24 dev eth0"));
            }
            Topology::Route | Topology::Nat => {
                guest.host.run(&format!("ip address add {address}/32 dev eth0"));
                let gateway = if self.topology == Topology::Route { "192.0.2.1".to_owned() } else { guest.gateway() };
                guest.host.run(&format!("ip route add default via {gateway} dev eth0 onlink"));
            }
        }
    }

    /// A guest with a network.
    pub fn guest_with(&self, number: u8, mtu: u32, further: &[&str]) -> Guest {
        let guest = self.guest(number, further);
        self.attach(&guest, mtu);
        guest
    }

    /// Runs the hotplug program for a guest that is gone, as libxl does when it destroys a domain (libxl_device.c). On the
    /// emulated machine a domain that dies has nobody else to do it.
    pub fn destroyed(&self, guest: &Guest) {
        let script = match self.topology {
            Topology::Bridge => "vif-bridge",
            Topology::Route => "vif-route",
            Topology::Nat => "vif-nat",
        };
        let mut offline = self.scripts(&[script, "offline", "type_if=vif"]);
        offline.env("vif", guest.vif()).env("XENBUS_PATH", format!("backend/vif/{}/0", guest.domid));
        run(offline.env("HYPERVISOR", self.hypervisor()));
    }

    /// Takes a guest's vif away.
    pub fn detach(&self, guest: &Guest) {
        run(&mut self.netback(["detach", &guest.name, "0"]));
        guest.process.expect("eth0 is gone");
    }

    /// The outside's address.
    pub fn outside_address(&self) -> &'static str {
        if self.topology == Topology::Bridge { "10.0.0.200" } else { "192.0.2.2" }
    }
}

/// An emulated guest with a network.
#[derive(Debug)]
pub struct Guest {
    /// Its process.
    pub process: Process,
    /// Where its programs run.
    pub host: Host,
    /// Its domain number.
    pub domid: String,
    /// Its name.
    pub name: String,
    number: u8,
}

impl Guest {
    /// Its IPv4 address.
    pub fn address(&self) -> String {
        format!("10.0.0.{}", self.number)
    }

    /// Its gateway behind NAT, which vif-nat makes from its address.
    fn gateway(&self) -> String {
        format!("10.0.0.{}", if self.number < 128 { self.number + 127 } else { self.number - 127 })
    }

    /// Its interface in dom0.
    pub fn vif(&self) -> String {
        format!("vif{}.0", self.domid)
    }
}

/// Sends `bytes` bytes over one TCP connection from each end to the other, at once, and compares their SHA-256.
///
/// # Panics
/// When they differ, or something fails.
pub fn exchange(listener: &Host, address: &str, connector: &Host, bytes: u64) {
    let port = "5201";
    let python = |host: &Host, mode: &str| {
        let mut command = host.command("python3");
        command.args(["-c", EXCHANGE, mode, address, port, &bytes.to_string()]);
        command
    };
    let (mut listens, mut connects) = (python(listener, "listen"), python(connector, "connect"));
    let (theirs, ours) = std::thread::scope(|scope| {
        let theirs = scope.spawn(move || run(&mut listens));
        let ours = run(&mut connects);
        (theirs.join().expect("the listener"), ours)
    });
    let sums = |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
    let (theirs, ours) = (sums(&theirs), sums(&ours));
    assert_eq!((theirs.len(), ours.len()), (4, 4), "{theirs:?} {ours:?}");
    // Sent bytes and sum, received bytes and sum: crosswise the same.
    assert_eq!((&theirs[..2], &theirs[2..]), (&ours[2..], &ours[..2]));
    assert_eq!(ours[0], bytes.to_string());
}

/// Prints what was sent and what was received: bytes and SHA-256 of each.
const EXCHANGE: &str = r#"
import hashlib, os, socket, sys, threading, time
mode, address, port, total = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
socket.setdefaulttimeout(60)
if mode == "listen":
    listener = socket.create_server((address, port))
    connection, _ = listener.accept()
else:
    for attempt in range(600):
        try:
            connection = socket.create_connection((address, port))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
connection.settimeout(60)
sent, sent_sum = 0, hashlib.sha256()
def send():
    global sent
    block = os.urandom(1 << 20)
    while sent < total:
        # No two blocks are alike.
        part = (sent.to_bytes(8, "little") + block[8:])[:total - sent]
        sent_sum.update(part)
        connection.sendall(part)
        sent += len(part)
    connection.shutdown(socket.SHUT_WR)
sender = threading.Thread(target=send)
sender.start()
received, received_sum = 0, hashlib.sha256()
while part := connection.recv(1 << 20):
    received_sum.update(part)
    received += len(part)
sender.join()
print(sent, sent_sum.hexdigest(), received, received_sum.hexdigest())
"#;
