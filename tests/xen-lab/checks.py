"""What makes a run fail although every scenario passed: kernel warnings, hypervisor complaints, backend errors.

Pure functions over log texts. What is let through is listed one by one with its reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Lines of a kernel log (dom0's or a guest's) that fail a run.
KERNEL_TROUBLE = re.compile(
    r"WARNING:|BUG:|Oops|general protection fault|Kernel panic|INFO: task .* blocked for more than"
    r"|rcu: INFO|self-detected stall|Call Trace:|soft lockup|I/O error|Buffer I/O error|EXT4-fs error|bogus|bad ring"
    # netfront's complaints about its backend (drivers/net/xen-netfront.c), and xenbus_dev_error's "vif vif-0: 22 …".
    r"|net eth\d+: (?:Invalid|Bad|bad|rx->|Need|Missing|GSO|Unexpected|Malformed)|vif vif-[\d-]+: \d+ ")
#: Lines of Xen's log that fail a run: a guest or dom0 used a grant or an event channel wrongly, or Xen is ill.
XEN_TROUBLE = re.compile(
    r"\(XEN\).*(Assertion|Xen BUG|Xen WARN|FATAL|Panic|gnttab.*[Bb]ad|Bad grant|bad ref|Bad flags|Unstable TSC|Triple fault"
    r"|grant_table\.c:\d+:d\d+.*(?:[Bb]ad|fail|[Ii]nvalid)|put_page_from|mm\.c:\d+:d\d+.*(?:Bad|Error|fail))")
#: Lines of our backend's log that fail a run (tracing's format: level as a word of its own), and its panics.
BACKEND_TROUBLE = re.compile(r"(?:^|\s)ERROR(?:\s|$)|panicked at")


@dataclass(frozen=True)
class Allowed:
    pattern: str
    reason: str


ALLOWED = [
    Allowed(r"clocksource: .*(?:skew|read-back|watchdog|unstable)",
            "the emulated TSC is read by a thread the host may stop at any time"),
    Allowed(r"rcu: INFO: rcu_\w+ (?:self-)?detected (?:expedited )?stall|rcu: .*detected stalls on CPUs|rcu: INFO: rcu_preempt detected expedited",
            "emulation on a busy host stops a virtual CPU for longer than the 21 s; a hang shows as a time-out"),
    Allowed(r"watchdog: BUG: soft lockup - CPU#\d+ stuck for \d\ds!",
            "as above: 26 s without a turn happen to an emulated CPU when others compile beside it"),
    Allowed(r"\(XEN\).*Unstable TSC", "Xen's remark on the emulated clock"),
    Allowed(r"\(XEN\).*WARNING: .*(?:console|speculat|mitigation|SPEC)", "Xen's remarks on its own command line"),
]


def allowed(line: str) -> Allowed | None:
    """The entry that lets this line through, if there is one."""
    return next((entry for entry in ALLOWED if re.search(entry.pattern, line)), None)


def trouble(text: str, pattern: re.Pattern[str]) -> list[str]:
    """The lines that fail a run. The trace that follows an allowed line belongs to it and is allowed with it."""
    found = []
    forgiven = False
    for line in text.splitlines():
        if allowed(line):
            forgiven = True
        elif forgiven and "Call Trace:" in line:
            forgiven = False
        elif pattern.search(line):
            found.append(line.strip())
    return found


def expect(text: str, tolerated: list[str]) -> list[str]:
    """Lines a scenario did not announce: a test that breaks something on purpose names the noise it makes."""
    return [line for line in text.splitlines() if not any(re.search(pattern, line) for pattern in tolerated)]
