"""KV pages beyond the device: host memory, a file, and the copies between them.

Which page goes where is the scheduler's decision (`scheduler.plan.Copy`); here it is carried out.
"""

from __future__ import annotations

from engine.tiers.copier import Copier
from engine.tiers.disk import DiskFile, DiskUnavailable, open_disk_file
from engine.tiers.host import HostPool
from engine.tiers.identity import kv_identity
from engine.tiers.measure import PageCosts, measure_copies

__all__ = [
    "Copier",
    "DiskFile",
    "DiskUnavailable",
    "HostPool",
    "PageCosts",
    "kv_identity",
    "measure_copies",
    "open_disk_file",
]
