"""Unit tests of what needs no machine: `python3 -m unittest discover -s tests/kernels-lab`."""

from __future__ import annotations

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import images  # noqa: E402
import kernels  # noqa: E402
import run  # noqa: E402
import table  # noqa: E402


class Table(unittest.TestCase):
    OUTCOMES = {"a": {"x": {"outcome": "ok"}, "y": {"outcome": "FAILED", "failures": ["flush: none"], "seconds": 3}},
                "b": {"y": {"outcome": "FAILED", "failures": ["flush: none"]}}}

    def test_kernels_across_cells_down_and_each_sentence_once(self) -> None:
        text = table.markdown(self.OUTCOMES, ["x", "y"])
        self.assertIn("| x | ok | not run |\n| y | FAILED | FAILED |", text)
        self.assertEqual(text.count("flush: none"), 1)
        self.assertIn("- y (a, b): flush: none", text)

    def test_what_did_not_run_has_failed(self) -> None:
        self.assertEqual(table.failed(self.OUTCOMES, ["x", "y"]), ["y on a", "x on b", "y on b"])

    def test_a_line_names_failures(self) -> None:
        self.assertEqual(table.line("y", self.OUTCOMES["a"]["y"]), "FAILED  y, 3 s\n          flush: none")


class Cells(unittest.TestCase):
    def test_names_are_unique_and_the_short_ones_exist(self) -> None:
        names = run.names()
        self.assertEqual(len(names), len(set(names)))
        self.assertGreater(len(names), 30)
        self.assertLessEqual(set(run.SHORT_CELLS), set(names))
        self.assertLessEqual(set(run.SHORT_KERNELS), {kernel.name for kernel in kernels.KERNELS})

    def test_modules_are_chosen_with_what_they_need(self) -> None:
        table = ("kernel/fs/nfs/nfsv4.ko.xz: kernel/net/dns/dns.ko.xz kernel/fs/nfs/nfs.ko.xz\nkernel/fs/nfs/nfs.ko.xz:\n"
                 "kernel/net/dns/dns.ko.xz:\nkernel/drivers/gpu/other.ko.xz:\nkernel/drivers/net/tun.ko:\n")
        self.assertEqual(images.chosen(table, ["kernel/fs/nfs/", "kernel/drivers/net/tun.ko"]),
                         ["kernel/fs/nfs/nfsv4.ko.xz", "kernel/net/dns/dns.ko.xz", "kernel/fs/nfs/nfs.ko.xz", "kernel/drivers/net/tun.ko"])


if __name__ == "__main__":
    unittest.main()
