//! What `netback serve` needs of the machine, looked at before it begins.

use std::io;

use hypervisor::Machine;
use hypervisor::kernel::XEN_NETBACK;
use rustix::thread::CapabilitySet;

/// Makes interfaces (`drivers/net/tun.c`).
const TUN: &str = "/dev/net/tun";

/// What was found.
#[derive(Debug)]
struct Facts {
    /// May this process configure this namespace's network?
    net_admin: bool,
    /// Opening /dev/net/tun.
    tun: io::Result<()>,
    /// Does the kernel's backend take the interfaces?
    kernel_backend: bool,
}

/// Whether interfaces can be served here.
///
/// # Errors
/// A sentence that says what to do.
pub fn check(machine: &Machine) -> Result<(), String> {
    let capabilities = rustix::thread::capabilities(None).map_err(|error| format!("reading capabilities: {error}"))?;
    judge(&Facts {
        net_admin: capabilities.effective.contains(CapabilitySet::NET_ADMIN),
        tun: std::fs::File::options().read(true).write(true).open(TUN).map(drop),
        kernel_backend: XEN_NETBACK.is_loaded(machine),
    })
}

fn judge(facts: &Facts) -> Result<(), String> {
    if facts.kernel_backend {
        return Err(XEN_NETBACK.refusal("netback"));
    }
    if !facts.net_admin {
        return Err("network interfaces are made by root only (CAP_NET_ADMIN): run this as root, or, to try it on an \
                    emulated machine, in namespaces of its own (unshare --map-root-user --net)"
            .to_owned());
    }
    match &facts.tun {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) => {
            Err(format!("{TUN}, with which interfaces are made, is missing ({error}): load its module (modprobe tun)"))
        }
        Err(error) => Err(format!("{TUN}, with which interfaces are made, cannot be opened ({error}): check its mode")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_with_what_to_do() {
        let good = || Facts { net_admin: true, tun: Ok(()), kernel_backend: false };
        let no = |errno| Err(io::Error::from_raw_os_error(errno));
        assert_eq!(judge(&good()), Ok(()));
        for (facts, words) in [
            (Facts { kernel_backend: true, ..good() }, "modprobe -r xen-netback"),
            (Facts { net_admin: false, ..good() }, "as root"),
            (Facts { tun: no(libc::ENOENT), ..good() }, "modprobe tun"),
            (Facts { tun: no(libc::ENODEV), ..good() }, "modprobe tun"),
            (Facts { tun: no(libc::EACCES), ..good() }, "mode"),
        ] {
            let said = judge(&facts).unwrap_err();
            assert!(said.contains(words), "{facts:?}: {said}");
        }
    }
}
