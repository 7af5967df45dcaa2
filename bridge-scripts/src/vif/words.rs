//! What keys of an interface say: Ethernet addresses, lists of IP addresses, yes and no. Mistakes are shown in their place.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use xenstore_client::spec::{Fault, Param, SpecError, Word};

use crate::state::Mac;

/// An address of a guest, or a network of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The address as it was written, host bits and all.
    pub address: IpAddr,
    /// Bits of its prefix; all of them where none were written.
    pub prefix: u8,
}

impl Network {
    fn bits(self) -> u8 {
        if self.address.is_ipv4() { 32 } else { 128 }
    }

    /// Bits behind the prefix, as a mask.
    fn host(self) -> u128 {
        1u128.checked_shl((self.bits() - self.prefix).into()).unwrap_or(0).wrapping_sub(1)
    }

    fn number(self) -> u128 {
        match self.address {
            IpAddr::V4(address) => address.to_bits().into(),
            IpAddr::V6(address) => address.to_bits(),
        }
    }

    fn numbered(self, number: u128) -> IpAddr {
        match self.address {
            // What is above 32 bits was never there.
            #[allow(clippy::cast_possible_truncation, reason = "numbers of this kind have 32 bits")]
            IpAddr::V4(_) => std::net::Ipv4Addr::from_bits(number as u32).into(),
            IpAddr::V6(_) => std::net::Ipv6Addr::from_bits(number).into(),
        }
    }

    /// Whether it is one address and not a network: `10.0.0.5`, `10.0.0.5/32`.
    pub fn is_single(self) -> bool {
        self.prefix == self.bits()
    }

    /// Whether it is one address with its network's prefix: `10.0.0.5/24`.
    pub fn is_in_a_network(self) -> bool {
        !self.is_single() && self.number() & self.host() != 0
    }

    /// The network, without host bits.
    pub fn network(self) -> (IpAddr, u8) {
        (self.numbered(self.number() & !self.host()), self.prefix)
    }

    /// What the guest may send from: an address that is written with its network's prefix is that address alone.
    pub fn source(self) -> (IpAddr, u8) {
        if self.is_in_a_network() { (self.address, self.bits()) } else { self.network() }
    }

    /// dom0's end of a guest's own network: its highest address in IPv4, as it has always been written
    /// (192.168.17.254/24 for a guest 192.168.17.1), and `::1` in IPv6; the other end if the guest has that itself.
    pub fn other_end(self) -> Option<IpAddr> {
        let host = self.host();
        let (low, high) = (1, host - u128::from(self.bits() == 32 && self.prefix < 31));
        if self.is_single() || host == 1 && self.bits() == 32 {
            // A network of two (RFC 3021) has just the other one.
            return (host == 1).then(|| self.numbered(self.number() ^ 1));
        }
        let (first, second) = if self.bits() == 32 { (high, low) } else { (low, low + 1) };
        let own = self.number() & host;
        let chosen = if own == first { second } else { first };
        Some(self.numbered(self.number() & !host | chosen))
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_single() { self.address.fmt(f) } else { write!(f, "{}/{}", self.address, self.prefix) }
    }
}

fn parse<T>(text: &str, read: impl FnOnce(Param<'_>) -> Result<T, Fault>) -> Result<T, SpecError> {
    let word = Word::at(text, 0);
    read(Param::new(&word, 0..text.len())).map_err(|fault| SpecError::new(text, fault))
}

/// A guest's Ethernet address.
///
/// # Errors
/// With the place: not six pairs of digits, zero, or the address of a group.
pub fn mac(text: &str) -> Result<Mac, SpecError> {
    const FORM: &str = "write six pairs of hexadecimal digits, such as 00:16:3e:5f:77:fd";
    parse(text, |all| {
        let mut bytes = [0; 6];
        let mut at = 0;
        for (index, byte) in bytes.iter_mut().enumerate() {
            if index > 0 {
                if !all.text[at..].starts_with(':') {
                    return Err(unexpected(all, at, FORM));
                }
                at += 1;
            }
            let digits = all.text[at..].bytes().take(2).take_while(u8::is_ascii_hexdigit).count();
            if digits < 2 {
                return Err(unexpected(all, at + digits, FORM));
            }
            *byte = u8::from_str_radix(&all.text[at..at + 2], 16).map_err(|_| all.fault("no address", FORM))?;
            at += 2;
        }
        if at < all.text.len() {
            return Err(all.part(at..all.text.len()).fault("something follows the address", FORM));
        }
        let mac = Mac(bytes);
        if mac.is_group() {
            let help = "the first pair of an interface's address is even, as in 00:16:3e";
            return Err(all.part(0..2).fault("this is the address of a group", help));
        }
        if bytes == [0; 6] {
            return Err(all.fault("an interface has not the address zero", "write another one, or leave mac= out"));
        }
        Ok(mac)
    })
}

/// A list of addresses between blanks or commas, each with a prefix or without.
///
/// # Errors
/// With the place: no address, no prefix, or an address that no guest can send from.
pub fn addresses(text: &str) -> Result<Vec<Network>, SpecError> {
    parse(text, |all| {
        let mut list = Vec::new();
        let mut at = 0;
        for piece in all.text.split([' ', ',', '\t', '\n']) {
            if !piece.is_empty() {
                list.push(address(all.part(at..at + piece.len()))?);
            }
            at += piece.len() + 1;
        }
        Ok(list)
    })
}

fn address(item: Param<'_>) -> Result<Network, Fault> {
    const FORM: &str = "write addresses with blanks between: 192.168.17.1, 10.1.0.0/16, 2001:db8::5";
    let slash = item.text.find('/').unwrap_or(item.text.len());
    let name = item.part(0..slash);
    let Ok(address) = name.text.parse::<IpAddr>() else {
        return Err(name.fault(format!("{:?} is no IP address", name.text), FORM));
    };
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let prefix = match item.text.get(slash + 1..) {
        None => bits,
        Some(digits) => {
            let plain = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
            let prefix = digits.parse().ok().filter(|prefix| plain && (1..=bits).contains(prefix));
            prefix.ok_or_else(|| {
                let help = format!("a prefix is a number from 1 to {bits}");
                item.part(slash + 1..item.text.len()).fault("this is no prefix", help)
            })?
        }
    };
    let why = match address {
        _ if address.is_unspecified() => "stands for no address",
        _ if address.is_multicast() => "is a group's",
        _ if address.is_loopback() => "never leaves a machine",
        IpAddr::V4(address) if address.is_broadcast() => "is everybody's",
        IpAddr::V6(address) if address.to_ipv4_mapped().is_some() => "is IPv4 in disguise",
        _ => return Ok(Network { address, prefix }),
    };
    Err(name.fault(format!("{address} {why}"), "name addresses that the guest sends from"))
}

/// A fault at one character, or at the end where one is missing.
pub(super) fn unexpected(value: Param<'_>, at: usize, help: &str) -> Fault {
    match value.text[at..].chars().next() {
        Some(c) => value.part(at..at + c.len_utf8()).fault(format!("unexpected {c:?}"), help),
        None => value.part(at..at).fault("something is missing here", help),
    }
}

/// On or off, as administrators write it.
///
/// # Errors
/// With the place: another word.
pub fn switch(text: &str) -> Result<bool, SpecError> {
    parse(text, |all| match all.text {
        "on" | "yes" | "1" | "true" => Ok(true),
        "off" | "no" | "0" | "false" => Ok(false),
        _ => Err(all.fault("neither on nor off", "write on or off")),
    })
}

/// An interface's MTU.
///
/// # Errors
/// With the place: no number, or one that Ethernet over Xen does not carry.
pub fn mtu(text: &str) -> Result<u32, SpecError> {
    parse(text, |all| {
        let plain = !all.text.is_empty() && all.text.bytes().all(|digit| digit.is_ascii_digit());
        let mtu = all.text.parse().ok().filter(|mtu| plain && (68..=65517).contains(mtu));
        // 68 is IPv4's least (RFC 791); 65517 is what fits XEN_NETIF_MAX_TX_SIZE with Ethernet's and a VLAN's header.
        mtu.ok_or_else(|| all.fault("this is no MTU", "write a number from 68 to 65517; 1500 is usual"))
    })
}

/// The name of a network device.
///
/// # Errors
/// With the place: too long, or with characters that files and rules cannot have.
pub fn device(text: &str) -> Result<String, SpecError> {
    const HELP: &str = "a device's name has 1 to 15 letters, digits, dots, dashes or underscores";
    parse(text, |all| {
        let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if let Some((at, c)) = all.text.char_indices().find(|(_, c)| !good(*c)) {
            return Err(all.part(at..at + c.len_utf8()).fault(format!("{c:?} in a device's name"), HELP));
        }
        if all.text.is_empty() || all.text.len() > 15 || [".", ".."].contains(&all.text) {
            return Err(all.fault("this is no name of a device", HELP));
        }
        Ok(all.text.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn fails<T: std::fmt::Debug>(result: Result<T, SpecError>, offset: usize, len: usize, words: &str) {
        let error = result.expect_err(words);
        assert_eq!((error.offset, error.len), (offset, len), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }

    #[test]
    fn ethernet_addresses() {
        assert_eq!(mac("00:16:3E:5f:77:fd").unwrap().to_string(), "00:16:3e:5f:77:fd");
        fails(mac(""), 0, 0, "missing");
        fails(mac("00:16:3e:5f:77"), 14, 0, "missing");
        fails(mac("00:16:3e:5f:77:f"), 16, 0, "missing");
        fails(mac("00-16"), 2, 1, "unexpected '-'");
        fails(mac("00:16:3e:5f:77:fd:00"), 17, 3, "follows");
        fails(mac("0:16:3e:5f:77:fd"), 1, 1, "unexpected ':'");
        fails(mac("01:16:3e:5f:77:fd"), 0, 2, "group");
        fails(mac("ff:ff:ff:ff:ff:ff"), 0, 2, "group");
        fails(mac("00:00:00:00:00:00"), 0, 17, "zero");
        fails(mac("00:16:3é:5f:77:fd"), 7, 2, "unexpected 'é'");
    }

    #[test]
    fn lists_of_addresses() {
        let list = |text| addresses(text).unwrap().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        assert_eq!(list(""), "");
        assert_eq!(
            list("  10.0.0.1 , 10.1.0.0/16,2001:db8::5/128 fe80::/10 "),
            "10.0.0.1 10.1.0.0/16 2001:db8::5 fe80::/10"
        );
        assert_eq!(list("10.0.0.1/32"), "10.0.0.1");
        fails(addresses("10.0.0.1 10.0.0.256"), 9, 10, "no IP address");
        fails(addresses("10.0.0.1/33"), 9, 2, "no prefix");
        fails(addresses("10.0.0.1/0"), 9, 1, "no prefix");
        fails(addresses("10.0.0.1/"), 9, 0, "no prefix");
        fails(addresses("10.0.0.1/+8"), 9, 2, "no prefix");
        fails(addresses("2001:db8::/129"), 11, 3, "no prefix");
        fails(addresses("10.0.0.1,224.0.0.1/24"), 9, 9, "a group's");
        fails(addresses("0.0.0.0"), 0, 7, "no address");
        fails(addresses("::1"), 0, 3, "never leaves");
        fails(addresses("::ffff:10.0.0.1"), 0, 15, "disguise");
        fails(addresses("255.255.255.255"), 0, 15, "everybody");
    }

    #[test]
    fn the_other_end() {
        let cases = [
            ("192.168.17.1/24", Some("192.168.17.254")),
            ("192.168.17.254/24", Some("192.168.17.1")),
            ("192.168.17.5/30", Some("192.168.17.6")),
            ("192.168.17.6/30", Some("192.168.17.5")),
            ("192.168.17.6/31", Some("192.168.17.7")),
            ("192.168.17.7/31", Some("192.168.17.6")),
            ("10.0.0.0/8", Some("10.255.255.254")),
            ("10.0.0.1", None),
            ("2001:db8::5/64", Some("2001:db8::1")),
            ("2001:db8::1/64", Some("2001:db8::2")),
            ("2001:db8::5", None),
        ];
        for (text, expected) in cases {
            let network = addresses(text).unwrap()[0];
            assert_eq!(network.other_end().map(|end| end.to_string()).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn sources_of_a_guest() {
        let cases = [
            ("192.168.17.1/24", "192.168.17.1/32"),
            ("192.168.17.0/24", "192.168.17.0/24"),
            ("192.168.17.9", "192.168.17.9/32"),
            ("2001:db8::5/64", "2001:db8::5/128"),
            ("2001:db8::/64", "2001:db8::/64"),
        ];
        for (text, expected) in cases {
            let (address, prefix) = addresses(text).unwrap()[0].source();
            assert_eq!(format!("{address}/{prefix}"), expected, "{text}");
        }
    }

    #[test]
    fn small_words() {
        assert!(switch("on").unwrap() && !switch("off").unwrap() && !switch("no").unwrap());
        fails(switch("maybe"), 0, 5, "neither");
        assert_eq!(mtu("9000").unwrap(), 9000);
        for wrong in ["", "67", "65518", "-1", "1500 ", "0x5dc", "99999999999"] {
            fails(mtu(wrong), 0, wrong.len(), "no MTU");
        }
        assert_eq!(device("vif1.0-emu").unwrap(), "vif1.0-emu");
        fails(device(""), 0, 0, "no name");
        fails(device("a-name-too-long-"), 0, 16, "no name");
        fails(device("a/b"), 1, 1, "'/'");
        fails(device(".."), 0, 2, "no name");
    }
}
