//! Reading the network's state, and no more of it than was asked for.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::addresses::{self, NDA_IFINDEX, NTF_PROXY};
use super::links::{self, IFLA_EXT_MASK, Told};
use super::routes::{self, RTA_OIF};
use super::wire::{Message, link_header, neighbour_header};
use super::{Error, Link};
use crate::state::{Kind, State, What};

const AF_BRIDGE: u8 = 7;
/// RTEXT_FILTER_BRVLAN and RTEXT_FILTER_SKIP_STATS of linux/rtnetlink.h.
const BRIDGE_VLANS: u32 = 1 << 1;
const SKIP_STATS: u32 = 1 << 3;

impl Link {
    /// Reads what was asked for, except for tables and records, which are not the kernel's rtnetlink's: see
    /// [`crate::apply::Session::read`]. A link that was named and does not exist is left out.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be asked.
    pub fn read(&mut self, what: &What) -> Result<State, Error> {
        // Of one link nobody asks that, and some machines have many mounts.
        let whole = what.links.is_none();
        let mut state = State { root_on_network: whole && root_on_network(), ..State::default() };
        let wanted = match &what.links {
            None => {
                self.all_links(&mut state)?;
                vec![None]
            }
            Some(names) => {
                let mut indices = Vec::new();
                for name in names {
                    if let Some(index) = self.one_link(name, &mut state)? {
                        indices.push(Some(index));
                    }
                }
                indices
            }
        };
        for dev in wanted {
            self.details(dev, what, &mut state)?;
        }
        for path in &what.sysctls {
            if let Some(value) = read_sysctl(path)? {
                state.sysctls.insert(path.clone(), value);
            }
        }
        Ok(state)
    }

    fn all_links(&mut self, state: &mut State) -> Result<(), Error> {
        let request = || {
            let mut message = Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &link_header(0, 0, 0, 0));
            message.u32(IFLA_EXT_MASK, SKIP_STATS);
            message
        };
        let mut all: Vec<Told> = Vec::new();
        self.dump(request, |body| all.extend(links::parse(body)))?;
        self.names = all.iter().map(|told| (told.index, told.name.clone())).collect();
        all.into_iter().try_for_each(|told| self.enter(told, state))
    }

    fn one_link(&mut self, name: &str, state: &mut State) -> Result<Option<u32>, Error> {
        let Some(index) = self.find(name)? else { return Ok(None) };
        let mut message = Message::new(libc::RTM_GETLINK, 0, &link_header(0, index, 0, 0));
        message.u32(IFLA_EXT_MASK, SKIP_STATS);
        let Some(told) = self.get(message)?.as_deref().and_then(links::parse) else { return Ok(None) };
        self.names.insert(index, told.name.clone());
        self.enter(told, state)?;
        Ok(Some(index))
    }

    fn enter(&mut self, told: Told, state: &mut State) -> Result<(), Error> {
        let mut link = told.state;
        if let Some(master) = told.master {
            link.master = self.name(master)?;
        }
        if let Some(backup) = told.backup {
            link.backup = self.name(backup)?;
        }
        if let Some(below) = told.below {
            match &mut link.kind {
                Kind::Vlan { link, .. } => *link = self.name(below)?.unwrap_or_default(),
                Kind::Veth { peer } => *peer = self.name(below)?,
                _ => (),
            }
        }
        link.wireless = wireless(&told.name);
        state.links.insert(told.name, link);
        Ok(())
    }

    /// Addresses, routes and so on of one link, or of all.
    fn details(&mut self, dev: Option<u32>, what: &What, state: &mut State) -> Result<(), Error> {
        let index = dev.unwrap_or(0);
        // Before the addresses: the kernel adds an address first and then the route to its network. Read the other way
        // round, a link-local address that comes in between would leave its route behind as if somebody had made it.
        if what.routes {
            self.routes(dev, state)?;
        }
        if what.addresses {
            let mut fixed = [0; 8];
            fixed[4..].copy_from_slice(&index.to_ne_bytes());
            let mut told = Vec::new();
            let request = || Message::new(libc::RTM_GETADDR, libc::NLM_F_DUMP, &fixed);
            self.dump(request, |body| told.extend(addresses::parse_address(body)))?;
            for (index, mut address) in told {
                let Some(name) = self.of(index, dev)? else { continue };
                address.label = address.label.filter(|label| *label != name);
                address.dev = name;
                state.addresses.push(address);
            }
        }
        if what.neighbours {
            for flags in [0, NTF_PROXY] {
                let request = || {
                    let fixed = neighbour_header(0, 0, 0, flags);
                    let mut message = Message::new(libc::RTM_GETNEIGH, libc::NLM_F_DUMP, &fixed);
                    dev.map(|index| message.u32(NDA_IFINDEX, index).position());
                    message
                };
                let mut told = Vec::new();
                self.dump(request, |body| told.extend(addresses::parse_neighbour(body)))?;
                for (index, neighbour) in told {
                    if let Some(name) = self.of(index, dev)?.filter(|_| neighbour.proxy == (flags != 0)) {
                        state.neighbours.push(crate::state::Neighbour { dev: name, ..neighbour });
                    }
                }
            }
        }
        if what.fdb {
            let request = || {
                let mut message =
                    Message::new(libc::RTM_GETNEIGH, libc::NLM_F_DUMP, &neighbour_header(AF_BRIDGE, 0, 0, 0));
                dev.map(|index| message.u32(NDA_IFINDEX, index).position());
                message
            };
            let mut told = Vec::new();
            self.dump(request, |body| told.extend(addresses::parse_fdb(body)))?;
            for (index, entry) in told {
                if let Some(name) = self.of(index, dev)? {
                    state.fdb.push(crate::state::Fdb { dev: name, ..entry });
                }
            }
        }
        if what.vlans {
            let request = || {
                let mut message = Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &link_header(AF_BRIDGE, 0, 0, 0));
                message.u32(IFLA_EXT_MASK, BRIDGE_VLANS);
                message
            };
            let mut told = Vec::new();
            self.dump(request, |body| told.push(addresses::parse_bridge_vlans(body)))?;
            for (index, vlans) in told {
                let Some(name) = self.of(index, dev)? else { continue };
                let named = vlans.into_iter().map(|vlan| crate::state::BridgeVlan { dev: name.clone(), ..vlan });
                state.vlans.extend(named);
            }
        }
        Ok(())
    }

    fn routes(&mut self, dev: Option<u32>, state: &mut State) -> Result<(), Error> {
        for family in [2, 10] {
            let request = || {
                let mut fixed = [0; 12];
                fixed[0] = family;
                let mut message = Message::new(libc::RTM_GETROUTE, libc::NLM_F_DUMP, &fixed);
                dev.map(|index| message.u32(RTA_OIF, index).position());
                message
            };
            let mut told = Vec::new();
            match self.dump(request, |body| told.extend(routes::parse(body))) {
                // A kernel without IPv6.
                Err(error) if family == 10 && error.errno() == Some(libc::EOPNOTSUPP) => continue,
                other => other?,
            }
            'route: for mut told in told {
                if dev.is_some() && told.dev != dev && !told.ways.iter().any(|way| Some(*way) == dev) {
                    continue;
                }
                if let Some(index) = told.dev {
                    let Some(name) = self.name(index)? else { continue };
                    told.route.dev = Some(name);
                }
                for (way, index) in told.route.ways.iter_mut().zip(&told.ways) {
                    let Some(name) = self.name(*index)? else { continue 'route };
                    way.dev = name;
                }
                if !state.routes.contains(&told.route) {
                    state.routes.push(told.route);
                }
            }
        }
        Ok(())
    }

    /// The name of the link with this index, unless only another's were asked for. The kernel filters by itself where it
    /// can; older ones do not for everything.
    fn of(&mut self, index: u32, wanted: Option<u32>) -> Result<Option<String>, Error> {
        if wanted.is_some_and(|wanted| wanted != index) { Ok(None) } else { self.name(index) }
    }
}

/// A sysctl's value without the line's end; `None` if the kernel has no such sysctl.
///
/// # Errors
///
/// When it exists and cannot be read.
pub(crate) fn read_sysctl(path: &str) -> Result<Option<String>, Error> {
    match fs::read_to_string(Path::new("/proc/sys").join(path)) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Sysctl { path: path.to_owned(), source }),
    }
}

/// Wireless cards say so in sysfs. (A sysfs of another network namespace does not show ours; then none is wireless.)
fn wireless(name: &str) -> bool {
    let dir = Path::new("/sys/class/net").join(name);
    dir.join("phy80211").exists() || dir.join("wireless").exists()
}

/// Whether / comes over the network (proc_mounts(5)): then a mistake with the card takes the whole machine along.
fn root_on_network() -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    root_kind(&mounts).is_some_and(|kind| matches!(kind, "nfs" | "nfs4" | "cifs" | "9p" | "ceph"))
}

/// The type of the file system that is mounted last on /.
fn root_kind(mounts: &str) -> Option<&str> {
    let mut found = None;
    for line in mounts.lines() {
        let mut words = line.split(' ').skip(1);
        if let (Some("/"), Some(kind)) = (words.next(), words.next()) {
            found = Some(kind);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::root_kind;

    #[test]
    fn the_last_mount_on_the_root_counts() {
        let mounts = "rootfs / rootfs rw 0 0\n10.0.0.1:/srv/dom0 / nfs4 rw,vers=4.2 0 0\nproc /proc proc rw 0 0\n";
        assert_eq!(root_kind(mounts), Some("nfs4"));
        assert_eq!(root_kind("/dev/sda1 / ext4 rw 0 0\nfs:/home /home nfs rw 0 0\n"), Some("ext4"));
        assert_eq!(root_kind(""), None);
    }
}
