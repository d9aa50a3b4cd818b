# `make demo`: the main job on real data. `make test`: every check. `make sweep`: every architecture of timm and
# transformers. `make soak`: the long run, broken at random. Each sets itself up in .venv once.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -e

.PHONY: demo test bench sweep soak clean

demo: .venv/.examples
	$(BIN)/python examples/vision_timm.py

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: .venv/.test
	$(BIN)/python benchmarks/step_time.py

sweep: .venv/.test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.sweep

soak: .venv/.test
	$(BIN)/python -m pytest -m soak tests/test_soak.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.examples: pyproject.toml | .venv/bin/python
	$(INSTALL) '.[examples]'
	touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(INSTALL) '.[test]'
	touch $@ .venv/.examples

clean:
	rm -rf .venv outputs
