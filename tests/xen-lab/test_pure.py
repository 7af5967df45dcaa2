"""Unit tests of everything that needs no machine: `python3 -m unittest discover -s tests/xen-lab`."""

from __future__ import annotations

import contextlib
import io
import lzma
import struct
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build  # noqa: E402
import checks  # noqa: E402
import counts  # noqa: E402
import cpio  # noqa: E402
import elf  # noqa: E402
import kernel  # noqa: E402
import machine  # noqa: E402
import network  # noqa: E402
import packages  # noqa: E402
import payload  # noqa: E402
import recipe  # noqa: E402
import report  # noqa: E402
import scenario  # noqa: E402
import wire  # noqa: E402
import worlds  # noqa: E402
import xentrace  # noqa: E402
from guest import Disk, GuestConfig  # noqa: E402


class Packages(unittest.TestCase):
    def test_one_line_format(self) -> None:
        found = packages.parse_one_line("# deb http://off x main\ndeb [signed-by=/k arch=amd64] http://a/debian s1 main contrib\n"
                                        "deb-src http://a/debian s1 main\n")
        self.assertEqual(found, [packages.Source("http://a/debian", ("s1",), ("main", "contrib"))])

    def test_deb822_format(self) -> None:
        text = ("Types: deb deb-src\n# http://comment\nURIs: http://a/debian\nSuites: s1 s1-updates\nComponents: main\n\n"
                "Types: deb\nEnabled: no\nURIs: http://b\nSuites: s1\nComponents: main\n\n"
                "Types: deb-src\nURIs: http://c\nSuites: s1\nComponents: main\n")
        self.assertEqual(packages.parse_deb822(text), [packages.Source("http://a/debian", ("s1", "s1-updates"), ("main",))])

    def test_the_suite_itself_is_wanted(self) -> None:
        sources = [packages.Source("http://sec", ("s1-security",), ("main",)), packages.Source("http://a", ("s1",), ("contrib",)),
                   packages.Source("http://b", ("s1-updates", "s1"), ("main",))]
        self.assertEqual(packages.mirror_for("s1", sources), "http://b")
        self.assertIsNone(packages.mirror_for("s2", sources))

    def test_other_suites_come_from_the_same_mirror(self) -> None:
        sources = [packages.Source("http://sec", ("bookworm-security",), ("main",)), packages.Source("http://a", ("bookworm",), ("main",)),
                   packages.Source("http://b", ("s1",), ("main",))]
        self.assertEqual(packages.mirror_of("s1", sources), "http://b")
        self.assertEqual(packages.mirror_of("trixie", sources), "http://a")
        self.assertIsNone(packages.mirror_of("trixie", sources[:1]))

    def test_a_kernel_is_found_behind_its_meta_package(self) -> None:
        self.assertEqual(packages.versioned_kernel("linux-image-amd64\n  Depends: linux-base-amd64\n  Depends: linux-image-7.2.1+deb14-amd64\n"),
                         "linux-image-7.2.1+deb14-amd64")
        self.assertIsNone(packages.versioned_kernel("linux-image-amd64\n  Depends: <linux-image-9>\n"))

    def test_an_empty_linux_image_names_its_parts(self) -> None:
        text = ("linux-image-7.2.1+deb14-amd64\n  PreDepends: linux-base\n |Depends: dracut\n  Depends: linux-base-7.2.1+deb14-amd64\n"
                "  Depends: linux-binary-7.2.1+deb14-amd64\n  Depends: linux-modules-7.2.1+deb14-amd64\n  Suggests: linux-doc-7.2\n")
        self.assertEqual(packages.kernel_parts(text), [f"linux-{part}-7.2.1+deb14-amd64" for part in ("base", "binary", "modules")])
        self.assertEqual(packages.kernel_parts("linux-image-6.1.0-1-amd64\n  PreDepends: linux-base\n  Depends: kmod\n"), [])

    def test_a_kernel_is_found_in_both_layouts(self) -> None:
        for vmlinuz, modules in (("boot/vmlinuz-6.1", "lib/modules/6.1"), ("usr/lib/modules/7.2/vmlinuz", "usr/lib/modules/7.2")):
            with tempfile.TemporaryDirectory() as folder:
                tree = Path(folder)
                self.assertRaises(FileNotFoundError, packages.find_kernel, tree)
                (tree / modules / "kernel").mkdir(parents=True)
                (tree / vmlinuz).parent.mkdir(parents=True, exist_ok=True)
                (tree / vmlinuz).touch()
                found = packages.find_kernel(tree)
                self.assertEqual((found.vmlinuz, found.modules), (tree / vmlinuz, tree / modules))

    def test_modules_are_unpacked_in_place(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "a").mkdir()
            (Path(folder) / "a/x.ko.xz").write_bytes(lzma.compress(b"module"))
            packages.unpack_modules(Path(folder))
            self.assertEqual([(path.name, path.read_bytes()) for path in (Path(folder) / "a").iterdir()], [("x.ko", b"module")])


class Build(unittest.TestCase):
    def test_modules_come_after_what_they_need(self) -> None:
        table = "kernel/a/top-mod.ko: kernel/a/mid.ko kernel/a/low.ko\nkernel/a/mid.ko: kernel/a/low.ko\nkernel/a/low.ko:\n"
        self.assertEqual(kernel.module_closure(table, ["top_mod", "low", "built_in"]),
                         ["kernel/a/low.ko", "kernel/a/mid.ko", "kernel/a/top-mod.ko"])

    def test_compressed_modules_are_unpacked(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "in/usr/lib/modules/6.99"
            for name in ("kernel/low.ko.xz", "kernel/top.ko.xz"):
                (base / name).parent.mkdir(parents=True, exist_ok=True)
                (base / name).write_bytes(lzma.compress(name.encode()))
            (base / "modules.dep").write_text("kernel/top.ko.xz: kernel/low.ko.xz\nkernel/low.ko.xz:\n")
            for index in ("modules.order", "modules.builtin", "modules.builtin.modinfo", "vmlinuz"):
                (base / index).write_text("kernel/top.ko.xz\n")
            out = Path(folder) / "out"
            (out / "etc").mkdir(parents=True)
            kernel.copy_modules(Path(folder) / "in", ["top"], out)
            self.assertEqual((out / "etc/lab-modules").read_text().split(),
                             ["/lib/modules/6.99/kernel/low.ko", "/lib/modules/6.99/kernel/top.ko"])
            self.assertEqual((out / "lib/modules/6.99/kernel/top.ko").read_text(), "kernel/top.ko.xz")
            self.assertEqual((out / "lib/modules/6.99/modules.order").read_text(), "kernel/top.ko\n")

    def test_what_is_in_a_bzimage(self) -> None:
        for packed in (lzma.compress(b"the kernel"), subprocess.run(["zstd", "-c"], input=b"the kernel", stdout=subprocess.PIPE, check=True).stdout):
            image = bytearray(1024)     # two sectors in front, the payload 64 bytes further
            image[0x1F1] = 1
            struct.pack_into("<II", image, 0x248, 64, len(packed) + 4)
            self.assertEqual(kernel.uncompressed(bytes(image) + bytes(64) + packed + b"size"), b"the kernel")
        self.assertRaises(ValueError, kernel.uncompressed, bytes(2048))

    def test_the_images_from_before_there_were_worlds(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            for name in ("dom0-root/bin", "packages/boot", "logs", "kernels/6.1"):
                (cache / name).mkdir(parents=True)
            for name in ("debootstrap.key", "dom0.img", "dom0.key"):
                (cache / name).write_text(name)
            for _ in range(2):
                build.adopt(cache)
                self.assertEqual(sorted(path.name for path in cache.iterdir()), ["4.17", "kernels"])
                self.assertEqual(sorted(path.name for path in (cache / "4.17").iterdir()), ["debootstrap.key", "dom0-root"])

    def test_key_changes_with_every_part(self) -> None:
        self.assertEqual(recipe.key("a", ["b"]), recipe.key("a", ["b"]))
        self.assertNotEqual(recipe.key("a", ["b"]), recipe.key("a", ["b", "c"]))

    def test_cpio_header_and_padding(self) -> None:
        raw = cpio.entry("ab", 0o100644, b"xyz", 1)
        self.assertEqual(len(raw) % 4, 0)
        self.assertTrue(raw.startswith(b"070701"))
        self.assertEqual(int(raw[54:62], 16), 3)        # c_filesize
        self.assertEqual(int(raw[94:102], 16), 3)       # c_namesize with its NUL
        self.assertEqual(raw[110:113], b"ab\0")

    def test_cpio_of_a_tree_ends_with_its_trailer(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder)
            (tree / "d").mkdir()
            (tree / "d/f").write_text("hello")
            (tree / "l").symlink_to("d/f")
            out = io.BytesIO()
            cpio.write(tree, out)
        names = [name for name in (b"d\0", b"d/f\0", b"l\0", b"TRAILER!!!\0") if name in out.getvalue()]
        self.assertEqual(len(names), 4)

    def test_a_program_without_its_library(self) -> None:
        """Strike libraries from a real program of this machine; what is kept still has to resolve."""
        data = Path("/bin/ls").read_bytes()
        try:
            program = elf.Program(data)
        except ValueError as error:
            self.skipTest(f"/bin/ls: {error}")
        before = program.needed()
        struck = program.keep_only(["libc.so", "ld-linux"])
        self.assertEqual(len(program.data), len(data))
        self.assertEqual(sorted(before), sorted(struck + elf.Program(bytes(program.data)).needed()))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "ls"
            file.write_bytes(program.data)
            file.chmod(0o755)
            done = subprocess.run([str(file), "--version"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_not_an_elf_file(self) -> None:
        self.assertRaises(ValueError, elf.Program, b"#!/bin/sh\n" * 20)


class Wire(unittest.TestCase):
    def test_lines_in_pieces_and_junk(self) -> None:
        lines = wire.Lines()
        data = b'cut line"}\n' + wire.encode({"id": 1, "out": wire.pack(b"\0\xff\n")}) + wire.encode({"id": 1, "exit": 0})
        found = []
        for start in range(0, len(data), 7):
            found += lines.feed(data[start:start + 7])
        self.assertEqual([message["id"] for message in found], [1, 1])
        self.assertEqual(wire.unpack(found[0]["out"]), b"\0\xff\n")
        self.assertEqual(lines.junk, [b'cut line"}'])

    def test_one_message_is_one_line(self) -> None:
        self.assertEqual(wire.encode({"argv": ["a\nb"]}).count(b"\n"), 1)


class Guests(unittest.TestCase):
    def test_disk_spec(self) -> None:
        disk = Disk("/dev/loop0", "xvdb", "ro")
        self.assertEqual(disk.spec("kernel"), disk.spec("ours"))
        self.assertEqual(disk.spec("kernel"), "format=raw,vdev=xvdb,access=ro,target=/dev/loop0")
        self.assertIn("backendtype=qdisk,", disk.spec("qdisk"))
        self.assertEqual([Disk("", f"xvd{letter}").number() for letter in "abp"], [51712, 51728, 51952])
        self.assertEqual([Disk("", f"hd{letter}").number() for letter in "abcd"], [768, 832, 5632, 5696])
        self.assertRaises(ValueError, Disk("", "xvdq1").number)

    def test_config(self) -> None:
        text = GuestConfig("g", root="xvda", disks=[Disk("/i", "xvda")], blkfront={"max_queues": 2}).text("ours")
        self.assertIn("lab.root=xvda", text)
        self.assertIn("lab.blkfront=max_queues=2", text)
        self.assertIn('disk=["format=raw,vdev=xvda,access=rw,target=/i"]', text)
        # As the handbooks write it.
        text = GuestConfig("g", kind="hvm", emul_unplug="never", disks=[Disk("/i", "hda", prefix="file:")]).text("ours")
        self.assertIn('disk=["file:/i,hda,w"]', text)
        self.assertIn('builder="hvm"\n', text)
        self.assertIn("xen_emul_unplug=never", text)
        self.assertNotIn("type=", text)
        text = GuestConfig("g", vifs=["mac=00:16:3e:5f:77:fd, bridge=xenbr0", "bridge=xenbr1"]).text("ours")
        self.assertIn("vif=['mac=00:16:3e:5f:77:fd, bridge=xenbr0','bridge=xenbr1']\n", text)


class Logs(unittest.TestCase):
    def test_trouble_is_found(self) -> None:
        log = "[ 1.0] fine\n[ 2.0] WARNING: CPU: 0 PID: 1 at x.c:1\n[ 3.0] INFO: task fio:1 blocked for more than 120 seconds.\n"
        self.assertEqual(len(checks.trouble(log, checks.KERNEL_TROUBLE)), 2)

    def test_an_allowed_stall_takes_its_trace_along(self) -> None:
        log = ("[ 9.0] watchdog: BUG: soft lockup - CPU#1 stuck for 23s! [fio:7]\n[ 9.1] Call Trace:\n"
               "[ 9.5] BUG: unable to handle page fault\n[ 9.6] Call Trace:\n")
        self.assertEqual(checks.trouble(log, checks.KERNEL_TROUBLE),
                         ["[ 9.5] BUG: unable to handle page fault", "[ 9.6] Call Trace:"])

    def test_every_allowed_line_has_a_reason(self) -> None:
        for entry in checks.ALLOWED:
            self.assertGreater(len(entry.reason), 20, entry.pattern)

    def test_backend_errors(self) -> None:
        log = "2026 INFO blkback: error=0 fine\n2026 ERROR blkback: image gone\nthread 'q' panicked at a.rs:1\n"
        self.assertEqual(len(checks.trouble(log, checks.BACKEND_TROUBLE)), 2)

    def test_tolerated(self) -> None:
        self.assertEqual(checks.expect("a b\nc d", ["^a"]), ["c d"])

    def test_hypervisor_complaints(self) -> None:
        log = "(XEN) grant_table.c:803:d0v1 Bad flags (0) or dom (0); expected d0\n(XEN) gnttab_usage_print_all ] done\n"
        self.assertEqual(len(checks.trouble(log, checks.XEN_TROUBLE)), 1)


class Counts(unittest.TestCase):
    TEXT = ("xenstore 40\nports 12\nbackend-fds 9\nBEGIN-XEN\n(XEN) [0x000]  0 0x1 old\n(XEN) gnttab_usage_print_all [ key\n(XEN) grant-table for remote d1 (v1)\n"
            "(XEN) [0x000]      0 0x11e602 0x00000002          0 0x004a02 0x19\n"
            "(XEN) [0x008]      0 0x11e700 0x00000002          0 0x004b02 0x19\n(XEN) no active grant table entries\n")

    def test_parse(self) -> None:
        self.assertEqual(counts.parse(self.TEXT), {"xenstore": 40, "ports": 12, "backend-fds": 9, "grants": 2})

    def test_leaks(self) -> None:
        text = "links 3\nnft-tables 0\nnetback-fds 12\nBEGIN-XEN\n"
        self.assertEqual(counts.parse(text), {"links": 3, "nft-tables": 0, "netback-fds": 12, "grants": 0})
        self.assertEqual(counts.leaks({"a": 1, "b": 2}, {"a": 2, "b": 1, "new": 5}), ["a: 1 → 2"])


class Trace(unittest.TestCase):
    @staticmethod
    def record(event: int, *arguments: int, time: bool = True) -> bytes:
        head = event | len(arguments) << 28 | (1 << 31 if time else 0)
        return struct.pack("<I", head) + (b"\0" * 8 if time else b"") + struct.pack(f"<{len(arguments)}I", *arguments)

    def test_grant_operations_are_summed(self) -> None:
        call = xentrace.GRANT_TABLE_OP | 1 << 20 | 1 << 24
        data = (self.record(0x0001F003, 1, 8, time=False) + self.record(xentrace.HYPERCALL, call, 0, 7)
                + self.record(xentrace.HYPERCALL, call, 5, 2) + self.record(xentrace.SUBCALL, call, 5, 3, time=False)
                + self.record(xentrace.HYPERCALL, xentrace.EVENT_CHANNEL_OP))
        found = xentrace.count(data)
        self.assertEqual((found["map"], found["map calls"], found["copy"], found["copy calls"]), (7, 1, 5, 2))
        self.assertEqual(found["event-channel calls"], 1)

    def test_a_cut_record_ends_it(self) -> None:
        self.assertEqual(list(xentrace.records(self.record(5, 1, 2)[:-2])), [])


class Programs(unittest.TestCase):
    def test_a_folder_or_a_file_with_its_neighbours(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.assertEqual(payload.programs(None), {})
            self.assertEqual(payload.programs(folder), {})
            for program in ("blkback", "netback", "other", "mine"):
                (folder / program).touch()
            self.assertEqual(payload.programs(folder), {"blkback": folder / "blkback", "netback": folder / "netback"})
            self.assertEqual(payload.programs(folder / "blkback"), payload.programs(folder))
            # Any file can be tried in blkback's place.
            self.assertEqual(payload.programs(folder / "mine")["blkback"], folder / "mine")


class Frames(unittest.TestCase):
    """What the sniffing scenarios conclude from bytes."""

    ADDRESSES = bytes.fromhex("ffffffffffff" "00163e000001")

    def test_ipv4(self) -> None:
        frame = self.ADDRESSES + bytes.fromhex("0800" "4500001c" "00000000" "40010000" "0a12004d" "0a1200fe") + bytes(8)
        self.assertEqual(network.ipv4_source(frame), "10.18.0.77")
        self.assertEqual(network.sources([frame, self.ADDRESSES + b"\x08\x06" + bytes(28)]), {"10.18.0.77"})
        self.assertEqual((network.tag(frame), network.ipv6_source(frame)), (0, None))
        self.assertIsNone(network.ipv4_source(frame[:20]))

    def test_tags_and_ipv6(self) -> None:
        self.assertEqual(network.tag(self.ADDRESSES + bytes.fromhex("8100" "219b" "0800")), 0x19B)
        frame = self.ADDRESSES + bytes.fromhex("86dd" "60000000" "00003a40") + network.packed("fd17::99") + network.packed("fd17::1")
        self.assertEqual(network.ipv6_source(frame), "fd17::99")


class Cluster(unittest.TestCase):
    """What the scenario with a shared disk concludes."""

    DONE = ("1 aa /mnt/tree/1/1/node1-1 10.5", "2 bb /mnt/tree/2/0/node1-2 12.0", "3 cc /mnt/tree/3/1/node1-3 40.0")
    CLEAN = ("fsck.ocfs2 1.8.7\nChecking OCFS2 filesystem in /srv/lab/shared.img:\n  Label:              <NONE>\n  Block size:         4096\n"
             "** Skipping slot recovery because -n was given. **\n/srv/lab/shared.img was run with -f, check forced.\n"
             "Pass 0a: Checking cluster allocation chains\nAll passes succeeded.\n\n")

    def setUp(self) -> None:
        scenario.load()
        self.module = sys.modules["scenarios.shared_ocfs2"]
        self.done = [self.module.Entry(line) for line in self.DONE]

    def test_files(self) -> None:
        files = self.module.settled(self.done)
        # The third is one that is removed again.
        self.assertEqual(files, {"/mnt/tree/1/1/node1-1": "aa", "/mnt/tree/2/0/node1-2": "bb"})
        self.assertEqual(self.module.differences(files, {**files, "/mnt/other": "x"}), [])
        found = self.module.differences(files, {"/mnt/tree/1/1/node1-1": "bb"})
        self.assertEqual(len(found), 2, found)
        self.assertEqual(self.module.longest_pause(self.done), 28)

    def test_the_file_that_all_append_to(self) -> None:
        def wrong(*lines: str) -> int:
            return len(self.module.lines("".join(f"{line}\n" for line in lines), {"node1": self.done, "node0": self.done[:1]}))
        self.assertEqual(wrong("node1 1", "node0 1", "node1 2", "node1 3"), 0)
        self.assertEqual(wrong("node1 1", "node0 1", "node1 2", "node1 3", "node1 4"), 0, "one more than was looked at")
        self.assertEqual(wrong("node1 1", "node0 1", "node1 3"), 1, "lost in the middle")
        self.assertEqual(wrong("node1 1", "node0 1", "node1 2"), 1, "lost at the end")
        self.assertEqual(wrong("node1 1", "node0 1", "node1 2", "node1 2", "node1 3"), 1, "twice")
        self.assertEqual(wrong("node1 1", "node1 2", "node1 3"), 1, "all of one writer")
        self.assertEqual(wrong("node1 1", "node0 1node1 2", "node1 3"), 3, "one over the other")

    def test_fsck(self) -> None:
        self.assertEqual(self.module.fsck_complaints(self.CLEAN), [])
        # fsck.ocfs2 -n ends with 0 and this last line whatever it found.
        damaged = self.CLEAN.replace("Pass 0a", "[CHAIN_BITS] Chain 1 in allocator inode 11 has 7556 bits. Fix this? n\nPass 0a")
        self.assertEqual(len(self.module.fsck_complaints(damaged)), 1)
        self.assertEqual(len(self.module.fsck_complaints(self.CLEAN.replace("All passes succeeded.", ""))), 1)


class Mapping(unittest.TestCase):
    def test_bytes_with_data_in_a_range(self) -> None:
        scenario.load()
        text = ('[{"start": 0, "length": 100, "data": true}, {"start": 100, "length": 50, "data": false}, '
                '{"start": 150, "length": 50, "data": true}]')
        allocated = sys.modules["scenarios.nbd_disk"].allocated
        self.assertEqual([allocated(text, *part) for part in ((90, 20), (100, 50), (120, 60), (0, 300))], [10, 0, 30, 150])


class Scenarios(unittest.TestCase):
    def test_all_load(self) -> None:
        found = scenario.load()
        self.assertGreater(len(found), 5)
        for entry in found:
            self.assertTrue(entry.about and set(entry.backends) <= {"kernel", "qdisk", "ours"})

    def test_choose(self) -> None:
        def nothing(lab: object) -> None: ...
        some = [scenario.Scenario("a", "", nothing), scenario.Scenario("b", "", nothing, by_name_only=True),
                scenario.Scenario("q", "", nothing, backends=("qdisk", "kernel"))]
        titles = [run.title for run in scenario.choose(some, [], ["kernel", "ours", "qdisk"])]
        self.assertEqual(titles, ["a[ours]", "q[qdisk]", "a[kernel]", "q[kernel]"])
        self.assertEqual([run.title for run in scenario.choose(some, ["b", "q[qdisk]"], ["kernel", "qdisk"])], ["q[qdisk]", "b[kernel]"])
        self.assertRaises(KeyError, scenario.choose, some, ["nope"], ["kernel"])

    def test_a_name_for_one_world(self) -> None:
        def nothing(lab: object) -> None: ...
        some = [scenario.Scenario(name, "", nothing, worlds=of) for name, of in (("a", ()), ("b", ()), ("new", ("4.20",)))]

        def titles(names: list[str], world: str) -> list[str]:
            return [run.title for run in scenario.choose_in(some, names, world, ["ours"], True)]
        self.assertEqual((titles([], "4.17"), titles([], "4.20")), (["a[ours]", "b[ours]"], ["a[ours]", "b[ours]", "new[ours]"]))
        names = ["a", "b[ours]@4.17"]
        self.assertEqual((titles(names, "4.17"), titles(names, "4.20")), (["a[ours]", "b[ours]"], ["a[ours]"]))
        self.assertEqual((titles(["b@4.17"], "4.20"), titles(["new"], "4.17")), ([], []))
        self.assertRaises(KeyError, titles, ["nope"], "4.17")

    def test_defaults(self) -> None:
        def nothing(lab: object) -> None: ...
        some = [scenario.Scenario("a", "", nothing), scenario.Scenario("m", "", nothing, ("kernel", "qdisk", "ours"), compare=True)]
        self.assertEqual([run.title for run in scenario.choose_default(some, [], True)],
                         ["a[ours]", "m[ours]", "m[kernel]", "m[qdisk]"])
        self.assertEqual([run.title for run in scenario.choose_default(some, ["a"], True)], ["a[ours]"])
        self.assertEqual([run.title for run in scenario.choose_default(some, [], False)], ["m[qdisk]", "a[kernel]", "m[kernel]"])

    def test_the_matrix_has_every_value(self) -> None:
        scenario.load()
        module = sys.modules["scenarios.blkfront_matrix"]
        covered = module.pairs(module.ROWS)
        for position, values in enumerate(([0, 1, 2, 3, 4], [1, 2, 3, 4], [0, 32, 256], [False, True])):
            for value in values:
                self.assertIn((position, value), covered)

    def test_report(self) -> None:
        def nothing(lab: object) -> None: ...
        one = scenario.Scenario("t", "", nothing)
        outcomes = [scenario.Outcome(scenario.Run(one, "kernel"), True, 1.0, "", [("time", "4.0 s")]),
                    scenario.Outcome(scenario.Run(one, "ours"), False, 2.0, "because", [("time", "2.0 s")])]
        text = report.table(outcomes)
        self.assertRegex(text, r"(?m)^t\[ours\]    FAILED       2.0$")
        self.assertIn("because", text)
        self.assertEqual(report.ratios(outcomes), ["t: time: kernel 4, ours 2 (2.00×; follows the host load)"])

    def test_a_column_for_each_world(self) -> None:
        def nothing(lab: object) -> None: ...
        both, new = (scenario.Run(scenario.Scenario(name, "", nothing, worlds=of), "ours") for name, of in (("both", ()), ("new", ("4.20",))))
        self.assertTrue(both.scenario.fits("4.17") and new.scenario.fits("4.20") and not new.scenario.fits("4.17"))
        text = report.table([scenario.Outcome(both, True, 1.0, "", [], "4.17"), scenario.Outcome(both, False, 2.0, "because", [], "4.20"),
                             scenario.Outcome(new, True, 3.0, "", [("figure", "1")], "4.20")], ["4.17", "4.20"])
        self.assertEqual([line.split() for line in text.splitlines()[:3]],
                         [["scenario", "Xen", "4.17", "seconds", "Xen", "4.20", "seconds"],
                          ["both[ours]", "ok", "1.0", "FAILED", "2.0"], ["new[ours]", "-", "ok", "3.0"]])
        self.assertIn("both[ours] on Xen 4.20: because", text)
        self.assertIn("new[ours] on Xen 4.20: figure: 1", text)


class Machines(unittest.TestCase):
    def test_command_line_holds_what_emulation_needs(self) -> None:
        for world in worlds.WORLDS.values():
            images = build.Images(Path("/cache"), world)
            line = " ".join(machine.Machine(images, Path("/cache/payload.img")).command())
            for needed in ("-smap", "-avx", "-rdtscp", "-xsave", "snapshot=on", "lab.control", "tcg", f"/cache/{world.name}/dom0.img",
                           f"-m {world.memory_mb} ", f"dom0_mem={world.dom0_mb}M", f"lab.init={world.init}"):
                self.assertIn(needed, line)
            # QEMU takes a comma for the beginning of the next module.
            self.assertNotIn(",", world.dom0_arguments)

    def test_a_dom0_that_crashes_as_it_boots_is_booted_once_more(self) -> None:
        for crashes, ended, boots in ((0, True, 1), (1, True, 2), (2, True, 2), (1, False, 1)):
            lab = machine.Machine(build.Images(Path("/cache"), worlds.XEN_4_17), Path("/cache/payload.img"))
            tries = []

            def boot(_timeout: float) -> None:
                tries.append(1)
                lab.qemu = types.SimpleNamespace(poll=lambda: 0 if ended else None)
                if len(tries) <= crashes:
                    raise machine.MachineGone("gone")
            lab._boot = boot
            with contextlib.redirect_stdout(io.StringIO()):
                if crashes < boots:
                    lab.start()
                else:
                    self.assertRaises(machine.MachineGone, lab.start)
            self.assertEqual(len(tries), boots)

    def test_a_stale_pid_file_is_no_machine(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.assertIsNone(machine.running_pid(Path(folder)))
            (Path(folder) / "qemu.pid").write_text("1\n")
            self.assertIsNone(machine.running_pid(Path(folder)))


if __name__ == "__main__":
    unittest.main()
