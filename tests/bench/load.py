"""Load time and peak memory of the default model, by the format that its weights are stored in.

    python -m tests.bench.load [--runs 5] [--dtype bfloat16] [--threads 0] [--only GPTQ]

Other formats than the shipped one are made of it first, in a temporary folder. Each load has a process of its
own; formats take turns, so that a busy minute is shared. Files are in the page cache: the first round is not
counted. Peak: the high-water mark of resident memory above that before the load, in MB; beside it what of it
are the weights themselves. Error: of the weights against those of F32, relative, by their squares.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from engine.checkpoint import locate
from engine.sizing import available_cores
from engine.weights.loader import load_weights
from tests.bench.requantised import FOLDER_KINDS, write_folder_as, write_gguf
from tests.engine.weights.folder import write_folder

CPU = torch.device("cpu")
SHIPPED, EXACT = "GGUF Q4_1, as shipped", "safetensors F32"
GGUF_KINDS = ("F16", "Q8_0", "Q4_0")


def make(folder: Path, only: str) -> dict[str, str]:
    """Name of a format -> what to load, for names that contain `only`; and F32, as a folder."""
    shipped, base = locate(""), folder / "F32"
    write_folder(shipped, base)
    sources = {SHIPPED: "", EXACT: str(base)}
    for kind in GGUF_KINDS:
        name, path = f"GGUF {kind}", folder / f"{kind}.gguf"
        if only in name:
            write_gguf(shipped.path, path, kind)
            sources[name] = str(path)
    for kind in FOLDER_KINDS:
        name, path = kind if " " in kind else f"safetensors {kind}", folder / kind.replace(" ", "-")
        if only in name:
            write_folder_as(base, path, kind)
            sources[name] = str(path)
    return sources


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def load_one(source: str, dtype: torch.dtype) -> None:
    """In a process of its own: prints what one load took."""
    checkpoint = locate(source)
    torch.zeros(8).to(dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before, started = status_bytes("VmRSS:"), time.perf_counter()
    weights = load_weights(checkpoint, dtype, CPU)
    took_s = time.perf_counter() - started
    peak = status_bytes("VmHWM:") - before
    kept = sum(tensor.nbytes for tensor in weights.values())
    print(json.dumps({"s": took_s, "peak": peak, "kept": kept, "stored": checkpoint.size_bytes}))


def measure(source: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.load", "--one", source, "--dtype", arguments.dtype]
    done = subprocess.run(
        [*command, "--threads", str(arguments.threads)], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def error(source: str, exact: dict[str, torch.Tensor]) -> float:
    weights = load_weights(locate(source), torch.float32, CPU)
    wrong = sum(float((weights[name] - tensor).square().sum()) for name, tensor in exact.items())
    return (wrong / sum(float(tensor.square().sum()) for tensor in exact.values())) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core, as the engine has")
    parser.add_argument("--only", default="", help="formats whose names contain this")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or available_cores())
    if arguments.one is not None:
        load_one(arguments.one, getattr(torch, arguments.dtype))
        return
    with tempfile.TemporaryDirectory() as folder:
        every = make(Path(folder), arguments.only)
        sources = {name: source for name, source in every.items() if arguments.only in name}
        rounds = [
            {name: measure(source, arguments) for name, source in sources.items()}
            for _ in range(arguments.runs + 1)
        ][1:]
        exact = load_weights(locate(every[EXACT]), torch.float32, CPU)
        print(
            f"{'format':<24}{'stored':>8}{'load s':>9}{'min':>7}{'max':>7}{'peak':>8}{'kept':>8}{'error':>10}"
        )
        for name, source in sources.items():
            times = [round[name]["s"] for round in rounds]
            sizes = [rounds[0][name]["stored"], max(r[name]["peak"] for r in rounds), rounds[0][name]["kept"]]
            stored, peak, kept = (size / 1e6 for size in sizes)
            print(
                f"{name:<24}{stored:>8.1f}{statistics.median(times):>9.2f}{min(times):>7.2f}{max(times):>7.2f}"
                f"{peak:>8.1f}{kept:>8.1f}{error(source, exact):>10.1e}"
            )


if __name__ == "__main__":
    main()
