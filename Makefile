# make demo   install, then run every round of the embedded task
# make test   install with the test tools, then ruff, mypy and pytest
# make lint   ruff and mypy alone
# make clean  remove the virtual environment, caches and build outputs (runs/ stays)
#
# PYTHON chooses the interpreter that creates the environment, VENV where it lies.

PYTHON ?= python3
VENV ?= .venv

# Several threads in each of several processes slow one another down.
export OMP_NUM_THREADS ?= 1

BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/python -m erpd_lightning fit --config configs/demo.yaml

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes from whatever index pip is set up with. Only its range (pyproject.toml) is named here:
# where that index offers a CPU build, its version ends in +cpu, which pip ranks above the plain one,
# and the upper bound keeps a newer release from outranking both.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e .
	touch $@

# The test tools include all that the demo needs, hence both stamps.
$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[test]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
