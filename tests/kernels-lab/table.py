"""The table: kernels across, cells down. Pure functions over what main.py said."""

from __future__ import annotations

Outcomes = dict[str, dict[str, dict]]       # kernel's release → cell → what main.py said of it


def markdown(outcomes: Outcomes, cells: list[str]) -> str:
    """The table, and below it a sentence for each cell that is not plainly "ok"."""
    releases = list(outcomes)
    lines = ["| | " + " | ".join(f"Linux {release}" for release in releases) + " |", "|---" * (len(releases) + 1) + "|"]
    for cell in cells:
        words = [word(outcomes[release].get(cell)) for release in releases]
        lines.append(f"| {cell} | " + " | ".join(words) + " |")
    text = "\n".join(lines) + "\n"
    said: dict[tuple[str, str], list[str]] = {}
    for release in releases:
        for cell in cells:
            result = outcomes[release].get(cell)
            for failure in (result or {}).get("failures", []):
                said.setdefault((cell, failure), []).append(release)
    if said:
        text += "\n" + "".join(f"- {cell} ({', '.join(where)}): {failure}\n" for (cell, failure), where in said.items())
    return text


def word(result: dict | None) -> str:
    return "not run" if result is None else result["outcome"]


def line(cell: str, result: dict) -> str:
    """One cell on one line of the terminal."""
    facts = ", ".join(f"{name}: {value}" for name, value in result.get("facts", {}).items())
    text = f"{result['outcome']:7} {cell}, {result.get('seconds', 0)} s" + (f" ({facts})" if facts else "")
    return "\n".join([text, *(f"          {failure}" for failure in result.get("failures", []))])


def failed(outcomes: Outcomes, cells: list[str]) -> list[str]:
    """What is neither ok nor refused, a cell that did not run among it."""
    return [f"{cell} on {release}" for release, found in outcomes.items() for cell in cells
            if word(found.get(cell)) not in ("ok", "refused")]
