# make demo: the main job on a small real model and real data.   make demo-gguf: the same on the file that llama.cpp runs.
# make test: the tests.   make quick: a minute of them.
PYTHON ?= python3
BIN := .venv/bin
# Two processes of one thread each: the tests are many small models, not a few large ones. A process that has nothing
# left to do takes tests from the other.
PYTEST := -m pytest -n 2 --dist worksteal
# Compiled files are kept: each process of the tests, and each that a test starts, would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE
NUMERIC := tests/kernels tests/merging tests/methods/test_prefix.py tests/methods/test_bottleneck.py

.PHONY: demo demo-gguf test quick lint types docstrings numerics docs package extras lowest newest fuzz kills clean

# The stamp is younger than the files that say what to install, or the installation runs again.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.installed
	$(BIN)/python examples/demo.py

# pip install "llama-cpp-python>=0.3.16" into .venv first, and llama.cpp itself answers.
demo-gguf: .venv/.installed
	$(BIN)/python examples/demo_gguf.py

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# Every test once, with the first of its parameters, less the slow ones.
quick: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m quick

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types docstrings

types: .venv/.installed
	$(BIN)/mypy

# The documentation as a site in build/site; a link that leads nowhere is an error.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docstrings: .venv/.installed
	$(BIN)/ruff check --select D100,D101,D102,D103,D104 adapters_kit

# The tests that compare numbers, as three kinds of CPU compute them: torch's own kernels and oneDNN's are held to an
# older instruction set. What this machine lacks cannot be shown on it: the last is the machine itself.
numerics: .venv/.installed
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(NUMERIC)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(NUMERIC)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(NUMERIC)

# The wheel and the source distribution: built, checked, and the tests of the latter collected.
package: .venv/.installed
	.ci/package

# The tests of what needs more packages than the others, in an environment of their own.
.venv-extras/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-extras
	.venv-extras/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,extras]"
	touch $@

extras: .venv-extras/.installed
	OMP_NUM_THREADS=1 .venv-extras/bin/python -m pytest -n 2 --dist worksteal tests/extras

# make quick with the oldest versions that pyproject.toml allows, and with the newest there are.
lowest newest:
	.ci/versions $@ $(PYTHON)

# Ten thousand inputs over everything that reads what others wrote. (make test tries 500.)
fuzz: .venv/.installed
	FUZZ_INPUTS=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/fuzz

# Training with every method, merges, exports, sweeps and comparisons, killed or with a full disk at each write, and gone on with.
# All writes take some 45 minutes; `python -m tests.kills --minutes 20 --skip 20` goes on where 20 of each were tried, and
# `--copies --only sweep` meets every write of a sweep in some minutes.
kills: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills --minutes 45

clean:
	rm -rf .venv .venv-extras .venv-lowest .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
