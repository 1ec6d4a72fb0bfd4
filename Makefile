# make demo   set up, then pretrain, fine-tune, predict and evaluate on generated radiographs
# make test   set up, then run the tests
# make lint   check style, types and who imports whom
# make docs   build site/ of README.md and docs/, without network
# make reference   rewrite docs/reference/ after a change of flags

PYTHON ?= python3
VENV := .venv
# one thread a test process, a process a core
TEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

.PHONY: setup demo test lint docs reference clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py $(wildcard guided_diffusion/kernels/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[test,docs]'
	touch $@

demo: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash tools/demo.sh demo

test: setup
	$(TEST) -n auto --dist loadfile --no-loadscope-reorder

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

reference: setup
	$(VENV)/bin/python tools/documentation/reference.py

clean:
	rm -rf demo site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
