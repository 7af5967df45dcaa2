//! How the parts of a network read in a plan: much as iproute2 writes them.

use std::fmt;

use super::{Address, BridgeVlan, FOREVER, Fdb, Neighbour, PortFlags, Route};

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.peer {
            Some(peer) => write!(f, "address {} peer {peer}/{}", self.local, self.prefix)?,
            None => write!(f, "address {}/{}", self.local, self.prefix)?,
        }
        if let Some(broadcast) = self.broadcast {
            write!(f, " broadcast {broadcast}")?;
        }
        if let Some(label) = &self.label {
            write!(f, " label {label}")?;
        }
        if self.valid != FOREVER {
            write!(f, " for {} s", self.valid)?;
        }
        write!(f, " on {}", self.dev)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            1 => "",
            2 => "local ",
            3 => "broadcast ",
            6 => "blackhole ",
            7 => "unreachable ",
            8 => "prohibit ",
            _ => "special ",
        };
        match self.to {
            Some((to, prefix)) => write!(f, "{kind}route {to}/{prefix}")?,
            None => write!(f, "{kind}default route{}", if self.v6 { " (IPv6)" } else { "" })?,
        }
        if let Some((from, prefix)) = self.from {
            write!(f, " from {from}/{prefix}")?;
        }
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        if let Some(dev) = &self.dev {
            write!(f, " dev {dev}")?;
        }
        for way in &self.ways {
            match way.gateway {
                Some(gateway) => write!(f, " [via {gateway} dev {} weight {}]", way.dev, u16::from(way.hops) + 1)?,
                None => write!(f, " [dev {} weight {}]", way.dev, u16::from(way.hops) + 1)?,
            }
        }
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        if let Some(metric) = self.metric {
            write!(f, " metric {metric}")?;
        }
        if self.table != 254 {
            write!(f, " table {}", self.table)?;
        }
        Ok(())
    }
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mac {
            _ if self.proxy => write!(f, "proxy neighbour {} on {}", self.address, self.dev),
            Some(mac) => write!(f, "permanent neighbour {} at {mac} on {}", self.address, self.dev),
            None => write!(f, "permanent neighbour {} on {}", self.address, self.dev),
        }
    }
}

impl fmt::Display for Fdb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "static forwarding entry {} at port {}", self.mac, self.dev)?;
        self.vlan.map_or(Ok(()), |vlan| write!(f, " in VLAN {vlan}"))?;
        if self.sticky { write!(f, ", sticky") } else { Ok(()) }
    }
}

impl fmt::Display for BridgeVlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VLAN {} through at port {}", self.id, self.dev)?;
        if self.pvid {
            write!(f, ", for untagged frames")?;
        }
        if self.untagged { write!(f, ", leaving untagged") } else { Ok(()) }
    }
}

impl fmt::Display for PortFlags {
    /// Those flags that differ from a new port's, in bridge(8)'s words.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let usual = Self::default();
        let flags = [
            ("isolated", self.isolated, usual.isolated),
            ("guard", self.guard, usual.guard),
            ("root_block", self.root_block, usual.root_block),
            ("learning", self.learning, usual.learning),
            ("flood", self.flood, usual.flood),
            ("mcast_flood", self.multicast_flood, usual.multicast_flood),
            ("bcast_flood", self.broadcast_flood, usual.broadcast_flood),
            ("locked", self.locked, usual.locked),
            ("hairpin", self.hairpin, usual.hairpin),
        ];
        let said: Vec<String> = flags
            .iter()
            .filter(|(_, is, usually)| is != usually)
            .map(|(name, is, _)| format!("{name} {}", if *is { "on" } else { "off" }))
            .collect();
        if said.is_empty() { f.write_str("the kernel's own flags") } else { f.write_str(&said.join(" ")) }
    }
}
