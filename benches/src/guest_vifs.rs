//! The network cards of `dom0-bench guest`: each on a thread of its own, for as long as the guest lives.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hypervisor::Guest;
use netback::front::Options;
use xenstore_client::Client;
use xenstore_client::xenbus::State;

use crate::Failure;
use crate::guest::wait_for;
use crate::net::card::Card;
use crate::net::netns::{self, Namespace, Place};

/// A card of the guest's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vif {
    /// Which of the guest's vifs.
    pub devid: u32,
    /// The interface it becomes.
    pub name: String,
}

impl FromStr for Vif {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, name) = text.split_once('=').map_or((text, None), |(number, name)| (number, Some(name)));
        let devid = number.parse().map_err(|_| format!("{text:?} is no vif: write its number, as in 0 or 0=eth0"))?;
        let name = name.map_or_else(|| format!("eth{devid}"), str::to_owned);
        if name.is_empty() || name.len() > 15 || name.contains(['/', ' ', ':', '%']) {
            return Err(format!("{name:?} is no name for an interface"));
        }
        Ok(Self { devid, name })
    }
}

/// The guest's network, and what its driver knows.
#[derive(Debug, Clone, clap::Args)]
pub struct VifArguments {
    /// A vif to be connected to an interface: its number, and the interface's name if it is not eth and the number; it is
    /// waited for (several times for several)
    #[arg(long, value_name = "N[=NAME]")]
    pub vif: Vec<Vif>,
    /// Where the interfaces are to be: a name of ip netns (made if it is not there), or pid:N for the network namespace of
    /// a process (default: a new one)
    #[arg(long, value_name = "NAME|pid:N", requires = "vif")]
    pub netns: Option<Place>,
    /// Queues of each vif to ask for
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub vif_queues: u32,
    /// Take no packets in several pieces: for an MTU of 1500 at most
    #[arg(long)]
    pub no_sg: bool,
    /// Take and send no TCP segments that are still to be cut
    #[arg(long)]
    pub no_gso: bool,
    /// Take and send no checksums that are still to be finished
    #[arg(long)]
    pub no_csum: bool,
    /// One event channel for both directions
    #[arg(long)]
    pub no_split: bool,
    /// Have multicast filtered by the backend
    #[arg(long)]
    pub multicast_control: bool,
}

impl VifArguments {
    /// What the driver says.
    pub fn options(&self) -> Options {
        Options {
            queues: self.vif_queues,
            split_channels: !self.no_split,
            sg: !self.no_sg,
            // What is cut by others has its checksums finished by them.
            gso_v4: !self.no_gso && !self.no_sg && !self.no_csum,
            gso_v6: !self.no_gso && !self.no_sg && !self.no_csum,
            csum_v4: !self.no_csum,
            csum_v6: !self.no_csum,
            multicast: self.multicast_control,
            ..Options::default()
        }
    }

    /// Finds or makes the namespace, and says how to get there. To be called before the first thread starts.
    ///
    /// # Errors
    /// When there is none to be had.
    pub fn namespace(&self) -> Result<Namespace, Failure> {
        match &self.netns {
            Some(place) => place.find(),
            None => {
                let root = nix::unistd::geteuid().is_root();
                netns::leave_the_host()?;
                let user = if root { "" } else { " -U --preserve-credentials" };
                println!("its network: nsenter -t {} -n{user} ip address", std::process::id());
                Namespace::current()
            }
        }
    }
}

/// Serves one card, life after life, until the program is to end. With `once` only one.
///
/// # Errors
/// When the machine is gone.
pub fn run(
    vif: &Vif,
    arguments: &VifArguments,
    guest: &Arc<dyn Guest>,
    namespace: &Namespace,
    once: bool,
    stop: &AtomicBool,
) -> Result<(), Failure> {
    let store = guest.store()?;
    let state = format!("{}/device/vif/{}/state", guest.domid().home(), vif.devid);
    while wait_for(&store, &state, &[State::Initialising], stop)? {
        // One vif that fails is not the end of the guest; the backend's directory says more.
        if let Err(error) = live(vif, arguments, guest, namespace, &store, stop) {
            println!("{} failed: {error}", vif.name);
            // It stays as it is until the toolstack takes it away.
            wait_for(&store, &state, &[State::Closing, State::Closed], stop)?;
        }
        if once {
            break;
        }
    }
    Ok(())
}

fn live(
    vif: &Vif,
    arguments: &VifArguments,
    guest: &Arc<dyn Guest>,
    namespace: &Namespace,
    store: &Client,
    stop: &AtomicBool,
) -> Result<(), Failure> {
    let card = Card::plug(Arc::clone(guest), vif.devid, &arguments.options(), namespace, &vif.name)?;
    println!("{} is connected: {}", vif.name, card.describe());
    let state = format!("{}/state", card.backend_path());
    // A directory that is gone, because it was taken away by force, counts as closed.
    wait_for(store, &state, &[State::Closing, State::Closed], stop)?;
    card.unplug()?;
    println!("{} is gone", vif.name);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vifs() {
        for (text, devid, name) in [("0", 0, "eth0"), ("3", 3, "eth3"), ("1=lan", 1, "lan")] {
            assert_eq!(text.parse(), Ok(Vif { devid, name: name.into() }), "{text}");
        }
        for text in ["", "eth0", "0=", "0=a/b", "0=a-name-that-is-too-long", "-1"] {
            assert!(text.parse::<Vif>().is_err(), "{text}");
        }
    }
}
