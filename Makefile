# Each target sets up .venv by itself; nothing has to be installed by hand but Python and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test test-all lint clean

demo: $(VENV)/.installed
	$(BIN)/python -m experiments.speedrun --scale demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto -m "not slow and not hf"

test-all: $(VENV)/.installed-hf-test
	$(BIN)/python -m pytest -n auto --durations=30

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; give one with: make PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (once, a minute or two) ..."
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.installed-hf-test: $(VENV)/.installed-test
	$(PIP) install -c constraints.txt -e '.[test,hf-test,ray,tpu-plan]'
	@touch $@
