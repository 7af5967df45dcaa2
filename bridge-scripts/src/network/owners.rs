//! Who else looks after this machine's links, as files and processes tell: DHCP clients, NetworkManager, systemd-networkd,
//! ifupdown. Only what belongs to our own network namespace counts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What was found. Texts are as they were read; `lease` understands them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Owners {
    /// NetworkManager's note of each link, by the link's name (nm-config.c, `nm_config_device_state_write`).
    pub network_manager: BTreeMap<String, String>,
    /// systemd-networkd's, likewise (networkd-state-file.c).
    pub networkd: BTreeMap<String, String>,
    /// ifupdown's files and what is in them: /etc/network/interfaces, then those below /etc/network/interfaces.d.
    pub interfaces: Vec<(String, String)>,
    /// Processes that may be DHCP clients.
    pub clients: Vec<Client>,
}

/// A process that may be a DHCP client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Client {
    /// Its number.
    pub pid: u32,
    /// Its command line.
    pub words: Vec<String>,
}

impl Owners {
    /// Looks for owners of these links (names and numbers). What cannot be read is not there: most machines have one of
    /// these programs.
    pub fn find<'a>(links: impl IntoIterator<Item = &'a str>) -> Self {
        let mut owners = Self { clients: clients(Path::new("/proc")), ..Self::default() };
        // Managers speak of the machine's namespace, and number the links as they are there.
        if namespace("/proc/self/ns/net") != namespace("/proc/1/ns/net") {
            return owners;
        }
        owners.interfaces = interfaces(Path::new("/etc/network"));
        for name in links {
            let Ok(index) = fs::read_to_string(format!("/sys/class/net/{name}/ifindex")) else { continue };
            let read = |dir: &str| fs::read_to_string(format!("{dir}/{}", index.trim())).ok();
            if let Some(text) = read("/run/NetworkManager/devices") {
                owners.network_manager.insert(name.to_owned(), text);
            }
            if let Some(text) = read("/run/systemd/netif/links") {
                owners.networkd.insert(name.to_owned(), text);
            }
        }
        owners
    }
}

fn namespace(path: impl AsRef<Path>) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// Names that DHCP clients run under.
const CLIENTS: [&str; 7] = ["dhclient", "dhcpcd", "udhcpc", "dhcp6c", "connmand", "wickedd-dhcp4", "pump"];

fn clients(proc: &Path) -> Vec<Client> {
    let own = namespace(proc.join("self/ns/net"));
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    let mut found: Vec<Client> = entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let words = words(&line);
            // One that has just ended has no namespace any more.
            (is_client(&words) && namespace(entry.path().join("ns/net")) == own).then_some(Client { pid, words })
        })
        .collect();
    found.sort_by_key(|client| client.pid);
    found
}

/// A command line's words; a program that shows a text of its own there (dhcpcd: `dhcpcd: eth0 [ip4]`) has blanks between
/// them.
fn words(line: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(line);
    let words: Vec<&str> = text.split('\0').filter(|word| !word.is_empty()).collect();
    match words.as_slice() {
        [only] => only.split_whitespace().map(|word| word.trim_end_matches(':').to_owned()).collect(),
        several => several.iter().map(|word| (*word).to_owned()).collect(),
    }
}

fn is_client(words: &[String]) -> bool {
    // dhcpcd's helpers: `dhcpcd: [privileged proxy]`, `dhcpcd: [BPF ARP] eth0 192.0.2.7`.
    if words.iter().any(|word| word == "proxy]" || word == "[BPF") {
        return false;
    }
    let base = |word: Option<&String>| word.and_then(|word| word.rsplit('/').next()).map(str::to_owned);
    let first = base(words.first());
    // busybox names its part second.
    let name = if first.as_deref() == Some("busybox") { base(words.get(1)) } else { first };
    name.is_some_and(|name| CLIENTS.contains(&name.as_str()))
}

/// ifupdown's configuration (interfaces(5)). Debian's sources all of interfaces.d; a file that is not sourced says nothing
/// that would be wrong.
fn interfaces(dir: &Path) -> Vec<(String, String)> {
    let mut files: BTreeSet<_> = BTreeSet::new();
    if let Ok(entries) = fs::read_dir(dir.join("interfaces.d")) {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    let all = std::iter::once(dir.join("interfaces")).chain(files);
    all.filter_map(|file| Some((file.display().to_string(), fs::read_to_string(&file).ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_known_by_their_names() {
        for (line, client) in [
            (&b"/sbin/dhclient\0-4\0eth0\0"[..], true),
            (b"udhcpc\0-i\0eth0\0", true),
            (b"/bin/busybox\0udhcpc\0", true),
            (b"busybox\0sh\0", false),
            (b"dhcpcd: eth0 [ip4]\0\0\0", true),
            (b"vim\0dhclient\0", false),
            (b"dhcpcd: eth0 [ip4] [ip6]\0", true),
            (b"dhcpcd: [manager] [ip4] [ip6]\0", true),
            (b"dhcpcd: [privileged proxy] eth0 [ip4] [ip6]\0", false),
            (b"dhcpcd: [network proxy] 10.1.0.52\0", false),
            (b"dhcpcd: [BPF ARP] eth0 10.1.0.52\0", false),
            (b"", false),
        ] {
            assert_eq!(is_client(&words(line)), client, "{}", String::from_utf8_lossy(line));
        }
        assert_eq!(words(b"dhcpcd: eth0 [ip4]\0"), ["dhcpcd", "eth0", "[ip4]"]);
    }
}
