# make demo: the main job on a small real model and real data.   make test: the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types clean

# The stamp is younger than the files that say what to install, or the installation runs again.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.installed
	$(BIN)/python examples/demo.py

# Two processes of one thread each: the tests are many small models, not a few large ones.
test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
