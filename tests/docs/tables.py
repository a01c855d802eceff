"""The tables of README.md that the code owns: checkpoints, settings and metrics.

python -m tests.docs.tables     writes them into README.md; a test holds them equal
"""

from __future__ import annotations

from pathlib import Path

from engine.models.folder_families import FAMILIES
from engine.models.gguf_families import GGUF_FAMILIES
from engine.weights.dequantise import can_dequantise
from engine.weights.gguf import BLOCK_TYPES
from server.metrics import Metrics
from server.settings import SECTIONS, SETTINGS, Setting

README = Path(__file__).parents[2] / "README.md"


# What goes by the name of each family
MODELS = {
    "llama": "Llama 2, 3, 3.1, 3.2 (text), 3.3; SmolLM2; whatever else is built so",
    "mistral": "Mistral",
    "smollm3": "SmolLM3",
    "qwen2": "Qwen2, Qwen2.5, MiMo",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)",
    "phi3": "Phi-3, Phi-3.5, Phi-4",
    "olmo2": "OLMo 2",
    "gpt-oss": "GPT-OSS",
    "llama4": "Llama 4 (text)",
}
_IN_LLAMA = ("mistral", "mixtral")  # families that GGUF files call llama


def checkpoints_table() -> str:
    known = {_plain(family.architecture) for family in GGUF_FAMILIES}
    rows = ["| models | `architectures` of config.json | `general.architecture` of GGUF |", "|---|---|---|"]
    for name, models in MODELS.items():
        classes = ", ".join(f"`{family.architecture}`" for family in FAMILIES if family.name == name)
        in_gguf = "llama" if name in _IN_LLAMA else name
        assert _plain(in_gguf) in known, name
        spelt = next(one.architecture for one in GGUF_FAMILIES if _plain(one.architecture) == _plain(in_gguf))
        rows.append(f"| {models} | {classes} | `{spelt}` |")
    assert {family.name for family in FAMILIES} == set(MODELS)
    types = ", ".join(kind.name for kind in BLOCK_TYPES.values() if can_dequantise(kind))
    return "\n".join([*rows, "", f"GGUF files may hold {types}."])


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "")


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
    tables = {"checkpoints": checkpoints_table(), "settings": settings_table(), "metrics": metrics_table()}
    for name, table in tables.items():
        begin, end = f"<!-- {name}: python -m tests.docs.tables -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}{table}\n{end}{after}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
