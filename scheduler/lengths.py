"""Output lengths, learned online from the sequences that ended.

There is one histogram of everything, one per request class (prompt lengths between powers of four) and one
per tenant and class. Each takes the next coarser one for its prior, and one with too few observations is not
asked at all. All bounds on memory are named below.

Tenants are kept under pseudonyms: what a client calls itself is not written to a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from scheduler.gittins import GittinsIndex
from scheduler.length_histogram import EDGES, MAX_WEIGHT, PRIOR, Histogram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIN_SEEN = 100  # observations from which a histogram is used
MAX_STALENESS = 0.05  # of the weight: what may be new before a distribution is made again
MAX_TENANTS = 128  # with histograms of their own; the least recently seen is forgotten
MAX_INDICES = 64  # kept ready; the least recently used is made again when asked for
NUM_CLASSES = 12
MAX_FILE_BYTES = 64 << 20

ALL = -1  # instead of a class; the tenant of all is ""
_VERSION = 1


def request_class(prompt_len: int) -> int:
    """Class k holds the prompts of 4**k .. 4**(k + 1) - 1 tokens."""
    return min((max(prompt_len, 1).bit_length() - 1) // 2, NUM_CLASSES - 1)


@lru_cache(maxsize=4 * MAX_TENANTS)
def pseudonym(tenant: str) -> str:
    return hashlib.blake2b(tenant.encode(errors="surrogatepass"), digest_size=8).hexdigest() if tenant else ""


@dataclass(frozen=True, slots=True)
class _Built:
    histogram: Histogram
    until: float  # observations of the histogram from which this is stale
    masses: tuple[float, ...]
    index: GittinsIndex


class Lengths:
    """Histograms, and what was made of them. For one thread."""

    def __init__(self) -> None:
        self._shared: dict[int, Histogram] = {ALL: Histogram()}
        self._tenants: OrderedDict[str, dict[int, Histogram]] = OrderedDict()
        self._built: OrderedDict[tuple[str, int], _Built] = OrderedDict()

    def observe(self, tenant: str, prompt_len: int, num_output: int, natural: bool) -> None:
        """A sequence ended after `num_output` tokens; if not `natural`, it was cut there."""
        if not num_output and not natural:
            return
        number = request_class(prompt_len)
        self._shared[ALL].add(num_output, natural)
        self._shared.setdefault(number, Histogram()).add(num_output, natural)
        if tenant:
            self._histograms_of(pseudonym(tenant)).setdefault(number, Histogram()).add(num_output, natural)

    def index(self, tenant: str, prompt_len: int) -> GittinsIndex:
        """Of the finest histogram that has enough data. Ask again rather than keep it: it ages."""
        name, number = pseudonym(tenant), request_class(prompt_len)
        for key in ((name, number), ("", number)):
            built = self._built_for(key)
            if built is not None:
                return built.index
        return self._build(("", ALL), self._shared[ALL]).index

    def copy(self) -> Lengths:
        """What is known now, without what was made of it: for another thread to save."""
        copied = Lengths()
        copied._shared = {number: histogram.copy() for number, histogram in self._shared.items()}
        for tenant, histograms in self._tenants.items():
            copied._tenants[tenant] = {number: histogram.copy() for number, histogram in histograms.items()}
        return copied

    def to_json(self) -> Iterator[str]:
        """The pieces of a document for `from_json`, each made in a fraction of a millisecond."""
        yield json.dumps({"version": _VERSION, "edges": EDGES})[:-1] + ', "histograms": ['
        between = ""
        for tenant, histograms in (("", self._shared), *self._tenants.items()):
            for number, histogram in histograms.items():
                entry = {"tenant": tenant, "class": number, **_counts_to_json(histogram)}
                yield between + json.dumps(entry)
                between = ",\n"
        yield "]}"

    @classmethod
    def from_json(cls, value: object) -> Lengths:
        """Raises ValueError for anything that `to_json` cannot have made, or made with other bins."""
        if not isinstance(value, dict) or value.get("version") != _VERSION:
            raise ValueError(f"not learned lengths of version {_VERSION}")
        if value.get("edges") != list(EDGES):
            raise ValueError("the bins are others than this version's")
        entries = value.get("histograms")
        if not isinstance(entries, list):
            raise ValueError("there are no histograms")
        lengths = cls()
        for entry in entries:
            tenant, number, histogram = _entry_from_json(entry)
            (lengths._histograms_of(tenant) if tenant else lengths._shared)[number] = histogram
        return lengths

    def save(self, path: Path, pause: Callable[[], object] = lambda: None) -> None:
        """Replaces the file as a whole. Raises OSError. `pause` is called again and again."""
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with beside.open("w", encoding="utf-8") as file:
                for piece in self.to_json():
                    file.write(piece)
                    pause()
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()

    @classmethod
    def load(cls, path: Path) -> tuple[Lengths, str | None]:
        """What was saved; or, when the file cannot be used, the prior and the reason. A missing file is no
        reason to complain. Never raises."""
        try:
            with path.open("rb") as file:
                text = file.read(MAX_FILE_BYTES + 1)
            if len(text) > MAX_FILE_BYTES:
                return cls(), f"{path} is larger than {MAX_FILE_BYTES} bytes"
            return cls.from_json(json.loads(text)), None
        except FileNotFoundError:
            return cls(), None
        except (OSError, ValueError, RecursionError) as error:
            return cls(), f"{path} cannot be used: {error}"

    def _histograms_of(self, name: str) -> dict[int, Histogram]:
        histograms = self._tenants.setdefault(name, {})
        self._tenants.move_to_end(name)
        if len(self._tenants) > MAX_TENANTS:
            self._tenants.popitem(last=False)
        return histograms

    def _built_for(self, key: tuple[str, int]) -> _Built | None:
        """None if the key's histogram has too few observations."""
        tenant, number = key
        histogram = (self._tenants.get(tenant, {}) if tenant else self._shared).get(number)
        if histogram is None or histogram.num_seen < MIN_SEEN:
            return None
        return self._build(key, histogram)

    def _build(self, key: tuple[str, int], histogram: Histogram) -> _Built:
        built = self._built.get(key)
        if built is None or built.histogram is not histogram or histogram.num_seen >= built.until:
            masses = histogram.masses(self._prior_of(key))
            until = histogram.num_seen + max(1.0, MAX_STALENESS * histogram.weight)
            built = self._built[key] = _Built(histogram, until, masses, GittinsIndex(EDGES, masses))
            if len(self._built) > MAX_INDICES:
                self._built.popitem(last=False)
        self._built.move_to_end(key)
        return built

    def _prior_of(self, key: tuple[str, int]) -> tuple[float, ...]:
        tenant, number = key
        if tenant:
            coarser = self._built_for(("", number))
            if coarser is not None:
                return coarser.masses
        return PRIOR if key == ("", ALL) else self._build(("", ALL), self._shared[ALL]).masses


def _counts_to_json(histogram: Histogram) -> dict[str, list[float]]:
    ended, cut = histogram.counts()
    return {"ended": [_short(count) for count in ended], "cut": [_short(count) for count in cut]}


def _short(count: float) -> float:
    return float(f"{count:.4g}")


def _entry_from_json(entry: object) -> tuple[str, int, Histogram]:
    if not isinstance(entry, dict):
        raise ValueError("a histogram is not an object")
    tenant, number = entry.get("tenant"), entry.get("class")
    if not isinstance(tenant, str) or not isinstance(number, int):
        raise ValueError("a histogram is of no tenant or class")
    if not (0 <= number < NUM_CLASSES or (number == ALL and not tenant)):
        raise ValueError(f"there is no class {number}")
    histogram = Histogram(_counts_from_json(entry.get("ended")), _counts_from_json(entry.get("cut")))
    if histogram.weight > MAX_WEIGHT:  # beside it the prior would vanish in rounding errors
        raise ValueError(f"a histogram weighs {histogram.weight:.4g}")
    return tenant, number, histogram


def _counts_from_json(counts: object) -> list[float]:
    if not isinstance(counts, list) or len(counts) != len(EDGES):
        raise ValueError("a histogram has not one count per bin")
    for count in counts:
        if not isinstance(count, int | float) or not 0.0 <= count <= MAX_WEIGHT:
            raise ValueError(f"a count is {count!r}")
    return [float(count) for count in counts]
