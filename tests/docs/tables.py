"""The tables of README.md that the code owns: settings and metrics.

python -m tests.docs.tables     writes them into README.md; a test holds them equal
"""

from __future__ import annotations

from pathlib import Path

from server.metrics import Metrics
from server.settings import SECTIONS, SETTINGS, Setting

README = Path(__file__).parents[2] / "README.md"


def settings_table() -> str:
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for section in SECTIONS:
        rows.append(f"| **[{section}]** | | |")
        of_section = (setting for setting in SETTINGS.values() if setting.section == section)
        rows += [f"| `{s.name}` | {_default(s)} | {s.help} |" for s in of_section]
    return "\n".join(rows)


def _default(setting: Setting) -> str:
    if setting.default in ("", ()):
        return ""
    if setting.kind is bool:
        return "on" if setting.default else "off"
    value = ",".join(setting.default) if setting.kind is tuple else str(setting.default)
    return f"`{value}`"


def metrics_table() -> str:
    rows = ["| metric | type | meaning |", "|---|---|---|"]
    for family in sorted(Metrics("").registry.collect(), key=lambda family: family.name):
        name = family.name + ("_total" if family.type == "counter" else "")
        rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(rows)


def with_tables(text: str) -> str:
    """README's text with its tables as the code has them. Raises ValueError where a marker lacks."""
    for name, table in (("settings", settings_table()), ("metrics", metrics_table())):
        begin, end = f"<!-- {name}: python -m tests.docs.tables -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}{table}\n{end}{after}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
