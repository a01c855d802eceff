"""From the start of `octavo serve` to readiness and to the first token, imports included.

python -m tests.bench.cold_start [--runs 5]
"""

from __future__ import annotations

import argparse
import statistics
import time

import httpx

from tests.e2e.daemon import Daemon


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    ready_s, token_s = [], []
    for _ in range(parser.parse_args().runs):
        daemon = Daemon()
        try:
            daemon.wait_ready()
            ready_s.append(time.monotonic() - daemon.started_s)
            body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1}
            httpx.post(f"{daemon.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
            token_s.append(time.monotonic() - daemon.started_s)
        finally:
            daemon.kill()
    for name, values in (("ready", ready_s), ("first token", token_s)):
        middle = statistics.median(values)
        print(f"{name:<12} median {middle:.2f} s  min {min(values):.2f}  max {max(values):.2f}")


if __name__ == "__main__":
    main()
