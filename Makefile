# `make demo`: the main job on real data. `make test`: every check. `make sweep`: every architecture of timm and
# transformers. `make soak`: the long run, broken at random, and 20,000 orders of what is done to a model (hours).
# Each sets itself up in .venv once.
# `make docs`: the documentation in outputs/site, where a broken link or a page that is left out is an error.
# `make dist`: sdist and wheel in dist/; the wheel, alone in .venv-dist, runs the guide, the command and old files.
# `make test-lowest`: all tests on the lowest versions that pyproject.toml declares, in .venv-lowest.
PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -e

.PHONY: demo test docs dist test-lowest bench sweep soak clean

demo: .venv/.examples
	$(BIN)/python examples/vision_timm.py

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir outputs/site

DIST := .venv-dist/bin/python
CHECKED := tests examples benchmarks docs mkdocs.yml README.md CHANGELOG.md CONTRIBUTING.md LICENSE pyproject.toml

dist:
	rm -rf dist build .venv-dist
	$(PYTHON) -m venv .venv-dist
	$(DIST) -m pip install --quiet --disable-pip-version-check build
	$(DIST) -m build --outdir dist .
	$(DIST) -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[test]"
	mkdir -p build/checked && cp -r $(CHECKED) build/checked
	cd build/checked && ../../$(DIST) -m pytest tests/test_docs.py tests/test_readme.py tests/test_cli.py tests/test_fixtures.py
	rm -rf build

test-lowest: .venv-lowest/.test
	$(LOWEST)/python -m pytest -r s

bench: .venv/.test
	$(BIN)/python benchmarks/step_time.py

sweep: .venv/.test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.sweep

soak: .venv/.test
	$(BIN)/python -m pytest -m soak tests/test_soak.py
	OMP_NUM_THREADS=1 UORA_ANY_ORDER=20000 $(BIN)/python -m pytest tests/test_any_order.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.examples: pyproject.toml | .venv/bin/python
	$(INSTALL) '.[examples]'
	touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(INSTALL) '.[test,quantized,onnx]'
	touch $@ .venv/.examples

.venv/.docs: pyproject.toml | .venv/bin/python
	$(INSTALL) '.[docs]'
	touch $@

# uv picks the versions; it does not read pip's settings, so the index goes on to it, where pip has one set.
.venv-lowest/.test: pyproject.toml
	$(PYTHON) -m venv --clear .venv-lowest
	$(LOWEST)/python -m pip install --quiet --disable-pip-version-check uv
	UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(LOWEST)/python -m pip config get global.index-url 2>/dev/null)}}" \
	UV_HTTP_TIMEOUT=$${UV_HTTP_TIMEOUT:-300} \
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python --resolution lowest-direct -e '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-lowest outputs
