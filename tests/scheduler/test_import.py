from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.path.insert(0, ".")
import importlib, pkgutil, scheduler
for module in pkgutil.iter_modules(scheduler.__path__):
    importlib.import_module(f"scheduler.{module.name}")
roots = {name.partition(".")[0] for name in sys.modules}
print(*sorted(roots - set(sys.stdlib_module_names) - {"scheduler", "__main__"}))
"""


def test_the_package_imports_with_the_standard_library_alone() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
