use super::*;
use proptest::prelude::*;

fn spec(target: &str, vdev: &str, access: Access) -> DiskSpec {
    DiskSpec {
        target: Some(target.to_owned()),
        format: Format::Raw,
        vdev: Vdev::parse(vdev).unwrap(),
        access,
        cdrom: false,
        backend: None,
        backend_type: None,
        script: None,
        direct_io_safe: false,
        sector_size: None,
        discard: true,
        trusted: None,
        kind: TargetKind::Unspecified,
        notes: Vec::new(),
    }
}

fn file(target: &str, vdev: &str, access: Access) -> DiskSpec {
    DiskSpec { kind: TargetKind::File, ..spec(target, vdev, access) }
}

fn phy(target: &str, vdev: &str, access: Access) -> DiskSpec {
    DiskSpec { kind: TargetKind::Phy, ..spec(target, vdev, access) }
}

fn cdrom(disc: DiskSpec) -> DiskSpec {
    DiskSpec { cdrom: true, access: ReadOnly, ..disc }
}

fn empty(vdev: &str) -> DiskSpec {
    DiskSpec { target: None, format: Format::Empty, ..cdrom(spec("", vdev, ReadOnly)) }
}

fn parse(text: &str) -> DiskSpec {
    text.parse().unwrap_or_else(|e| panic!("{text}\n{e}"))
}

use Access::{ReadOnly, SharedWrite, Write};

#[test]
fn the_handbook() {
    for (line, disks) in [
        (
            "disk = [ 'file:/xen/domU/boot.iso,hdc:cdrom,r', 'file:/xen/domU/SL50_64,hda,w', ]",
            vec![cdrom(file("/xen/domU/boot.iso", "hdc", ReadOnly)), file("/xen/domU/SL50_64", "hda", Write)],
        ),
        ("disk = [ 'tap:aio:/xen/domU/lists.img,xvda,w', ]", vec![spec("/xen/domU/lists.img", "xvda", Write)]),
        (
            "disk = ['file:/xen/domU/lists.img,hda,w', 'phy:/dev/sdb2,hdb,w' ]",
            vec![file("/xen/domU/lists.img", "hda", Write), phy("/dev/sdb2", "hdb", Write)],
        ),
        (
            "disk = [ 'file:/data/domains/NAME/disk.img,sda1,w', 'file:/data/domains/NAME/swap.img,sda2,w' ]",
            vec![
                file("/data/domains/NAME/disk.img", "sda1", Write),
                file("/data/domains/NAME/swap.img", "sda2", Write),
            ],
        ),
        (
            "disk = [ 'file:/data/zones/domains/full-virt/disk.img,ioemu:hda,w', 'file:/data/images/debian.iso,hdc:cdrom,r' ]",
            vec![
                file("/data/zones/domains/full-virt/disk.img", "hda", Write),
                cdrom(file("/data/images/debian.iso", "hdc", ReadOnly)),
            ],
        ),
        (
            "disk = [ 'phy:/dev/data/xp,ioemu:hda,w', 'phy:/dev/loop0,ioemu:hdc:cdrom,r' ]",
            vec![phy("/dev/data/xp", "hda", Write), cdrom(phy("/dev/loop0", "hdc", ReadOnly))],
        ),
        ("disk = [ 'phy:/dev/data/netbsd,0x3,w' ]", vec![phy("/dev/data/netbsd", "3", Write)]),
        (
            "disk = ['phy:/dev/volumegroupname/ocfs2_test,xvda2,w!' ]",
            vec![phy("/dev/volumegroupname/ocfs2_test", "xvda2", SharedWrite)],
        ),
    ] {
        assert_eq!(parse_list(line).unwrap_or_else(|e| panic!("{e}")), disks, "{line}");
    }
    let words = "phy:/dev/data/xmattachtest /dev/xvda5 w".split(' ').collect::<Vec<_>>();
    assert_eq!(parse_xm_args(&words), Ok(phy("/dev/data/xmattachtest", "xvda5", Write)));
    assert_eq!(Vdev::parse("/dev/xvda5").unwrap().number(), 51717); // xm block-detach 62 /dev/xvda5
}

/// The equivalences of xl-disk-configuration(5) and of Xen's own test, check-xl-disk-parse.
#[test]
fn the_manual() {
    let volume = spec("/dev/vg/guest-volume", "hda", Write);
    for text in [
        "/dev/vg/guest-volume,,hda",
        "/dev/vg/guest-volume,raw,hda,rw",
        "format=raw, vdev=hda, access=rw, target=/dev/vg/guest-volume",
        "raw:/dev/vg/guest-volume,hda,w",
    ] {
        assert_eq!(parse(text), volume, "{text}");
    }
    let words = ["format=raw", "vdev=hda", "access=rw", "target=/dev/vg/guest-volume"];
    assert_eq!(parse_xm_args(&words), Ok(volume));
    let disc = cdrom(spec("/root/image.iso", "hdc", ReadOnly));
    for text in [
        "/root/image.iso,,hdc,cdrom",
        "/root/image.iso,,hdc,,cdrom",
        "/root/image.iso,raw,hdc,devtype=cdrom",
        "format=raw, vdev=hdc, access=ro, devtype=cdrom, target=/root/image.iso",
        "raw:/root/image.iso,hdc:cdrom,ro",
    ] {
        assert_eq!(parse(text), disc, "{text}");
    }
    for text in [
        "devtype=cdrom,,,hdc",
        ",,hdc:cdrom,r",
        ",hdc:cdrom,r",
        ",ioemu:hdc:cdrom,r",
        "vdev=hdc,access=r,devtype=cdrom,target=",
        ",empty,hdc:cdrom,r",
        "vdev=hdc,access=r,devtype=cdrom,format=empty",
        "vdev=hdc,access=r,devtype=cdrom",
    ] {
        assert_eq!(parse(text), empty("hdc"), "{text}");
    }
    assert_eq!(
        parse("backendtype=phy,vdev=xvdb,access=w,target=/dev/vg/guest-volume"),
        DiskSpec { backend_type: Some(BackendType::Phy), ..spec("/dev/vg/guest-volume", "xvdb", Write) }
    );
    let iqn = "iqn.2001-05.com.equallogic:0-8a0906-23fe93404-c82797962054a96d-examplehost";
    let iscsi = DiskSpec { script: Some("block-iscsi".to_owned()), ..spec(iqn, "xvda", Write) };
    assert_eq!(parse(&format!("iscsi:{iqn},xvda,w")), iscsi);
    assert_eq!(parse(&format!("vdev=xvda,access=w,script=block-iscsi,target={iqn}")), iscsi);
    assert_eq!(
        parse("drbd:app01,hda,w"),
        DiskSpec { script: Some("block-drbd".to_owned()), ..spec("app01", "hda", Write) }
    );
}

#[test]
fn every_corner_that_is_accepted() {
    let x = || spec("/x", "xvda", Write);
    for (text, expected) in [
        ("/x,raw,xvda", x()),
        (" /x, raw,\txvda,\n w", x()),
        ("/x,raw,xvda,w,", x()),
        ("/x,raw,xvda, ", x()),
        ("/x,,xvda,,discard", x()),
        ("format=raw,/x,xvda,w", x()),
        ("vdev=xvda,/x,,w", x()),
        ("/x,raw,,w,vdev=xvda", x()),
        (",raw,xvda,w,target=/x", x()),
        ("access=,format=,vdev=,vdev=xvda,target=/x", x()),
        ("specification=xen,vdev=xvda,target=/x", x()),
        ("vdev=xvda,target=/x,", x()),
        ("vdev=xvda,target=/x,,", spec("/x,", "xvda", Write)),
        ("vdev=xvda,target=/x,y=z:w,r", spec("/x,y=z:w,r", "xvda", Write)),
        ("vdev=xvda,target= /x ", spec(" /x ", "xvda", Write)),
        ("/x ,,xvda", spec("/x ", "xvda", Write)),
        ("vdev=xvda,target=phy:/x", spec("phy:/x", "xvda", Write)),
        ("host:1,,xvda", spec("host:1", "xvda", Write)),
        ("/x:y,,xvda", spec("/x:y", "xvda", Write)),
        ("/x,,d0p1,r", spec("/x", "xvda1", ReadOnly)),
        ("/x,,xvda,!", spec("/x", "xvda", SharedWrite)),
        ("/x,,xvda,access=rw!", spec("/x", "xvda", SharedWrite)),
        ("/x,ioemu:hda,w", spec("/x", "hda", Write)),
        ("/x,,hda:disk,w", spec("/x", "hda", Write)),
        ("vdev=hdc:cdrom,target=/x", cdrom(spec("/x", "hdc", ReadOnly))),
        ("file:/x,hdc:cdrom,w", cdrom(file("/x", "hdc", ReadOnly))),
        ("phy: /x,xvda,w", phy("/x", "xvda", Write)),
        ("phy:sdb2,xvda,w", phy("/dev/sdb2", "xvda", Write)),
        ("vdev=xvda,phy:target=/x", phy("/x", "xvda", Write)),
        ("tap:tapdisk:ioemu:/x,xvda,w", x()),
        ("tap2:aio:/x,xvda,w", x()),
        ("tap:sync:/x,xvda,w", x()),
        ("tap:qcow:/x,xvda,w", DiskSpec { format: Format::Qcow, ..x() }),
        ("tap:aio:qcow2:/x,xvda,w", DiskSpec { format: Format::Qcow2, ..x() }),
        ("vhd:/x,xvda,w", DiskSpec { format: Format::Vhd, ..x() }),
        ("/x,qed,xvda,w", DiskSpec { format: Format::Qed, ..x() }),
        ("phy:/x,xvda,w,3", DiskSpec { backend: Some("3".to_owned()), ..phy("/x", "xvda", Write) }),
        (
            "script=block-x,phy:name,xvda,w",
            DiskSpec { script: Some("block-x".to_owned()), ..phy("name", "xvda", Write) },
        ),
        ("nbd:host 1,xvda,w", DiskSpec { script: Some("block-nbd".to_owned()), ..spec("host 1", "xvda", Write) }),
        ("enbd:/x,xvda,w", DiskSpec { script: Some("block-enbd".to_owned()), ..x() }),
        ("nbd:unix:/s:e,xvda,w", DiskSpec { kind: TargetKind::Nbd, ..spec("nbd:unix:/s:e", "xvda", Write) }),
        ("vdev=xvda,nbd:unix:/s,w", DiskSpec { kind: TargetKind::Nbd, ..spec("nbd:unix:/s", "xvda", Write) }),
        ("nbd:unix:/s,raw,xvda,w", DiskSpec { kind: TargetKind::Nbd, ..spec("nbd:unix:/s", "xvda", Write) }),
        ("nbd://h:1/e,,xvda,r", DiskSpec { kind: TargetKind::Nbd, ..spec("nbd://h:1/e", "xvda", ReadOnly) }),
        ("vdev=xvda,target=nbd://h/a,b", DiskSpec { kind: TargetKind::Nbd, ..spec("nbd://h/a,b", "xvda", Write) }),
        (
            "script=s,vdev=xvda,target=nbd://h/e",
            DiskSpec { script: Some("s".to_owned()), ..spec("nbd://h/e", "xvda", Write) },
        ),
        (
            "/x,,xvda,backend=dd,backendtype=tap,direct-io-safe,no-discard,untrusted",
            DiskSpec {
                backend: Some("dd".to_owned()),
                backend_type: Some(BackendType::Tap),
                direct_io_safe: true,
                discard: false,
                trusted: Some(false),
                ..x()
            },
        ),
        ("/x,,xvda,sector-size=512", DiskSpec { sector_size: Some(512), ..x() }),
        ("trusted,/x,,xvda", DiskSpec { trusted: Some(true), ..x() }),
        ("/é,,xvda", spec("/é", "xvda", Write)),
    ] {
        let parsed = parse(text);
        assert_eq!(parsed, expected, "{text}");
        assert_eq!(parse(&parsed.to_string()), expected, "{text} → {parsed}");
    }
}

#[test]
fn what_is_refused_and_where() {
    for (text, offset, len, word) in [
        ("", 0, 0, "no virtual device"),
        ("   ", 3, 0, "no virtual device"),
        ("foo", 3, 0, "no virtual device"),
        ("/x,raw,,w", 7, 0, "no virtual device"),
        ("phy:/x", 6, 0, "no virtual device"),
        ("vdev=xvda", 9, 0, "no target"),
        (",raw,xvda,w", 0, 0, "no target"),
        ("vdev=xvda,target=", 17, 0, "no target"),
        ("phy:,xvda,w", 4, 0, "no target"),
        ("format=empty,vdev=hdc", 7, 5, "only a CD-ROM"),
        (",hdc:disk,r", 1, 8, "only a CD-ROM"),
        ("/x,empty,hdc:cdrom,r", 3, 5, "there is a target"),
        ("/x,hda,w", 3, 3, "TARGET,,hda,w"),
        (",hdc,r", 1, 3, "unknown format"),
        ("/x,Raw,xvda", 3, 3, "unknown format"),
        ("/x,vmdk,xvda,w", 3, 4, "unknown format"),
        ("phy:/x,raw,xvda,w", 7, 3, "no format field"),
        ("/x,raw,xvd,w", 10, 0, "letter"),
        ("/x,raw,vda,w", 7, 3, "unknown virtual device"),
        ("/x,raw,/dev/vda,w", 12, 3, "unknown virtual device"),
        ("/x,raw,xvda16x,w", 13, 1, "'x'"),
        ("/x,raw,sdq,w", 9, 1, "16640"),
        ("/x,raw,0xzz,w", 9, 1, "not a digit"),
        ("/x,raw,xvda ,w", 11, 1, "white space"),
        ("/x,raw,xvda,w ", 13, 1, "white space"),
        ("/x,raw ,xvda,w", 6, 1, "white space"),
        ("vdev=xvda ,target=/x", 9, 1, "white space"),
        ("/x,raw,xvda,w,cdrom ", 19, 1, "white space"),
        ("/x,raw,xvda,q", 12, 1, "unknown access"),
        ("/x,raw,xvda,W", 12, 1, "w!"),
        ("/x,raw,xvda,r!", 12, 2, "unknown access"),
        ("access=wr,vdev=xvda,target=/x", 7, 2, "unknown access"),
        ("/x,raw,xvda,w,x", 14, 1, "one field too many"),
        ("/x,raw,xvda,w,,", 14, 0, "one comma too many"),
        ("phy:/x,xvda,w,3,x", 16, 1, "one field too many"),
        ("/x,raw,xvda,w,access=r", 21, 1, "access is given twice"),
        ("access=r,/x,raw,xvda,w", 21, 1, "one field too many"),
        ("/x,raw,xvda,vdev=xvdb", 17, 4, "given twice"),
        ("/x,raw,xvda,format=raw", 19, 3, "given twice"),
        ("qcow2:/x,xvda,w,format=raw", 23, 3, "given twice"),
        ("/x,raw,xvda,target=/y", 19, 2, "given twice"),
        ("/x,raw,xvda,discard,no-discard", 20, 10, "given twice"),
        ("/x,raw,xvda,trusted,untrusted", 20, 9, "given twice"),
        ("/x,,hdc:cdrom,r,devtype=disk", 24, 4, "given twice"),
        ("/x,raw,xvda,cdrom,cdrom", 18, 5, "given twice"),
        ("drbd:/x,xvda,w,script=a", 22, 1, "given twice"),
        ("/x,,xvda,backend=a,backend=b", 27, 1, "given twice"),
        ("/x,,xvda,direct-io-safe,direct-io-safe", 24, 14, "given twice"),
        ("tap:tap:/x,xvda,w", 4, 4, "given twice"),
        ("file:phy:/x,xvda,w", 5, 4, "given twice"),
        ("qcow:vhd:/x,xvda,w", 5, 4, "given twice"),
        ("tap:vmdk:/x,xvda,w", 4, 5, "qemu-nbd -f vmdk"),
        ("tap:ram:/x,xvda,w", 4, 4, "tmpfs"),
        ("foo:/x,xvda,w", 0, 4, "unknown prefix"),
        ("/x,,xvda,sector-size=4096", 21, 4, "sector-size=512"),
        ("/x,,xvda,w!,sector-size=512", 24, 3, "shared"),
        ("rbd:pool/img,,xvda,w", 0, 12, "/dev/rbd/POOL/IMAGE"),
        ("ceph:pool/img,raw,xvda,w", 0, 13, "rbd map"),
        ("zvol:tank/vm,,xvda", 0, 12, "/dev/zvol/"),
        ("vdev=xvda,target=nbd:server:10809", 17, 16, "nbd://HOST"),
        ("tap:foo:/x,xvda,w", 4, 4, "unknown prefix"),
        ("nbds://h/e,,xvda", 0, 5, "nbd:unix:PATH"),
        ("vdev=xvda,target=nbd+unix:///e?socket=/s", 17, 23, "nbd:unix:PATH"),
        ("/x,raw,hdc:floppy,r", 11, 6, "unknown device type"),
        ("/x,raw,hdc:,r", 11, 0, "unknown device type"),
        ("/x,raw,:cdrom,r", 7, 0, "missing"),
        ("/x,raw,ioemu:,w", 13, 0, "missing"),
        ("/x,raw,xvda,devtype=tape", 20, 4, "unknown device type"),
        ("/x,raw,xvda,backendtype=loop", 24, 4, "unknown backend type"),
        ("/x,raw,xvda,specification=virtio", 26, 6, "virtio"),
        ("/x,raw,xvda,specification=nvme", 26, 4, "unknown specification"),
        ("/x,raw,xvda,grant_usage=1", 12, 11, "virtio"),
        ("/x,raw,xvda,colo-port=1", 12, 9, "COLO"),
        ("/x,raw,xvda,acces=r", 12, 5, "mean access?"),
        ("/x,raw,xvda,Access=r", 12, 6, "mean access?"),
        ("/x,raw,xvda,colour=red", 12, 6, "unknown parameter"),
        ("/x,raw,xvda,discard=1", 12, 7, "stands alone"),
        ("/a=b,raw,xvda", 2, 1, "target=PATH"),
        ("=raw,/x", 0, 1, "target=PATH"),
        ("/x\0,raw,xvda", 2, 1, "control"),
        ("/x\ny,raw,xvda", 2, 1, "control"),
        ("vdev=xvda,target=/x\n", 19, 1, "control"),
        ("/x,raw,xvda,w\r", 13, 1, "control"),
        ("/é,raw,xvdé", 11, 2, "letter"),
    ] {
        let e = text.parse::<DiskSpec>().expect_err(text);
        assert_eq!((e.offset, e.len), (offset, len), "{text:?}\n{e}");
        assert!(e.to_string().contains(word), "{text:?}: no {word:?} in\n{e}");
        assert!(!e.help.is_empty() && e.input == text);
    }
}

#[test]
fn lists() {
    let two = vec![spec("/x", "xvda", Write), spec("/y", "xvdb", Write)];
    for text in [
        "disk = [ '/x,,xvda', \"/y,,xvdb\" ]",
        "disk=['/x,,xvda','/y,,xvdb',];",
        "disk += ['/x,,xvda','/y,,xvdb']",
        "# two\ndisk = [ # here\n  '/x,,xvda', # one\n  '/y,,xvdb'\n]\n",
        "disk = [ '/x,,xvda', \\\n '/y,,xvdb', \\\r\n]",
        "disk = [ '/x,,\\\nxvda', '/y, \\\n,xvdb' ]",
        "['/x,,xvda','/y,,xvdb']",
        "'/x,,xvda', '/y,,xvdb'",
    ] {
        assert_eq!(parse_list(text).unwrap_or_else(|e| panic!("{e}")), two, "{text}");
    }
    assert_eq!(parse_list("disk = [ ]"), Ok(vec![]));
    assert_eq!(parse_list("/x,,xvda\n"), Ok(vec![spec("/x", "xvda", Write)]));
    assert_eq!(
        parse_list(r#"['vdev=xvda,target=/it\'s \\ \"it\"']"#),
        Ok(vec![spec("/it's \\ \"it\"", "xvda", Write)])
    );
}

#[test]
fn lists_that_are_refused_and_where() {
    for (text, offset, len, word) in [
        ("disk = '/x,,xvda'", 7, 1, "not given as a list"),
        ("disk = ", 7, 0, "not given as a list"),
        ("disk = [ '/x,,xvda'", 19, 0, "not closed"),
        ("disk = [ '/x,,xvda', ", 21, 0, "not closed"),
        ("disk = [ '/x,,xvda ]", 9, 1, "quote is not closed"),
        ("disk = [ '/x,\n,xvda' ]", 13, 0, "backslash"),
        ("disk = [ '/x,,xvda' '/y,,xvdb' ]", 20, 1, "comma"),
        ("disk = [ '/x,,xvda' ] vif = [ ]", 22, 9, "follows"),
        ("disk = [ /x,,xvda ]", 9, 2, "quotes"),
        ("disk = [ , ]", 9, 1, "quotes"),
        ("disk = [ '/x\\q,,xvda' ]", 12, 2, "escape"),
        ("disk = [ '/x\\", 12, 1, "escape"),
        ("disk = [ '/x,,xvda,q' ]", 19, 1, "unknown access"),
        ("disk = [ '/x,,xvda',\n  '/y,,xvdb,q' ]", 33, 1, "unknown access"),
        ("disk = [ '/x\\'s,,xvda,\\\nq' ]", 24, 1, "unknown access"),
        ("disk = [ '/x,,xvda', '/y,,d0p0' ]", 26, 4, "two disks are called xvda"),
        ("disk = [ '' ]", 10, 0, "no virtual device"),
        ("'/x,,xvda' ]", 11, 1, "comma"),
        ("", 0, 0, "no virtual device"),
    ] {
        let e = parse_list(text).expect_err(text);
        assert_eq!((e.offset, e.len), (offset, len), "{text:?}\n{e}");
        assert!(e.to_string().contains(word), "{text:?}: no {word:?} in\n{e}");
    }
}

#[test]
fn words_of_block_attach() {
    for (words, expected) in [
        (&["phy:/x", "xvda", "w"][..], phy("/x", "xvda", Write)),
        (&["phy:/x", "xvda", "w!", "3"], DiskSpec { backend: Some("3".to_owned()), ..phy("/x", "xvda", SharedWrite) }),
        (&["/x,,xvda", "w"], spec("/x", "xvda", Write)),
        (&["/x", "raw", "xvda,", "", "r"], spec("/x", "xvda", ReadOnly)),
        (&["target=/a b", "vdev=xvda"], spec("/a b", "xvda", Write)),
    ] {
        assert_eq!(parse_xm_args(words).unwrap_or_else(|e| panic!("{e}")), expected, "{words:?}");
    }
    let e = parse_xm_args(&["phy:/x", "/dev/vda", "w"]).expect_err("no such device");
    assert_eq!((e.input.as_str(), e.span()), ("phy:/x /dev/vda w", 12..15));
    let e = parse_xm_args(&["phy:/x", "xvda", "w", "3", "x"]).expect_err("five words");
    assert_eq!(e.span(), 16..17);
    assert_eq!(parse_xm_args(&[]).expect_err("nothing").span(), 0..0);
}

#[test]
fn an_error_shows_the_place() {
    let e = parse_list("disk = [ '/x,,xvda',\n\t'phy:/é\\'s,xvdb,q' ] # \x1b[31m").expect_err("access");
    assert_eq!(
        e.to_string(),
        "unknown access `q`\n  \t'phy:/é\\'s,xvdb,q' ] # \u{fffd}[31m\n  \t                ^\nhelp: write r, w or, for a disk that several guests share knowingly, w!"
    );
    let e = "/x,raw,xvda".replace("raw", "rww").parse::<DiskSpec>().expect_err("format");
    assert_eq!(e.to_string().lines().nth(2), Some("     ^^^"));
}

#[test]
fn old_spellings_are_noted() {
    for (text, words) in [
        ("/x,raw,xvda,w", &[][..]),
        ("phy:/x,xvda,w", &["block device"]),
        ("tap:aio:/x,ioemu:hda,w", &["tap:", "aio:", "ioemu:"]),
        ("file:/x,hdc:cdrom,w", &["loop", "devtype=cdrom", "read-only"]),
        ("/x,,/dev/xvda5,w!", &["/dev/ is not needed", "every one must know"]),
        ("phy:sdb2,xvda,w,3", &["block device", "backend=3", "/dev/sdb2"]),
        ("vdev=xvda,target=phy:/x", &["literally"]),
    ] {
        let notes = parse(text).notes;
        assert_eq!(notes.len(), words.len(), "{text}: {notes:?}");
        for word in words {
            assert!(notes.iter().any(|n| n.contains(word) && n.ends_with('.')), "{text}: no {word} in {notes:?}");
        }
    }
}

#[test]
fn formats_for_others() {
    for (text, word) in [
        ("/x,qcow2,xvda", "--format=qcow2"),
        ("vhd:/x,xvda,w", "--format=vpc"),
        ("nbd:unix:/s,qcow2,xvda", "format=raw"),
        ("/x,,xvda,backendtype=standalone", "virtio"),
    ] {
        assert!(parse(text).unsupported().is_some_and(|why| why.contains(word)), "{text}");
    }
    assert_eq!(parse("/x,raw,xvda").unsupported(), None);
    assert_eq!(parse(",hdc:cdrom,r").unsupported(), None);
}

/// Texts made of the grammar's own words, which reach further into the parser than arbitrary characters do.
fn almost() -> impl Strategy<Value = String> {
    let words = [
        "phy:",
        "file:",
        "tap:",
        "aio:",
        "qcow2:",
        "nbd:",
        "nbd:unix:",
        "nbd://",
        "ioemu:",
        "foo:",
        "/x",
        "é",
        "raw",
        "empty",
        "xvda",
        "/dev/xvda",
        "hdc:cdrom",
        "0x3",
        "xvd",
        "r",
        "w!",
        ",",
        ",",
        ",",
        ",",
        "=",
        " ",
        "\t",
        "\n",
        "\0",
        "format=",
        "vdev=",
        "access=",
        "target=",
        "backend=",
        "script=",
        "devtype=",
        "cdrom",
        "discard",
        "'",
        "\"",
        "[",
        "]",
        "disk = [",
        "\\",
        "\\\n",
        "#",
        ";",
    ];
    proptest::collection::vec(proptest::sample::select(words.to_vec()), 0..12).prop_map(|w| w.concat())
}

fn valid() -> impl Strategy<Value = DiskSpec> {
    let word = || proptest::option::of("[-a-zA-Z0-9_./é:]{1,8}");
    let kinds = [TargetKind::Unspecified, TargetKind::File, TargetKind::Phy, TargetKind::Nbd];
    let formats = [Format::Raw, Format::Qcow, Format::Qcow2, Format::Vhd, Format::Qed, Format::Empty];
    let accesses = [ReadOnly, Write, SharedWrite];
    let types = [BackendType::Phy, BackendType::Tap, BackendType::Qdisk, BackendType::Standalone];
    let looks = (
        "[ ,=:a-z/\\té'\"\\\\]{1,12}",
        proptest::sample::select(kinds.to_vec()),
        proptest::sample::select(formats.to_vec()),
        0..2u32 << 28,
        proptest::sample::select(accesses.to_vec()),
        any::<bool>(),
    );
    let rest = (
        word(),
        word(),
        proptest::option::of(proptest::sample::select(types.to_vec())),
        any::<(bool, bool, Option<bool>)>(),
    );
    (looks, rest).prop_map(|((name, kind, format, vdev, access, cdrom), (backend, script, backend_type, flags))| {
        let cdrom = cdrom || format == Format::Empty;
        // A script's target is no export of ours, so that the kind would not return.
        let kind = if kind == TargetKind::Nbd && script.is_some() { TargetKind::Unspecified } else { kind };
        let (target, kind) = match (format, kind) {
            (Format::Empty, _) => (None, TargetKind::Unspecified),
            (_, TargetKind::Nbd) => (Some(format!("nbd:unix:/{name}")), kind),
            (_, TargetKind::Phy) => (Some(format!("/{name}")), kind),
            _ => (Some(name), kind),
        };
        DiskSpec {
            target,
            format,
            vdev: Vdev::from_number(vdev),
            access: if cdrom { ReadOnly } else { access },
            cdrom,
            backend,
            backend_type,
            script,
            direct_io_safe: flags.0,
            discard: flags.1,
            trusted: flags.2,
            sector_size: flags.0.then_some(512).filter(|_| cdrom || access != SharedWrite),
            kind,
            notes: Vec::new(),
        }
    })
}

fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_canonical_form_returns(spec in valid()) {
        let text = spec.to_string();
        let same = |got: Result<DiskSpec, SpecError>| match got {
            Ok(got) if got == spec => Ok(()),
            Ok(got) => Err(TestCaseError::fail(format!("{text} became {got:?}"))),
            Err(e) => Err(TestCaseError::fail(e.to_string())),
        };
        same(text.parse())?;
        same(parse_xm_args(&[&text]))?;
        let list = format!("disk = [ {}, ]", quote(&text));
        same(parse_list(&list).map(|mut specs| specs.remove(0)))?;
    }

    #[test]
    fn nothing_panics(text in prop_oneof![almost(), ".*", "[ -~]*"]) {
        let words: Vec<&str> = text.split(' ').collect();
        let specs = text.parse::<DiskSpec>().map(|s| vec![s]);
        for outcome in [specs, parse_list(&text), parse_xm_args(&words).map(|s| vec![s])] {
            match outcome {
                Ok(specs) => {
                    for spec in specs {
                        let returned = spec.to_string().parse::<DiskSpec>();
                        prop_assert_eq!(returned.map_err(|e| TestCaseError::fail(e.to_string()))?, spec);
                    }
                }
                Err(e) => {
                    prop_assert_eq!(&e.input, &text);
                    prop_assert!(text.get(e.span()).is_some(), "{:?} in {:?}", e.span(), text);
                    prop_assert!(!e.message.is_empty() && !e.help.is_empty() && e.to_string().lines().count() >= 4);
                }
            }
        }
    }
}
