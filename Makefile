# VENV= takes another environment; PYTHON= the interpreter that makes it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help quickstart test test-all lint mutants bench notebooks verdicts docs clean

help:
	@echo "make quickstart   train a teacher and students on scikit-learn's digits, print the comparison (a minute)"
	@echo "make test         the test suite          make test-all   with the slow tests"
	@echo "make lint         ruff and types          make bench      speed ratios"
	@echo "make notebooks    run the notebooks       make mutants    faults that the tests must catch (20 minutes)"
	@echo "make verdicts     the README's table of claims, from docs/claims"
	@echo "make docs         the documentation site, into site/"

# installed again only when pyproject.toml changed
$(STAMP): pyproject.toml
	@echo "installing into $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' 2> $(VENV)/pip.log \
		|| { cat $(VENV)/pip.log; exit 1; }
	@touch $@

quickstart: $(STAMP)
	@$(BIN)/python -m lightning_kd claim quickstart --jobs 2

test: $(STAMP)
	@$(BIN)/python -m pytest

test-all: $(STAMP)
	@$(BIN)/python -m pytest -m ''

lint: $(STAMP)
	@$(BIN)/ruff check --quiet . docs/_build
	@$(BIN)/ruff format --check --quiet . docs/_build # which ruff leaves out by its name
	@$(BIN)/mypy --no-error-summary

mutants: $(STAMP)
	@$(BIN)/python tests/mutants.py

bench: $(STAMP)
	@$(BIN)/python tests/benchmarks/run.py

notebooks: $(STAMP)
	@$(BIN)/python notebooks/run.py

verdicts: $(STAMP)
	@$(BIN)/python -m lightning_kd.claims.verdict_table

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict
	@echo "the site is in site/: open site/index.html; to search in it, $(BIN)/python -m http.server -d site"

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache dist build site
