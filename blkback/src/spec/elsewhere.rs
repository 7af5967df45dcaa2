//! Spellings that other programs have for storage (QEMU, libvirt, libxl's scripts), and what to write here instead.

/// Spellings before a colon, and what to do.
const SPELLINGS: [(&[&str], &str); 9] = [
    (
        &["rbd", "ceph"],
        "map it with `rbd map POOL/IMAGE` and attach /dev/rbd/POOL/IMAGE, or let `qemu-nbd -k /run/IMAGE.sock \
         rbd:POOL/IMAGE` serve it and attach nbd:unix:/run/IMAGE.sock",
    ),
    (&["zvol", "zfs"], "attach the volume's device, /dev/zvol/POOL/VOLUME"),
    (&["lvm", "lv", "vg"], "attach the volume's device, /dev/GROUP/VOLUME"),
    (
        &["nbd", "nbds", "nbd+tcp", "nbd+unix"],
        "write nbd://HOST[:PORT]/EXPORT or nbd:unix:PATH[:EXPORT] for a server, or attach /dev/nbd0 after nbd-client",
    ),
    (&["iscsi"], "log in with iscsiadm and attach the device, /dev/disk/by-path/ip-…-iscsi-…-lun-…"),
    (&["drbd"], "attach the resource's device, /dev/drbd/by-res/RESOURCE/0"),
    (
        &["gluster", "gluster+tcp", "gluster+unix", "sheepdog", "ssh", "sftp", "http", "https", "ftp", "ftps", "json"],
        "let qemu-nbd or nbdkit serve it, and attach nbd:unix:PATH of its socket",
    ),
    (
        &["qcow", "qcow2", "qed", "vhd", "vhdx", "vpc", "vmdk", "vdi"],
        "let `qemu-nbd -k /run/IMAGE.sock IMAGE` serve it and attach nbd:unix:/run/IMAGE.sock, or make it raw with \
         `qemu-img convert -O raw`",
    ),
    (&["file", "phy", "tap", "tap2", "tapdisk", "sync", "raw", "ioemu"], "leave the prefix out: write the path alone"),
];

/// What to write instead of a target that is a spelling of another program; `None` if it is none that is known, or a path.
pub fn written_here(target: &str) -> Option<&'static str> {
    let (scheme, _) = target.split_once(':')?;
    SPELLINGS.iter().find(|(schemes, _)| schemes.contains(&scheme)).map(|(_, help)| *help)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_others() {
        let cases = [
            ("rbd:pool/img", "/dev/rbd/POOL/IMAGE"),
            ("rbd:pool/img:id=admin", "/dev/rbd/POOL/IMAGE"),
            ("ceph:pool/img", "rbd map"),
            ("zvol:tank/vm", "/dev/zvol/"),
            ("nbd:server:10809", "nbd://HOST"),
            ("nbd:localhost", "nbd://HOST"),
            ("nbd+unix:///disk?socket=/run/x", "nbd:unix:PATH"),
            ("iscsi:iqn.2001-04.com.example:disk", "iscsiadm"),
            ("https://host/x.img", "nbdkit"),
            ("qcow2:/srv/x.qcow2", "qemu-img convert"),
            ("file:/srv/x.img", "the path alone"),
        ];
        for (target, help) in cases {
            assert!(
                written_here(target).is_some_and(|text| text.contains(help)),
                "{target}: {:?}",
                written_here(target)
            );
        }
        for path in ["/srv/rbd:x", "./rbd:x", "vg/disk", "x.img", "disk:1"] {
            assert_eq!(written_here(path), None, "{path}");
        }
    }
}
