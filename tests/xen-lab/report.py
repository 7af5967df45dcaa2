"""The table at the end."""

from __future__ import annotations

from scenario import Outcome


def table(outcomes: list[Outcome]) -> str:
    """Scenario, result, seconds; figures below; reasons of failures last, where the eye ends up."""
    width = max([len(outcome.run.title) for outcome in outcomes] + [8])
    lines = [f"{'scenario':<{width}}  result  seconds"]
    for outcome in outcomes:
        lines.append(f"{outcome.run.title:<{width}}  {'ok' if outcome.passed else 'FAILED':<6}  {outcome.seconds:7.1f}")
    notes = [(outcome.run.title, name, value) for outcome in outcomes for name, value in outcome.notes]
    if notes:
        lines += ["", "figures (emulated: only counts and ratios mean anything)"]
        lines += [f"  {title}: {name}: {value}" for title, name, value in notes]
    for outcome in outcomes:
        if not outcome.passed:
            lines += ["", f"{outcome.run.title}: {outcome.why}"]
    return "\n".join(lines)


def ratios(outcomes: list[Outcome], base: str = "kernel", other: str = "ours") -> list[str]:
    """Figures that one scenario reported for two backends in the same boot, as a ratio.

    Not those in plain seconds unless the host was idle, which nobody knows: they are marked.
    """
    values: dict[tuple[str, str], dict[str, float]] = {}
    units: dict[tuple[str, str], str] = {}
    for outcome in outcomes:
        for name, value in outcome.notes:
            units[outcome.run.scenario.name, name] = "".join(value.split()[1:2])
            try:
                number = float(value.split()[0])
            except (ValueError, IndexError):
                continue
            values.setdefault((outcome.run.scenario.name, name), {})[outcome.run.backend] = number
    lines = []
    for (scenario, name), by_backend in values.items():
        if units[scenario, name] in ("s", "CPU-s", "") and base in by_backend and other in by_backend and by_backend[other]:
            wall = units[scenario, name] == "s"
            lines.append(f"{scenario}: {name}: {base} {by_backend[base]:g}, {other} {by_backend[other]:g} "
                         f"({by_backend[base] / by_backend[other]:.2f}×{'; follows the host load' if wall else ''})")
    return lines
