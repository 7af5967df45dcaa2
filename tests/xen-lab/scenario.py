"""What a scenario is, and how scenarios are found, chosen and put in order.

A scenario file in scenarios/ holds one or several `Scenario(...)` values; nothing has to be registered. A scenario
says for which backends it makes sense; it is run once per chosen backend, all in one boot: switching the backend is
loading or unloading one module, a boot is half a minute.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from lab import Lab

FOLDER = Path(__file__).resolve().parent / "scenarios"


@dataclass(frozen=True)
class Scenario:
    name: str
    about: str
    run: Callable[[Lab], None]
    #: Backends it can run with. qdisk needs a QEMU process per guest and has fewer features, so it is opted into.
    backends: tuple[str, ...] = ("kernel", "ours")
    #: Regular expressions for log lines this scenario causes on purpose.
    tolerated: tuple[str, ...] = ()
    #: Left out unless named (experiments).
    by_name_only: bool = False
    #: Measures something: with our binary, the stock backends run it too, in the same boot.
    compare: bool = False
    #: Is about interfaces: ours then means netback and bridge-scripts, which must have been built.
    network: bool = False
    #: Lower runs earlier.
    order: int = 50
    #: Kernels (worlds.py) of its guests besides dom0's; those of the scenarios that run are fetched.
    kernels: tuple[str, ...] = ()
    #: The worlds (worlds.py) that have what it needs; empty means all.
    worlds: tuple[str, ...] = ()

    def fits(self, world: str) -> bool:
        return not self.worlds or world in self.worlds


@dataclass(frozen=True)
class Run:
    """One scenario with one backend."""

    scenario: Scenario
    backend: str

    @property
    def title(self) -> str:
        return f"{self.scenario.name}[{self.backend}]"


def load(folder: Path = FOLDER) -> list[Scenario]:
    """Every Scenario in every file of the folder, in order, then by name. Two of one name are a mistake."""
    found: dict[str, Scenario] = {}
    for file in sorted(folder.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"scenarios.{file.stem}", file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        for value in vars(module).values():
            if isinstance(value, Scenario) and found.setdefault(value.name, value) is not value:
                raise ValueError(f"{file.name}: there are two scenarios named {value.name}")
    return sorted(found.values(), key=lambda scenario: (scenario.order, scenario.name))


def choose_in(scenarios: list[Scenario], names: list[str], world: str, backends: list[str], binary: bool) -> list[Run]:
    """The runs in one world. A name may end in `@WORLD`, and is then for that world only; no backends means the defaults."""
    here = [name for name, _, only in (name.partition("@") for name in names) if not only or only == world]
    if names and not here:
        return []
    runs = choose(scenarios, here, backends) if backends else choose_default(scenarios, here, binary)
    return [run for run in runs if run.scenario.fits(world)]


def choose_default(scenarios: list[Scenario], names: list[str], binary: bool) -> list[Run]:
    """Without a choice of backends: with our binary everything on ours and what is to be compared on the stock ones;
    without it the stock ones, as far as a scenario supports them."""
    if not binary:
        return choose(scenarios, names, ["kernel", "qdisk"])
    runs = choose(scenarios, names, ["ours"])
    compared = [run for run in runs if run.scenario.compare]
    # What is compared is run one after the other, so that the host's load has little time to change.
    return [run for run in runs if not run.scenario.compare] + [
        Run(run.scenario, backend) for run in compared for backend in ("ours", "kernel", "qdisk")
        if backend in run.scenario.backends]


def choose(scenarios: list[Scenario], names: list[str], backends: list[str]) -> list[Run]:
    """The runs asked for: `name` or `name[backend]`; no names means all that are not by_name_only.

    Backend by backend, the kernel's last: with our binary the machine has then never loaded xen-blkback while ours
    served. An unknown name is an error, not an empty run.
    """
    wanted: dict[str, set[str]] = {}
    for name in names:
        plain, _, rest = name.partition("[")
        wanted.setdefault(plain, set()).update({rest.rstrip("]")} if rest else set())
    unknown = set(wanted) - {scenario.name for scenario in scenarios}
    if unknown:
        raise KeyError(f"no scenario named {', '.join(sorted(unknown))}; there are: "
                       + ", ".join(scenario.name for scenario in scenarios))
    runs = []
    for backend in sorted(backends, key=["ours", "qdisk", "kernel"].index):
        for scenario in scenarios:
            if names and scenario.name not in wanted or not names and scenario.by_name_only:
                continue
            only = wanted.get(scenario.name)
            if backend in scenario.backends and (not only or backend in only):
                runs.append(Run(scenario, backend))
    return runs


@dataclass
class Outcome:
    """How a run went."""

    run: Run
    passed: bool
    seconds: float
    why: str = ""
    notes: list[tuple[str, str]] = field(default_factory=list)
    world: str = ""
