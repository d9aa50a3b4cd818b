# `make demo`: the main job on real data. `make test`: every check. Each sets itself up in .venv once.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -e

.PHONY: demo test bench clean

demo: .venv/.examples
	$(BIN)/python examples/vision_timm.py

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: .venv/.test
	$(BIN)/python benchmarks/step_time.py

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
