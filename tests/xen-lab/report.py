"""The table at the end."""

from __future__ import annotations

from scenario import Outcome


def table(outcomes: list[Outcome], worlds: list[str] | None = None) -> str:
    """Scenarios down, worlds across, result and seconds in each cell; figures below; reasons of failures last, where the
    eye ends up."""
    worlds = worlds or list(dict.fromkeys(outcome.world for outcome in outcomes))
    titles = list(dict.fromkeys(outcome.run.title for outcome in outcomes))
    cells = {(outcome.run.title, outcome.world): f"{'ok' if outcome.passed else 'FAILED':<6}  {outcome.seconds:8.1f}"
             for outcome in outcomes}
    width = max([len(title) for title in titles] + [8])
    lines = [f"{'scenario':<{width}}" + "".join(f"  {'Xen ' + world:<8} {'seconds':>7}" for world in worlds)]
    for title in titles:
        lines.append(f"{title:<{width}}" + "".join(f"  {cells.get((title, world), '-'):<16}" for world in worlds).rstrip())

    def name(outcome: Outcome) -> str:
        return f"{outcome.run.title} on Xen {outcome.world}" if len(worlds) > 1 else outcome.run.title
    notes = [(name(outcome), what, value) for outcome in outcomes for what, value in outcome.notes]
    if notes:
        lines += ["", "figures (emulated: only counts and ratios mean anything)"]
        lines += [f"  {title}: {what}: {value}" for title, what, value in notes]
    for outcome in outcomes:
        if not outcome.passed:
            lines += ["", f"{name(outcome)}: {outcome.why}"]
    return "\n".join(lines)


def ratios(outcomes: list[Outcome], base: str = "kernel", other: str = "ours") -> list[str]:
    """Figures that one scenario reported for two backends in the same boot, as a ratio.

    Not those in plain seconds unless the host was idle, which nobody knows: they are marked.
    """
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    units: dict[tuple[str, str, str], str] = {}
    for outcome in outcomes:
        for name, value in outcome.notes:
            key = outcome.world, outcome.run.scenario.name, name
            units[key] = "".join(value.split()[1:2])
            try:
                number = float(value.split()[0])
            except (ValueError, IndexError):
                continue
            values.setdefault(key, {})[outcome.run.backend] = number
    several = len({outcome.world for outcome in outcomes}) > 1
    lines = []
    for key, by_backend in values.items():
        world, scenario, name = key
        if units[key] in ("s", "CPU-s", "") and base in by_backend and other in by_backend and by_backend[other]:
            wall = units[key] == "s"
            lines.append(f"{'Xen ' + world + ': ' if several else ''}{scenario}: {name}: {base} {by_backend[base]:g}, "
                         f"{other} {by_backend[other]:g} ({by_backend[base] / by_backend[other]:.2f}×"
                         f"{'; follows the host load' if wall else ''})")
    return lines
