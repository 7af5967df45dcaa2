//! An emulated machine, `netback serve` as a process in a network namespace that the test has made, and a guest.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub, reason = "each test file uses a part")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::emu::{GuestOptions, GuestSeat, Limits, Machine, Member, Running};
use hypervisor::{Backend as _, DomId, Guest as _};
use nix::sched::{CloneFlags, unshare};
use xenstore_client::{Client, Store};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Whether this thread, and with it every process that it starts, has a network of its own now.
pub fn namespace(what: &str) -> bool {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        println!("NOT TESTED: {what}: no network namespace for this thread ({error}); run it as root");
        return false;
    }
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/net/tun") {
        println!("NOT TESTED: {what}: /dev/net/tun: {error}");
        return false;
    }
    if Command::new("ip").arg("-V").output().is_err() {
        println!("NOT TESTED: {what}: ip (iproute2) is not installed");
        return false;
    }
    true
}

/// Runs `ip` with these words.
pub fn ip(words: &str) -> String {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "ip {words}: {text}");
    text
}

/// The links of this thread's namespace.
pub fn links() -> Vec<String> {
    let mut links: Vec<String> = ip("-o link show")
        .lines()
        .filter_map(|line| line.split(": ").nth(1))
        .map(|name| name.split('@').next().unwrap_or(name).to_owned())
        .collect();
    links.sort_unstable();
    links
}

/// The tables of nftables in this thread's namespace; none where nft is not installed to list them.
pub fn tables() -> Vec<String> {
    let Ok(output) = Command::new("nft").args(["list", "tables"]).output() else {
        println!("NOT TESTED: which tables are left: nft is not installed");
        return Vec::new();
    };
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

/// What is left of interfaces in the kernel and in XenStore: nothing.
pub fn assert_nothing_left(dom0: &Dom0, links_before: &[String]) {
    // The backend lets go of a link once its device is closed, which is all that is waited for when one is detached.
    let left = || (dom0.traces(), tables(), dom0.filters(), links());
    let nothing = (vec![], vec![], vec![], links_before.to_vec());
    let began = Instant::now();
    while left() != nothing && began.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(left(), nothing);
}

/// Polls until it is so.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a command said, and whether it succeeded.
pub struct Said {
    pub text: String,
    pub success: bool,
}

/// Without the line that the first `online` says where the kernel cannot limit rates; that is no failure of it.
fn without_what_this_kernel_lacks(text: &str) -> String {
    let (lacks, rest): (Vec<&str>, Vec<&str>) =
        text.split_inclusive('\n').partition(|line| line.contains("it needs the module act_police"));
    if !lacks.is_empty() {
        println!("NOT TESTED: how often a guest may send ARP and the like: this kernel has no act_police");
    }
    rest.concat()
}

/// The machine and its netback.
pub struct Dom0 {
    pub store: Client,
    server: Option<Child>,
    machine: Running,
    pub folder: tempfile::TempDir,
}

impl Dom0 {
    /// A machine that nobody serves yet, and the bridge xenbr0 in this thread's namespace.
    pub fn unserved() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let machine = Machine::start(folder.path().join("machine"), Limits::default()).unwrap();
        let store = Member::local(machine.machine(), DomId(0)).unwrap().store().unwrap();
        ip("link set lo up");
        ip("link add xenbr0 type bridge");
        ip("link set xenbr0 up");
        Self { store, server: None, machine, folder }
    }

    pub fn start() -> Self {
        let mut dom0 = Self::unserved();
        dom0.serve();
        dom0
    }

    /// Starts `netback serve`, and waits until it does.
    pub fn serve(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.log()).unwrap();
        let mut child = self.netback(&["serve"]).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        self.server = Some(child);
        assert_eq!(line, "netback: serving /local/domain/0/backend/vif\n", "{}", self.said());
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("serve.log")
    }

    /// What all services so far have logged.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// The command `netback WORDS`.
    pub fn netback(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_netback"));
        command.args(words).arg("--hypervisor").arg(format!("emu:{}", self.machine.dir().display()));
        command.env("BRIDGE_SCRIPTS_RUN", self.folder.path().join("run")).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, words: &[&str]) -> Said {
        let output = self.netback(words).output().unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let code = output.status.code();
        assert!(code.is_some_and(|code| code != 101) && !text.contains("panicked"), "{words:?}: {text}");
        Said { text: without_what_this_kernel_lacks(&text), success: output.status.success() }
    }

    /// Runs a command that should succeed.
    pub fn ok(&self, words: &[&str]) -> String {
        let said = self.run(words);
        assert!(said.success, "{words:?}: {}\n--- serve ---\n{}", said.text, self.said());
        said.text
    }

    /// Runs a command that should fail.
    pub fn fails(&self, words: &[&str]) -> String {
        let said = self.run(words);
        assert!(!said.success, "{words:?}: {}", said.text);
        said.text
    }

    /// A new guest.
    pub fn guest(&self, name: &str) -> Arc<GuestSeat> {
        let options = GuestOptions { name: name.to_owned(), ..GuestOptions::default() };
        Arc::new(GuestSeat::local(self.machine.machine(), options).unwrap())
    }

    /// The value of a key of the backend's half of a guest's interface.
    pub fn key(&self, guest: &GuestSeat, devid: u32, key: &str) -> Option<String> {
        self.store.read_opt(&format!("/local/domain/0/backend/vif/{}/{devid}/{key}", guest.domid())).unwrap()
    }

    /// Everything there is in XenStore about interfaces.
    pub fn traces(&self) -> Vec<String> {
        let below = |path: String| {
            let names = self.store.directory_opt(&path).unwrap().unwrap_or_default();
            names.into_iter().map(move |name| format!("{path}/{name}"))
        };
        let domains = below("/local/domain".to_owned());
        let fronts = domains.flat_map(|domain| below(format!("{domain}/device/vif")).collect::<Vec<_>>());
        below("/local/domain/0/backend/vif".to_owned()).chain(fronts).collect()
    }

    /// Names of the records of filters.
    pub fn filters(&self) -> Vec<String> {
        let files = std::fs::read_dir(self.folder.path().join("run")).into_iter().flatten();
        let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("filter-")).collect()
    }

    /// Kills the service in the middle of whatever it does, and waits for its end.
    pub fn kill(&mut self) {
        let mut child = self.server.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Stops the service as init does, and waits for its end.
    pub fn stop(&mut self) {
        let Some(mut child) = self.server.take() else { return };
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}\n{}", self.said());
    }
}

impl Drop for Dom0 {
    fn drop(&mut self) {
        if let Some(mut child) = self.server.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
        let log = self.said();
        if std::thread::panicking() {
            eprintln!("--- log of netback serve ---\n{log}");
        } else {
            assert!(!log.contains("panicked"), "netback serve panicked:\n{log}");
        }
    }
}

/// An executable script in a folder.
pub fn script(folder: &Path, name: &str, text: &str) -> String {
    use std::os::unix::fs::PermissionsExt;

    let path = folder.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path.into_os_string().into_string().unwrap()
}
