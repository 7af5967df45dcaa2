//! What whole-system tests share: our programs as processes, and real tools as their clients.

#![forbid(unsafe_code)]

pub mod net;
pub mod sim;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// One of our programs, where cargo put it: beside the folder of the test that runs.
///
/// # Panics
/// When it is not there: cargo test builds it only with `--workspace`.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    let path = test.ancestors().nth(2).expect("target/debug/deps/test").join(name);
    assert!(path.exists(), "{} is missing: run cargo build --workspace", path.display());
    path
}

/// Whether `tool` is installed. If not, says loudly what is not tested; tests/run collects these lines.
pub fn have(tool: &str, what: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(tool).exists()));
    if !found {
        println!("NOT TESTED: {what}: {tool} is not installed");
    }
    found
}

/// Whether only what takes seconds is to be tested.
pub fn quick() -> bool {
    std::env::var_os("QUICK").is_some()
}

/// What `look` gives once it has given the same for a while. A process has ended what it did for another one some moments
/// after that one has heard of it; on a busy machine, many moments.
///
/// # Panics
/// When it does not come to rest.
pub fn at_rest<T: PartialEq + std::fmt::Debug>(look: impl Fn() -> T) -> T {
    let began = Instant::now();
    let (mut last, mut same) = (look(), 0);
    while same < 25 {
        std::thread::sleep(Duration::from_millis(20));
        let now = look();
        same = if now == last { same + 1 } else { 0 };
        assert!(began.elapsed() < PATIENCE, "it does not come to rest: {last:?}, then {now:?}");
        last = now;
    }
    last
}

/// Runs a command to its end.
///
/// # Panics
/// When it fails or takes too long; with what it said.
pub fn run(command: &mut Command) -> String {
    let output = finish(command);
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

/// Runs a command that should fail, and returns what it said.
///
/// # Panics
/// When it succeeds, or ends by a signal (a panic's abort among them).
pub fn fails(command: &mut Command) -> String {
    let output = finish(command);
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let code = output.status.code().unwrap_or(101);
    assert!(code != 0 && code != 101, "{command:?}: {}\n{text}", output.status);
    assert!(!text.contains("panicked"), "{command:?}\n{text}");
    text
}

fn finish(command: &mut Command) -> Output {
    // A process group of its own: fio's jobs are children that outlive it, and keep its output open.
    let child = command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    let (sender, done) = std::sync::mpsc::channel::<()>();
    let description = format!("{command:?}");
    let watchdog = std::thread::spawn(move || {
        if done.recv_timeout(5 * PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{description} takes too long; killed");
            // It may end at this very moment.
            let _ = nix::sys::signal::killpg(pid, nix::sys::signal::Signal::SIGKILL);
        }
    });
    let output = child.wait_with_output().expect("waiting for a command");
    drop(sender);
    watchdog.join().expect("the watchdog");
    output
}

/// A program of ours that runs in the background. Stopped, and its log shown if it complained, when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    lines: std::sync::mpsc::Receiver<String>,
    log: Option<std::thread::JoinHandle<String>>,
}

impl Process {
    /// Starts a program.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(program(name));
        command.args(args);
        Self::spawn(name, command)
    }

    /// Starts a command that becomes one of our programs: its process is the program's.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn(name: &str, mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (sender, lines) = std::sync::mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut stderr = child.stderr.take().expect("piped");
        let log = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Self { name: name.to_owned(), child, lines, log: Some(log) }
    }

    /// Waits for a line of output that contains `text`.
    ///
    /// # Panics
    /// When it does not come.
    pub fn expect(&self, text: &str) -> String {
        let began = Instant::now();
        loop {
            match self.lines.recv_timeout(PATIENCE.saturating_sub(began.elapsed())) {
                Ok(line) if line.contains(text) => return line,
                Ok(_) => {}
                Err(error) => panic!("{} did not say {text:?}: {error}", self.name),
            }
        }
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn send(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        // It may have ended by itself.
        let _ = nix::sys::signal::kill(pid, signal);
    }

    /// Sends a signal and waits for the end.
    pub fn signal(&mut self, signal: nix::sys::signal::Signal) {
        self.send(signal);
        self.wait();
    }

    /// Waits for the end, which is made to come if it takes too long.
    pub fn wait(&mut self) -> Option<std::process::ExitStatus> {
        let began = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(None) => {}
                Ok(status) => return status,
                Err(_) => return None,
            }
            if began.elapsed() > PATIENCE {
                eprintln!("{} does not stop; killed", self.name);
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it has said on standard error. To be called once, after its end.
    pub fn log(&mut self) -> String {
        self.log.take().and_then(|log| log.join().ok()).unwrap_or_default()
    }

    /// Stops it in order and returns its log.
    pub fn stop(mut self) -> String {
        self.end()
    }

    fn end(&mut self) -> String {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        self.log()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.log.is_none() {
            return;
        }
        let log = self.end();
        if std::thread::panicking() {
            eprintln!("--- log of {} ---\n{log}", self.name);
        } else {
            assert!(!log.contains("panicked"), "{} panicked:\n{log}", self.name);
        }
    }
}

/// An emulated machine with blkback in its dom0, all of it processes of their own.
#[derive(Debug)]
pub struct Dom0 {
    // Dropped in this order: guests are the tests' own, then blkback, then the machine.
    /// blkback.
    pub blkback: Process,
    /// The machine.
    pub emu_xen: Process,
    folder: tempfile::TempDir,
}

impl Dom0 {
    /// Starts both.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("machine");
        let emu_xen = Process::start("emu-xen", [OsStr::new("serve"), OsStr::new("--dir"), dir.as_os_str()]);
        emu_xen.expect("ready");
        let machine = format!("emu:{}", dir.display());
        let blkback = Process::start("blkback", ["serve", "--hypervisor", &machine]);
        blkback.expect("serving");
        Self { blkback, emu_xen, folder }
    }

    /// What `--hypervisor` takes.
    pub fn hypervisor(&self) -> String {
        format!("emu:{}", self.dir().display())
    }

    /// The machine's folder.
    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("machine")
    }

    /// A file beside the machine.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A sparse image.
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        std::fs::File::create(&path).and_then(|file| file.set_len(bytes)).expect("an image");
        path
    }

    /// The command `blkback ARGS`.
    pub fn blkback<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(program("blkback"));
        command.args(args).arg("--hypervisor").arg(self.hypervisor());
        command
    }

    /// A guest that offers its disk at a socket.
    pub fn guest(&self, name: &str, further: &[&str]) -> Guest {
        let socket = self.path(&format!("{name}.sock"));
        let nbd = format!("unix:{}", socket.display());
        let hypervisor = self.hypervisor();
        let mut args = vec!["guest", "--hypervisor", &hypervisor, "--name", name, "--nbd", &nbd];
        args.extend(further);
        let process = Process::start("dom0-bench", &args);
        let first = process.expect("waits for its disk");
        let domid = first.split(' ').nth(1).expect("domain N").to_owned();
        Guest { process, socket, domid, name: name.to_owned() }
    }

    /// A guest with a disk, attached and connected.
    pub fn guest_with(&self, name: &str, image: &Path, access: &str, further: &[&str]) -> Guest {
        let guest = self.guest(name, further);
        let disk = format!("{},raw,xvda,{access}", image.display());
        run(&mut self.blkback(["attach", name, &disk, "--wait", "60"]));
        guest.process.expect("nbd+unix");
        guest
    }
}

/// An emulated guest.
#[derive(Debug)]
pub struct Guest {
    /// Its process.
    pub process: Process,
    socket: PathBuf,
    /// Its domain number.
    pub domid: String,
    name: String,
}

impl Guest {
    /// Its disk, as NBD clients name it.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// Takes its disk away.
    pub fn detach(&self, dom0: &Dom0) {
        run(&mut dom0.blkback(["detach", &self.name, "xvda"]));
        self.process.expect("is gone");
    }
}
