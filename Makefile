# Every target sets itself up on a machine with python3 (3.10 or newer), git, g++ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*)

.PHONY: demo test test-fast lint bench clean

demo: $(READY)
	$(BIN)/python examples/ani_demo.py demo

test: $(READY)
	$(BIN)/python -m pytest

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/run.py

$(READY): pyproject.toml setup.py constraints.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel pybind11
	OPDKERNELS_REQUIRE_C=1 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[hub,triton,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist demo opdkernels/*.so *.egg-info
