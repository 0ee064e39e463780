# Every target makes its own environment in .venv when it is missing. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-all check format bench sim docs clean

help: ## Show the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(STAMP) ## Make .venv with the tested versions.

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which with PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo,peft]'
	@touch $(STAMP)

demo: $(STAMP) ## Fetch the demonstration model, run a real experiment on two sites, kill one.
	$(BIN)/edif models fetch-demo
	$(BIN)/edif demo

test: $(STAMP) ## The test suite (all but the long fault runs).
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(STAMP) ## Everything, with the long fault runs and random examples; GPU tests where there is a GPU.
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=search $(BIN)/python -m pytest --timeout 1800

check: $(STAMP) ## Formatting, lint, types, import floors.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/tidy

format: $(STAMP) ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## Measure this machine, the mesh and then a runner beside in-process (about 10 minutes); writes docs/benchmarks.md.
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.runner --write

sim: $(STAMP) ## Replay the simulator: make sim SEED=7 STEPS=20000.
	$(BIN)/python -m tests.simulation.run --seeds $(or $(SEED),1) --steps $(or $(STEPS),20000)

docs: $(STAMP) ## Generate docs/protocol.md from the messages, docs/compatibility.md from the nnsight constructs.
	$(BIN)/python -m edif_mesh.wire.docs > docs/protocol.md
	$(BIN)/python -m tests.contract.constructs.page > docs/compatibility.md

clean: ## Remove the environment and what tests and demo left.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis out
