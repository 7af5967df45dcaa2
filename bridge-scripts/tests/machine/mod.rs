//! A machine of namespaces: network, processes, files and users' names of its own, so that programs that look after a
//! machine's network can run in it. What it has of /usr, /etc and /var is this machine's, with the packages of
//! target/unpacked (tests/install-packages) on top; what is written goes with it. On the other end of its eth0 is a DHCP
//! server, which also advertises itself as IPv6's router.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

use crate::common::{Program, ok, text};

/// The shortest that dnsmasq gives.
pub(crate) const LEASE: u32 = 120;

/// Makes the machine's root file system in $ROOT and is its init. Of /dev there is what every program wants. A /sys that
/// cannot be written tells NetworkManager and networkd that there is no udev here; dhcpcd.conf's `nodev` tells dhcpcd.
const INIT: &str = r#"
set -e
read -r pid rest < /proc/self/stat
mount -t tmpfs -o mode=755 machine "$ROOT"
cd "$ROOT"
for part in usr etc var; do
    mkdir -p layers/$part layers/work-$part root/$part
    lower=/$part
    [ ! -d "$UNPACKED/$part" ] || lower=$UNPACKED/$part:$lower
    mount -t overlay -o "lowerdir=$lower,upperdir=layers/$part,workdir=layers/work-$part" machine root/$part
done
cd root
mkdir -p proc sys dev run tmp root
for link in bin sbin lib lib64; do ln -s usr/$link $link; done
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mknod -m 666 dev/null c 1 3
mknod -m 666 dev/zero c 1 5
mknod -m 666 dev/random c 1 8
mknod -m 666 dev/urandom c 1 9
mkdir -p usr/local/sbin run/dbus
touch usr/local/sbin/network-bridge
mount --bind "$PROGRAM" usr/local/sbin/network-bridge
for user in messagebus systemd-network dhcpcd; do
    chroot . getent passwd $user > /dev/null || chroot . useradd --system --home-dir /usr/lib/dhcpcd --no-create-home --user-group $user
done
[ ! -e etc/dhcpcd.conf ] || echo nodev >> etc/dhcpcd.conf
ip link set lo up
touch run/is-a-machine
# Ends with its standard input; until then it is who orphans are given to.
exec chroot . sh -c "echo ready $pid; cat; exit"
"#;

pub(crate) struct Machine {
    init: Child,
    /// Its first process's number here.
    pid: String,
    outside: Child,
    dir: TempDir,
    _server: Program,
}

/// Where tests/install-packages unpacks.
fn unpacked() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("target/unpacked/root")
}

impl Machine {
    /// `None`, with a line that says so, where this cannot be tested. `needs` are the programs, each with its package.
    pub(crate) fn new(what: &str, needs: &[(&str, &str)]) -> Option<Self> {
        let missing = |(program, _): &&(&str, &str)| {
            let folders = ["usr/sbin", "usr/bin", "usr/lib/systemd"];
            let places = folders.iter().flat_map(|folder| [unpacked().join(folder), Path::new("/").join(folder)]);
            !places.into_iter().any(|place| place.join(program).exists())
        };
        if let Some((program, package)) = needs.iter().find(missing) {
            println!("NOT TESTED: {what}: there is no program {program} of package {package}");
            return None;
        }
        let dir = TempDir::new().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        let mut init = Command::new("unshare")
            .args(["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--propagation", "private"])
            .args(["sh", "-c", INIT])
            .env("PATH", PATH)
            .envs([("ROOT", root.as_path()), ("UNPACKED", &unpacked())])
            .env("PROGRAM", env!("CARGO_BIN_EXE_bridge-scripts"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(init.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let Some(pid) = line.trim().strip_prefix("ready ") else {
            let _ = init.kill();
            let _ = init.wait();
            println!("NOT TESTED: {what}: no overlay file systems, or no namespaces, in this environment");
            return None;
        };
        let mut outside = Command::new("unshare")
            .args(["-n", "sh", "-c", "echo; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        outside.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let theirs = outside.id().to_string();
        for words in [
            "link set lo up",
            "link add o-eth0 type veth peer name eth0 netns MACHINE",
            "link set o-eth0 up",
            "addr add 10.1.0.1/24 dev o-eth0",
            "addr add fd00:5::1/64 dev o-eth0 nodad",
        ] {
            let words = words.replace("MACHINE", pid);
            ok(Command::new("nsenter").args(["-t", &theirs, "-n", "ip"]).args(words.split(' ')));
        }
        let path = |name: &str| dir.path().join(name).display().to_string();
        let server = Program::start(
            Command::new("nsenter")
                .args(["-t", &theirs, "-n", "dnsmasq", "-k", "--conf-file=/dev/null", "--port=0", "--user=root"])
                .args(["--pid-file=", "--no-ping", "--log-dhcp", "--interface=o-eth0", "--dhcp-authoritative"])
                .args(["--enable-ra", "--ra-param=o-eth0,10,1800", "--dhcp-range=fd00:5::,ra-only,64,30m"])
                .arg(format!("--dhcp-range=10.1.0.50,10.1.0.99,{LEASE}"))
                .args([format!("--dhcp-leasefile={}", path("leases")), format!("--log-facility={}", path("dnsmasq"))]),
        );
        Some(Self { init, pid: pid.to_owned(), outside, dir, _server: server })
    }

    /// A script in the machine, to its end. Nothing must ever be written anywhere else.
    pub(crate) fn tries(&self, script: &str) -> Output {
        let script = &format!("[ -e /run/is-a-machine ] || exit 99\n{script}");
        Command::new("nsenter")
            .args(["-t", &self.pid, "-n", "-m", "-p", "-u", "-i", "-r", "-w", "sh", "-c", script])
            .env_clear()
            .envs([("PATH", PATH), ("LC_ALL", "C")])
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// A script in the machine that has to succeed; what it printed.
    pub(crate) fn sh(&self, script: &str) -> String {
        let output = self.tries(script);
        assert!(output.status.success(), "{script}: {}{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }

    /// A daemon in the machine; what it says goes to /run/NAME.log.
    pub(crate) fn daemon(&self, name: &str, command: &str) {
        self.sh(&format!("{command} > /run/{name}.log 2>&1 < /dev/null &"));
    }

    /// A file's text, or nothing.
    pub(crate) fn read(&self, path: &str) -> String {
        text(&self.tries(&format!("cat {path}")).stdout)
    }

    /// Writes a file in the machine, with the folders above it.
    pub(crate) fn write(&self, path: &str, content: &str) {
        // Not through /proc/PID/root, whose links would be followed here.
        assert!(!content.contains("\nEND\n"));
        let (folder, _) = path.rsplit_once('/').unwrap();
        self.sh(&format!("mkdir -p {folder}; cat > {path} <<'END'\n{content}END"));
    }

    /// How often the server has given the address, or given it again.
    pub(crate) fn acknowledged(&self) -> usize {
        fs::read_to_string(self.dir.path().join("dnsmasq")).unwrap_or_default().matches("DHCPACK(").count()
    }

    /// Whether the outside reaches an address of the machine.
    pub(crate) fn is_reached(&self, address: &str) -> bool {
        let theirs = self.outside.id().to_string();
        let ping = ["-t", &theirs, "-n", "ping", "-q", "-c", "1", "-W", "2", address];
        Command::new("nsenter").args(ping).stdout(Stdio::null()).status().unwrap().success()
    }
}

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin";

impl Drop for Machine {
    fn drop(&mut self) {
        // All its processes end with it, and its mounts with them.
        for child in [&mut self.init, &mut self.outside] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
