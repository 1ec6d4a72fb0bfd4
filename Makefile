# make demo   set up, then pretrain, fine-tune, predict and evaluate on generated radiographs
# make bitewings   set up, then run the commands of docs/first-week.md at toy size
# make loop   set up, then play the labelling loop of docs/labelling.md on generated radiographs
# make test   set up, then run the tests
# make lint   check style, types and who imports whom
# make docs   build site/ of README.md and docs/, without network
# make reference   rewrite docs/reference/ after a change of flags, and the curves of docs/label-efficiency.md

PYTHON ?= python3
VENV := .venv
# one thread a test process, a process a core
TEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

.PHONY: setup demo bitewings loop test lint docs reference clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py $(wildcard guided_diffusion/kernels/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[test,docs]'
	touch $@

demo: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash tools/demo.sh demo

bitewings: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash tools/bitewings.sh bitewings

loop: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash tools/loop.sh loop

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
	$(VENV)/bin/python tools/documentation/label_curves.py

clean:
	rm -rf demo bitewings loop site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
