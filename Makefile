# Everything from a fresh machine with Python 3.11 or newer: `make reproduce`, `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
CUDA_VENV ?= .venv-cuda
WHEEL_VENV := .venv-wheel
PRESET ?= tiny

.PHONY: reproduce test coverage test-versions compile-gpu wheel docs lint benchmark clean

reproduce: $(VENV)/ready-experiments  ## train the preset's models, measure, write the report
	$(RUN) -m experiments reproduce --preset $(PRESET) --out runs/$(PRESET)

test: $(VENV)/ready-test  ## all tests
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(OPTIONS)

coverage:  ## the same, and which lines they run; takes an eighth longer
	$(MAKE) test OPTIONS='--cov --cov-report=term'

lint: $(VENV)/ready-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

benchmark: $(VENV)/ready-experiments  ## times and memory against dense attention
	$(RUN) -m experiments benchmark

test-versions: ## the same tests on another Python, hence another JAX: make test-versions PYTHON=python3.13
	$(MAKE) test PYTHON=$(PYTHON) VENV=.venv-$(notdir $(PYTHON))

compile-gpu: ## compiles every GPU kernel, without a GPU; downloads CUDA, 5 GB: make compile-gpu PYTHON=python3.12
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python 3.12 or newer is needed; set PYTHON=...")'
	$(MAKE) $(CUDA_VENV)/ready-cuda13 VENV=$(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m tests.gpu.compile
	$(CUDA_VENV)/bin/python -m tests.gpu.xla_path

wheel: $(VENV)/ready-build  ## builds dist/ and tries the wheel in an empty environment, out of the checkout's reach
	rm -rf build dist *.egg-info $(WHEEL_VENV)
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl mypy
	cp tests/smoke.py $(WHEEL_VENV)
	cd $(WHEEL_VENV) && bin/python -I smoke.py && bin/mypy --strict --config-file= smoke.py

docs: $(VENV)/ready-docs  ## the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready-%: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist site *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .coverage*
