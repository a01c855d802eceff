"""The costs that the scheduler predicts with: from a file, from an earlier start, or measured now.

Earlier measurements lie below the state folder (engine.state), one small JSON file per model, machine and
arithmetic. A file that cannot be used is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from engine.calibration import calibrate
from engine.tiers.identity import device_name
from scheduler.costs import CostModel
from scheduler.machine import load_machine

if TYPE_CHECKING:
    from engine.batch import BatchBuilder
    from engine.kv_storage import KVStorage
    from engine.models.transformer import Transformer
    from scheduler.config import SchedulerConfig

logger = logging.getLogger("octavo.engine")

MEASURE: Final = "measure"  # the value of `costs` that ignores earlier measurements
_FORMAT: Final = 1  # what the figures mean; raised when the cost model changes


def measured_costs(
    costs: str,
    identity: bytes,
    model: Transformer,
    storage: KVStorage,
    batches: BatchBuilder,
    settings: SchedulerConfig,
    folder: Path | None,
) -> CostModel:
    """`costs` is the setting: "", "measure" or the path of a machine file. `identity`: what `kv_identity`
    gives. `folder` is where state is kept; None: nowhere. Call it while no page is in use.

    Raises MachineError, one line, for a machine file that cannot be used.
    """
    if costs and costs != MEASURE:
        return load_machine(Path(costs).expanduser()).costs
    path = folder / "costs" / f"{_file_name(identity, storage)}.json" if folder else None
    if path is not None and not costs and (known := _read(path)) is not None:
        logger.debug("costs of steps from %s: %s", path, known)
        return known
    found = calibrate(model, storage, batches, settings.max_num_seqs, settings.max_num_batched_tokens)
    logger.info(
        "costs of steps, from %d kinds of them in %.2f s, off by %.0f %%: %s",
        found.num_steps,
        found.seconds,
        100 * found.usual_error,
        found.costs,
    )
    if path is not None and found.steady:
        _write(path, found.costs)
    return found.costs


def _file_name(identity: bytes, storage: KVStorage) -> str:
    machine = repr((_FORMAT, device_name(storage.keys[0].device), torch.get_num_threads())).encode()
    return hashlib.sha256(identity + machine).hexdigest()[:32]


def _read(path: Path) -> CostModel | None:
    names = {field.name for field in fields(CostModel)}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is not used, costs are measured again: %s", path, error)
        return None
    if not (isinstance(document, dict) and set(document) == names and all(map(_is_cost, document.values()))):
        logger.warning("%s is not used, costs are measured again: it holds no cost model", path)
        return None
    return replace(CostModel(), **document)


def _is_cost(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0


def _write(path: Path, costs: CostModel) -> None:
    """Whole or not at all: two engines may start at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False) as file:
            json.dump(asdict(costs), file, indent=1)
        try:
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink()
            raise
    except OSError as error:
        logger.info("the measured costs are not kept: %s", error)
