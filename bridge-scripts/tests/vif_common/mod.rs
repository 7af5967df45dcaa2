//! What the tests of nft/, antispoof and vif/ share: namespaces of their own, and programs run in them.

#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod cable;
pub(crate) mod frames;
#[path = "../common/settled.rs"]
mod settled;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bridge_scripts::antispoof::Rules;
use bridge_scripts::apply::{Options, look};
use bridge_scripts::state::What;
use bridge_scripts::vif::{self, Event};
use hypervisor::emu::{Limits, Machine, Running};
use xenstore_client::Store;

pub(crate) use settled::PATIENCE;

/// Runs `body` in a network namespace of its own, on a thread of its own. `name` is the test's, for a second start of
/// this program in a user namespace where we are not root.
pub(crate) fn alone(name: &str, body: impl FnOnce() + Send) {
    if !nix::unistd::geteuid().is_root() {
        let myself = std::env::current_exe().unwrap();
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--"]).arg(myself).args([name, "--exact", "--nocapture"]);
        match command.status() {
            Ok(status) => assert!(status.success(), "{name} failed in a user namespace"),
            Err(error) => println!("NOT TESTED: {name}: not root, and no program unshare: {error}"),
        }
        return;
    }
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            body();
        });
        if let Err(panic) = inside.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// The same for what needs taps.
pub(crate) fn alone_with_taps(name: &str, body: impl FnOnce() + Send) {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => alone(name, body),
        Err(error) => println!("NOT TESTED: {name}: /dev/net/tun: {error}"),
    }
}

/// Runs a command line (words between blanks) in this thread's namespace; its output, or what it complained about.
pub(crate) fn try_sh(line: &str) -> Result<String, String> {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{line}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr)))
    }
}

/// The same, for what must work.
#[track_caller]
pub(crate) fn sh(line: &str) -> String {
    try_sh(line).unwrap_or_else(|error| panic!("{error}"))
}

/// Whether a program is there; says that `what` is not tested if it is not.
pub(crate) fn have(program: &str, what: &str) -> bool {
    let there = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !there {
        println!("NOT TESTED: {what}: there is no program {program}");
    }
    there
}

/// Lets `nft -f -` read a text.
pub(crate) fn nft_reads(text: &str) -> Result<(), String> {
    use std::io::Write;

    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// What `ip`, `bridge` and `nft` show that a program of ours may have changed, without what changes by itself; once the
/// kernel has settled.
pub(crate) fn shown() -> String {
    settle();
    now()
}

/// Waits until the kernel has settled.
pub(crate) fn settle() {
    settled::wait(&[&|words| sh(&format!("ip {words}"))]);
}

/// The same at this moment.
pub(crate) fn now() -> String {
    // IPv6's own addresses and groups come and go with the link.
    let but = |text: String, own: &[&str]| {
        let lines = text.lines().filter(|line| !own.iter().any(|word| line.contains(word)));
        lines.collect::<Vec<_>>().join("\n")
    };
    // These come in the order of a hash.
    let sorted = |text: String| {
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        lines.join("\n")
    };
    let own = ["fe80::", "ff00::", "anycast"];
    // Carriers follow a little later; a device that was on once keeps its queue.
    let links = |text: String| {
        let words = text.split(' ').map(|word| match word {
            "noop" | "pfifo_fast" | "fq_codel" => "QUEUE",
            "UP" | "DOWN" | "UNKNOWN" | "disabled" | "forwarding" | "learning" | "listening" => "STATE",
            other => other,
        });
        words.collect::<Vec<_>>().join(" ").replace("NO-CARRIER,", "").replace(",LOWER_UP", "")
    };
    let parts = [
        links(sh("ip -o link show")),
        links(sh("bridge -d -o link show")),
        but(sh("bridge fdb show"), &["permanent", "01:00:5e", "33:33:"]),
        but(sh("ip -o addr show"), &own),
        sh("ip route").replace(" linkdown", ""),
        but(sh("ip -6 route show table all"), &own),
        sorted(sh("ip neigh show nud permanent")),
        sorted(sh("ip neigh show proxy")),
        sorted(sh("ip -6 neigh show proxy")),
        tables(&sh("nft list ruleset")),
        filters(),
    ];
    parts.join("\n")
}

/// What is at the ingress of devices, in the order of their names.
fn filters() -> String {
    let qdiscs = sh("tc qdisc show");
    let mut devices: Vec<&str> =
        qdiscs.lines().filter_map(|line| line.strip_prefix("qdisc clsact ffff: dev ")?.split(' ').next()).collect();
    devices.sort_unstable();
    let of = |device: &&str| {
        format!("{device}: {}", try_sh(&format!("tc filter show dev {device} ingress")).unwrap_or_default())
    };
    devices.iter().map(of).collect()
}

/// Tables in one order: a table that is put back is listed last.
fn tables(ruleset: &str) -> String {
    let mut tables: Vec<&str> = ruleset.split("\n}\n").collect();
    tables.sort_unstable();
    tables.join("\n}\n")
}

/// It becomes what was shown: the kernel finishes some things by a worker, a little later.
#[track_caller]
pub(crate) fn becomes(now: impl Fn() -> String, wanted: &str, when: &str) {
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE && now() != wanted {
        std::thread::sleep(Duration::from_millis(20));
    }
    same(&now(), wanted, when);
}

/// Compares two of them, and shows what differs.
#[track_caller]
pub(crate) fn same(now: &str, wanted: &str, when: &str) {
    let lost: Vec<&str> = wanted.lines().filter(|line| !now.contains(line)).collect();
    let new: Vec<&str> = now.lines().filter(|line| !wanted.contains(line)).collect();
    let first = now.lines().zip(wanted.lines()).find(|(now, wanted)| now != wanted);
    assert!(now == wanted, "{when}: lost {lost:#?}, new {new:#?}, first {first:#?}");
}

/// A machine with an embedded XenStore and a run directory of its own.
pub(crate) struct Scene {
    store: xenstore_client::Client,
    dir: tempfile::TempDir,
    pub(crate) options: Options,
    _machine: Running,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine::start(dir.path().join("machine"), Limits::default()).unwrap();
        let store = hypervisor::Machine::Emulated(dir.path().join("machine")).store().unwrap();
        let options = Options { run: dir.path().join("run"), fault: None, ..Options::default() };
        Self { store, dir, options, _machine: machine }
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.options.run.clone()
    }

    /// The machine as the variable HYPERVISOR names it.
    pub(crate) fn hypervisor(&self) -> String {
        format!("emu:{}", self.dir.path().join("machine").display())
    }

    fn backend(domid: u16, handle: u32) -> String {
        format!("/local/domain/0/backend/vif/{domid}/{handle}")
    }

    /// An interface as libxl and a backend leave it before the hotplug program runs.
    pub(crate) fn vif(&self, domid: u16, handle: u32, mac: &str, keys: &[(&str, &str)]) {
        sh(&format!("ip tuntap add vif{domid}.{handle} mode tap"));
        self.describe(domid, handle, mac, keys);
    }

    /// The same without the device.
    pub(crate) fn describe(&self, domid: u16, handle: u32, mac: &str, keys: &[(&str, &str)]) {
        let frontend = format!("/local/domain/{domid}/device/vif/{handle}");
        let (id, number) = (domid.to_string(), handle.to_string());
        let usual = [
            ("frontend", frontend.as_str()),
            ("frontend-id", &id),
            ("handle", &number),
            ("mac", mac),
            ("script", "vif-bridge"),
            ("hotplug-status", ""),
            ("state", "2"),
        ];
        for (key, value) in usual.iter().chain(keys) {
            self.set(domid, handle, key, value);
        }
    }

    pub(crate) fn set(&self, domid: u16, handle: u32, key: &str, value: &str) {
        self.store.write(&format!("{}/{key}", Self::backend(domid, handle)), value).unwrap();
    }

    pub(crate) fn unset(&self, domid: u16, handle: u32, key: &str) {
        self.store.rm_if_exists(&format!("{}/{key}", Self::backend(domid, handle))).unwrap();
    }

    pub(crate) fn forget(&self, domid: u16, handle: u32) {
        self.store.rm(&Self::backend(domid, handle)).unwrap();
    }

    pub(crate) fn read(&self, path: &str) -> Option<String> {
        self.store.read_opt(path).unwrap()
    }

    pub(crate) fn key(&self, domid: u16, handle: u32, key: &str) -> Option<String> {
        self.read(&format!("{}/{key}", Self::backend(domid, handle)))
    }

    pub(crate) fn online(&self, script: &str, domid: u16, handle: u32) -> Result<(), vif::Error> {
        self.event(script, Event::Online, domid, handle)
    }

    pub(crate) fn offline(&self, script: &str, domid: u16, handle: u32) -> Result<(), vif::Error> {
        self.event(script, Event::Offline, domid, handle)
    }

    fn event(&self, script: &str, event: Event, domid: u16, handle: u32) -> Result<(), vif::Error> {
        let device = format!("vif{domid}.{handle}");
        vif::hotplug_with(self.options.clone(), &self.store, &Self::backend(domid, handle), script, event, &device)
    }

    /// Runs one of the programs as libxl does; whether it succeeded.
    pub(crate) fn program(&self, name: &str, domid: u16, handle: u32, words: &[&str]) -> bool {
        let path = |name: &str| self.dir.path().join(name).to_str().unwrap().to_owned();
        let device = format!("vif{domid}.{handle}");
        let env = |name: &str| match name {
            "HYPERVISOR" => Some(format!("emu:{}", path("machine"))),
            // As libxl writes it: below the home of the backend's domain.
            "XENBUS_PATH" => Some(format!("backend/vif/{domid}/{handle}")),
            "XENBUS_TYPE" => Some("vif".to_owned()),
            "vif" => Some(device.clone()),
            "INTERFACE" => Some(format!("{device}-emu")),
            "netdev" => Some(String::new()),
            "BRIDGE_SCRIPTS_RUN" => Some(path("run")),
            "BRIDGE_SCRIPTS_CONF" => Some(path("settings")),
            "XEN_HOTPLUG_LOG" => Some(path("log")),
            _ => None,
        };
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        // An exit code cannot be compared.
        format!("{:?}", vif::main(name, &words, &env)) == format!("{:?}", std::process::ExitCode::SUCCESS)
    }

    /// The log of hotplug scripts.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Writes the machine's settings.
    pub(crate) fn settings(&self, text: &str) {
        std::fs::write(self.dir.path().join("settings"), text).unwrap();
    }

    /// What an interface may send, where the kernel has just the filter that these rules make.
    pub(crate) fn rules(&self, device: &str) -> Option<Rules> {
        let what = What { filters: vec![device.to_owned()], ..What::links::<&str>([]) };
        look(&self.run(), &what).unwrap().filters.remove(device)?
    }

    /// No rules, routes and records of interfaces are left.
    #[track_caller]
    pub(crate) fn nothing_left(&self) {
        assert_eq!(filters(), "");
        let tables = sh("nft list tables");
        assert!(!tables.contains("xen-"), "{tables}");
        let files =
            std::fs::read_dir(self.run()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let left: Vec<String> =
            files.filter(|name| !["lock", "dnsmasq-hosts", "no-act_police"].contains(&name.as_str())).collect();
        assert_eq!(left, Vec::<String>::new());
    }
}
