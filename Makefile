# Every target sets up its environment by itself; it is quick when that exists. vLLM has one of its own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SERVE_VENV := .venv-serve
SERVE_BIN := $(SERVE_VENV)/bin
SERVE_STAMP := $(SERVE_VENV)/.installed

.PHONY: install demo test lint docs install-serve test-serve serve-demo clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

install-serve: $(SERVE_STAMP)

$(SERVE_STAMP): pyproject.toml requirements-serve.txt
	test -x $(SERVE_BIN)/python || $(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_BIN)/python -m pip install --quiet --constraint requirements-serve.txt torch
	$(SERVE_BIN)/python -m pip install --quiet --no-deps --requirement requirements-serve.txt
	$(SERVE_BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

test-serve: $(SERVE_STAMP)
	$(SERVE_BIN)/python -m pytest --numprocesses 2 --dist loadfile -m serve \
		tests/test_serving_engine.py tests/test_serving_http.py

serve-demo: $(SERVE_STAMP)
	$(SERVE_BIN)/python -m benchmarks.serving demo

clean:
	rm -rf $(VENV) $(SERVE_VENV) site demo runs .mypy_cache .pytest_cache .ruff_cache
