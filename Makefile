# Everything is set up by the first target that needs it:  make serve | make test
#
#   make serve MODEL=… ARGS="--port 9000"    make bench RESULT=result.json
#   make clients CLIENTS=openai,litellm      (all without CLIENTS; tests/clients)
#   PYTHON=…  the interpreter for .venv      TORCH=…  what pip installs torch from; by default CUDA's where
#   there is an NVIDIA driver, else torch without CUDA (docker/install.sh)

PYTHON ?= python3
TORCH ?=
MODEL ?=
ARGS ?=
# Two files at a time, each on one worker, so that what a module's fixture started is started once; in the
# order of tests/conftest.py.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
RESULT ?= tests/bench/results/$(shell date +%Y-%m-%d).json
SEEDS ?= 10000
CLIENTS ?=

VENV := .venv
BIN := $(VENV)/bin
export PYTHON TORCH

.PHONY: install serve test check sim bench clients clean
.DEFAULT_GOAL := install

install: $(VENV)/.installed

# The stamps are newer than what they were made from, or the work is done again.
$(VENV)/.installed: pyproject.toml docker/install.sh
	docker/install.sh $(VENV) --editable
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	EXTRAS=test docker/install.sh $(VENV) --editable
	@touch $@

serve: $(VENV)/.installed
	@exec $(BIN)/octavo serve $(MODEL) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

sim: $(VENV)/.installed
	$(BIN)/python -m scheduler.simulate --seeds $(SEEDS)
	$(BIN)/python -m tests.sim.protocol --seeds $(SEEDS)

bench: $(VENV)/.installed
	$(BIN)/octavo bench --start --workload all --model "$(MODEL)" --json $(RESULT) $(ARGS)

clients: $(VENV)/.installed-test
	$(BIN)/python -m tests.clients.run "$(CLIENTS)"

clean:
	rm -rf $(VENV) .clients build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
