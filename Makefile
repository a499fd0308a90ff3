# Two commands: `make demo` and `make test`. Both build one .venv through constraints.txt; the stamp
# files make a second run call no pip, so that it also works offline.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamps
# Another torch build, for example TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH_INDEX ?=
PIP    := $(BIN)/python -m pip --disable-pip-version-check
PINS   := -c constraints.txt

.PHONY: demo test test-twin soak lint install official clean

demo: $(STAMP)/project
	$(BIN)/llm2vec-fast demo

test: $(STAMP)/dev
	$(BIN)/python -m pytest

# The versions of a GPU machine, with PyPI's CUDA build of torch (4.7 GB; needs no GPU to import):
# operations, kernels through its Triton, csrc. Run before a session on a GPU.
TWIN_PYTHON ?= $(PYTHON)
test-twin: .venv-twin/.stamp
	.venv-twin/bin/python -m pytest tests/ops tests/model tests/test_batch.py

.venv-twin/.stamp: constraints-twin.txt pyproject.toml setup.py
	$(TWIN_PYTHON) -m venv .venv-twin
	.venv-twin/bin/pip install -q -c constraints-twin.txt torch "setuptools>=77"
	.venv-twin/bin/pip install -q -c constraints-twin.txt 'seqeval>=1.2'
	.venv-twin/bin/pip install -q -c constraints-twin.txt --no-build-isolation -e '.[test]'
	touch $@

# An hour: 5,000 damaged inputs a reader, every fault of a job up to twenty times, then ten minutes
# of a million documents with a fault every half minute. Prints the table of README.
soak: $(STAMP)/dev
	$(BIN)/python -m pytest -m soak
	$(BIN)/python -m benchmarks.soak --write

lint: $(STAMP)/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

install: $(STAMP)/dev

# The official llm2vec with the old transformers it needs, to be compared with and measured against.
official: $(STAMP)/project
	$(BIN)/python -m benchmarks.official setup

$(STAMP)/venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (make PYTHON=python3.12)")'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMP) && touch $@

# torch first and alone: whatever is installed later finds it there and fetches no other build.
$(STAMP)/torch: constraints.txt $(STAMP)/venv
	$(PIP) install -q $(PINS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install -q $(PINS) "setuptools>=77"
	touch $@

$(STAMP)/project: pyproject.toml setup.py $(wildcard csrc/*) $(STAMP)/torch
	$(PIP) install -q $(PINS) --no-build-isolation -e '.[demo]'
	touch $@

# The project is there already: pip adds what the extra asks for and builds nothing again.
$(STAMP)/dev: $(STAMP)/project
	$(PIP) install -q $(PINS) seqeval  # a source package that asks for an isolated build
	$(PIP) install -q $(PINS) 'llm2vec-fast[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-twin build *.egg-info llm2vec_fast/_cuda.so llm2vec_fast/_cpu.so
