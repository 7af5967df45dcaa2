//! The ioctls (linux/if_tun.h, linux/sockios.h, linux/if.h).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::Features;

/// Bytes of a name with its NUL (IFNAMSIZ).
const NAME: usize = libc::IFNAMSIZ;

// _IOC(dir, 'T', number, size): direction in bits 30 and 31, size from bit 16, 'T' from bit 8.
const fn request(read: bool, number: u64) -> libc::c_ulong {
    (if read { 2 } else { 1 }) << 30 | 4 << 16 | 0x54 << 8 | number
}

const TUNSETIFF: libc::c_ulong = request(false, 202);
const TUNSETOFFLOAD: libc::c_ulong = request(false, 208);
const TUNGETIFF: libc::c_ulong = request(true, 210);
const TUNSETVNETHDRSZ: libc::c_ulong = request(false, 216);
const TUNSETCARRIER: libc::c_ulong = request(false, 226);

const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;

fn done(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A `struct ifreq` with a name and zeros.
fn ifreq(name: &str) -> io::Result<libc::ifreq> {
    if name.is_empty() || name.len() >= NAME || name.bytes().any(|byte| byte == 0 || byte == b'/' || byte == b'%') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no interface can have this name"));
    }
    // SAFETY: a struct of integers and unions of integers and pointers, for all of which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

pub(super) fn set_interface(fd: &OwnedFd, name: &str, new: bool) -> io::Result<()> {
    let mut request = ifreq(name)?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    if new {
        flags |= libc::IFF_TUN_EXCL;
    }
    // The highest bit, IFF_TUN_EXCL, is a short's sign.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one struct ifreq, which `request` is.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request) })
}

pub(super) fn interface(fd: &OwnedFd) -> io::Result<String> {
    // SAFETY: as in `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one struct ifreq, which `request` is.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request) })?;
    let name: Vec<u8> =
        request.ifr_name.iter().map(|&letter| letter.cast_unsigned()).take_while(|&letter| letter != 0).collect();
    String::from_utf8(name).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the name is not text"))
}

pub(super) fn set_header_size(fd: &OwnedFd, size: i32) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) })
}

pub(super) fn set_features(fd: &OwnedFd, features: Features) -> io::Result<()> {
    let Features { checksum, tso4, tso6 } = features;
    let flags = [(checksum, TUN_F_CSUM), (checksum && tso4, TUN_F_TSO4), (checksum && tso6, TUN_F_TSO6)];
    let flags = flags.iter().filter(|(on, _)| *on).fold(0, |all, (_, flag)| all | flag);
    // SAFETY: TUNSETOFFLOAD takes a number by value and touches no memory.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, flags) })
}

pub(super) fn set_carrier(fd: &OwnedFd, on: bool) -> io::Result<()> {
    let on = i32::from(on);
    // SAFETY: TUNSETCARRIER reads one int.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETCARRIER, &raw const on) })
}

/// The interface's MTU in bytes.
pub(super) fn mtu(name: &str) -> io::Result<u32> {
    let mut request = ifreq(name)?;
    // SAFETY: SIOCGIFMTU reads and writes one struct ifreq, which `request` is.
    done(unsafe { libc::ioctl(any_socket()?.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) })?;
    // SAFETY: the call has just written this member of the union, an int.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    Ok(mtu.cast_unsigned())
}

pub(super) fn set_mtu(name: &str, mtu: u32) -> io::Result<()> {
    let mut request = ifreq(name)?;
    request.ifr_ifru.ifru_mtu = mtu.cast_signed();
    // SAFETY: SIOCSIFMTU reads one struct ifreq, which `request` is.
    done(unsafe { libc::ioctl(any_socket()?.as_raw_fd(), libc::SIOCSIFMTU, &raw mut request) })
}

/// `struct ethtool_cmd` (linux/ethtool.h), of which only the speed is of interest here.
#[repr(C)]
#[derive(Default)]
struct EthtoolCmd {
    cmd: u32,
    modes: [u32; 2],
    speed: u16,
    duplex: u8,
    port_to_mdio: [u8; 5],
    most_packets: [u32; 2],
    speed_hi: u16,
    crossing: [u8; 2],
    partner: u32,
    reserved: [u32; 2],
}

const _: () = assert!(size_of::<EthtoolCmd>() == 44 && std::mem::offset_of!(EthtoolCmd, speed_hi) == 28);

const ETHTOOL_SSET: u32 = 2;
const SIOCETHTOOL: libc::c_ulong = 0x8946;
/// DUPLEX_UNKNOWN; SPEED_UNKNOWN is all bits.
const DUPLEX_UNKNOWN: u8 = 0xff;

/// The interface has no speed that anybody knows.
pub(super) fn forget_speed(name: &str) -> io::Result<()> {
    let mut settings = EthtoolCmd {
        cmd: ETHTOOL_SSET,
        speed: u16::MAX,
        speed_hi: u16::MAX,
        duplex: DUPLEX_UNKNOWN,
        ..EthtoolCmd::default()
    };
    let mut request = ifreq(name)?;
    request.ifr_ifru.ifru_data = (&raw mut settings).cast();
    // SAFETY: SIOCETHTOOL reads the struct ifreq `request` and, for ETHTOOL_SSET, the struct ethtool_cmd its pointer leads
    // to; both live until the call is over.
    done(unsafe { libc::ioctl(any_socket()?.as_raw_fd(), SIOCETHTOOL, &raw mut request) })
}

/// A socket of the calling thread's network namespace: tun devices do not take what concerns the MTU.
fn any_socket() -> io::Result<OwnedFd> {
    let (family, kind) = (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::DGRAM);
    Ok(rustix::net::socket_with(family, kind, rustix::net::SocketFlags::CLOEXEC, None)?)
}

/// Tun devices take the ioctls of sockets too (tun_chr_ioctl: SIOCSIFHWADDR).
pub(super) fn set_address(fd: &OwnedFd, name: &str, address: [u8; 6]) -> io::Result<()> {
    let mut request = ifreq(name)?;
    let mut hardware = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
    for (to, from) in hardware.sa_data.iter_mut().zip(address) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_hwaddr = hardware;
    // SAFETY: SIOCSIFHWADDR reads one struct ifreq, which `request` is.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFHWADDR, &raw mut request) })
}
