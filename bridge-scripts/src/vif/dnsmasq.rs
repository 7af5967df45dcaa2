//! What vif-nat tells dnsmasq(8): a line for each guest, `MAC,ADDRESS,NAME`, in the file dnsmasq-hosts of the run directory.
//!
//! `network-nat start dhcp=yes` writes the configuration that reads it (`dhcp-hostsfile=`). dnsmasq is never started here.
//! One that runs with this configuration is told to read the file again; for another one the administrator has to.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::plan::Draft;
use super::settings::Settings;
use crate::network::nat::PID;
pub(super) use crate::network::nat::{DNSMASQ as CONF, HOSTS};
use crate::step::Step;

/// Puts the guest's line into the file, and says if dnsmasq would not look at it.
pub(super) fn enter(draft: &mut Draft<'_>, address: Ipv4Addr) {
    let had = draft.before.records.get(HOSTS).map_or("", String::as_str);
    let now = with_host(had, draft.settings, Some(address));
    if now != had {
        draft.push(Step::Record { name: HOSTS.to_owned(), content: Some(now) });
    }
    if let Some(conf) = draft.before.records.get(CONF)
        && !in_a_range(conf, address)
    {
        draft.notes.push(format!(
            "dnsmasq gives no addresses of {address}'s network, which network-nat was not told of: start it with \
             network=..., a comma between networks"
        ));
    }
}

/// Takes the guest's line out of it.
pub(super) fn forget(draft: &mut Draft<'_>) {
    if let Some(had) = draft.before.records.get(HOSTS) {
        let now = with_host(had, draft.settings, None);
        if now != *had {
            draft.push(Step::Record { name: HOSTS.to_owned(), content: Some(now) });
        }
    }
}

/// The lines with this guest's, or without.
fn with_host(lines: &str, settings: &Settings, address: Option<Ipv4Addr>) -> String {
    let own = format!("{},", settings.mac);
    let mut now: Vec<String> = lines.lines().filter(|line| !line.starts_with(&own)).map(str::to_owned).collect();
    if let Some(address) = address {
        let mut name = format!("dom{}", settings.domid);
        if settings.handle > 0 {
            name = format!("{name}-{}", settings.handle + 1);
        }
        now.push(format!("{own}{address},{name}"));
    }
    now.sort();
    now.into_iter().map(|line| line + "\n").collect()
}

/// Whether a line `dhcp-range=NETWORK,static,MASK,TIME` of the configuration has the address.
fn in_a_range(conf: &str, address: Ipv4Addr) -> bool {
    conf.lines().filter_map(|line| line.strip_prefix("dhcp-range=")).any(|range| {
        let mut parts = range.split(',');
        let network = parts.next().and_then(|text| text.parse::<Ipv4Addr>().ok());
        let mask = parts.nth(1).and_then(|text| text.parse::<Ipv4Addr>().ok());
        matches!((network, mask), (Some(network), Some(mask)) if address & mask == network & mask)
    })
}

/// Lets dnsmasq read its file again, if network-nat handed DHCP over to it. Told even if nothing changed: the run before
/// may have been killed just before this. Returns what the administrator has to do instead.
pub(super) fn reread(run: &Path) -> Option<String> {
    let conf = run.join(CONF);
    if !conf.exists() {
        return None;
    }
    let hint = || {
        Some(format!(
            "no dnsmasq runs with {0}: start it (dnsmasq --conf-file={0}), or let yours read {1} again (SIGHUP)",
            conf.display(),
            run.join(HOSTS).display()
        ))
    };
    let number = fs::read_to_string(run.join(PID)).ok().and_then(|text| text.trim().parse().ok());
    let Some(pid) = number.and_then(Pid::from_raw) else { return hint() };
    // Held before it is looked at, so that it is the one that is told.
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return hint() };
    let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    let with_conf = String::from_utf8_lossy(&line).contains(&*conf.to_string_lossy());
    if with_conf && pidfd_send_signal(&process, Signal::HUP).is_ok() { None } else { hint() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Mac;
    use crate::vif::Script;

    #[test]
    fn lines_for_dnsmasq() {
        let mut one = Settings::new(Script::Nat, "vif1.0", Mac([0, 0x16, 0x3e, 0, 0, 1]));
        one.domid = 1;
        let two = Settings { mac: Mac([0, 0x16, 0x3e, 0, 0, 2]), handle: 1, ..one.clone() };
        let first = with_host("", &one, Some(Ipv4Addr::new(10, 0, 1, 1)));
        assert_eq!(first, "00:16:3e:00:00:01,10.0.1.1,dom1\n");
        let both = with_host(&first, &two, Some(Ipv4Addr::new(10, 0, 1, 2)));
        assert_eq!(both, format!("{first}00:16:3e:00:00:02,10.0.1.2,dom1-2\n"));
        assert_eq!(with_host(&both, &one, Some(Ipv4Addr::new(10, 0, 1, 1))), both);
        assert_eq!(with_host(&both, &two, None), first);
    }

    #[test]
    fn ranges() {
        let conf = "interface=vif*\ndhcp-range=10.0.0.0,static,255.128.0.0,1h\ndhcp-range=192.168.9.0,static,255.255.255.0,1h\n";
        let has = |text: &str| in_a_range(conf, text.parse().unwrap());
        assert!(has("10.0.62.1") && has("10.127.239.201") && has("192.168.9.7"));
        assert!(!has("10.128.0.1") && !has("192.168.8.7"));
        assert!(!in_a_range("dhcp-range=10.0.0.0\n", Ipv4Addr::new(10, 0, 0, 1)));
    }

    #[test]
    fn no_configuration_no_word() {
        let run = tempfile::tempdir().unwrap();
        assert_eq!(reread(run.path()), None);
        fs::write(run.path().join(CONF), "").unwrap();
        assert!(reread(run.path()).unwrap().contains("no dnsmasq runs with"));
        // Some other process has the number now.
        fs::write(run.path().join(PID), format!("{}\n", std::process::id())).unwrap();
        assert!(reread(run.path()).unwrap().contains("no dnsmasq runs with"));
    }
}
