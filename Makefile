PYTHON ?= python3
BIN := .venv/bin
CORPUS := data/stdlib
export PYTHONSAFEPATH := 1
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-all test-fast check docs bench clean

# The environment: made anew when its description changes.
$(BIN)/.installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "$(PYTHON) is Python %d.%d; the pinned packages are there for 3.11, 3.12 and 3.13: name one of these, such as make PYTHON=python3.12" % sys.version_info[:2])'
	@echo 'installing the packages of constraints.txt into .venv: 0.6 GB to download with the CPU build of torch, 2.9 GB with the CUDA build, which package indexes have by default'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

$(CORPUS).json: | $(BIN)/.installed
	$(BIN)/lsys data prepare stdlib --out $(CORPUS)

# Two ranks learn the source of Python's standard library.
train: $(BIN)/.installed $(CORPUS).json
	$(BIN)/torchrun --standalone --nproc-per-node 2 -m lsys train configs/quickstart.yaml

# Of the tests that take many ranks or long, test takes a quarter of the cases, the next one at each commit, so that four take all; test-all takes all, test-fast none.
test: $(BIN)/.installed
	$(BIN)/python -m pytest --slow sample

test-all: $(BIN)/.installed
	$(BIN)/python -m pytest

test-fast: $(BIN)/.installed
	$(BIN)/python -m pytest -m "not slow"

# Style, types, and that imports go down only.
check: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(BIN)/.installed $(CORPUS).json
	$(BIN)/python bench/step.py configs/quickstart.yaml

docs: $(BIN)/.installed
	$(BIN)/python -m lsys.config.reference docs/configuration.md

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
