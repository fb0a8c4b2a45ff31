# make quickstart   sets everything up and runs the demonstration: no download of data or weights
# make demo-d3d     the same for D3D: labels that only motion tells
# make test         sets everything up and runs the tests
# make check        format, lint and types
#
# The virtual environment is .venv here; PYTHON=python3.12 chooses another interpreter, VENV=/path another place.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two workers for the tests, one thread each: more threads than cores only slow them down.
TEST_WORKERS ?= 2

.PHONY: setup quickstart demo-d3d test check format clean

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/distinit quickstart

demo-d3d: $(STAMP)
	$(BIN)/distinit demo-d3d

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
