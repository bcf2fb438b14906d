# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A file's tests run in one process, so that what they share is made once; `tests/conftest.py` puts long files first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Packages whose tests need no model or a tiny one only: together with ruff and mypy under a minute on two cores.
QUICK := tests/requests tests/hparams tests/evaluation tests/algorithms/test_closed_form.py \
	tests/algorithms/test_low_rank.py tests/algorithms/test_null_space.py tests/test_architecture.py tests/test_settings.py \
	tests/docs

.PHONY: demo check static types quick test suite bench lint docs clean

demo: $(VENV)/.ready
	$(BIN)/editlib demo --out runs/demo --overwrite

# Two things at once: types on one core, tests on the other.
check: $(VENV)/.ready
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target static quick

static: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy

types: $(VENV)/.ready
	$(BIN)/mypy

quick: $(VENV)/.ready
	$(PYTEST) $(QUICK)

# Types are checked beside the tests, which leave a core idle while they are collected and when the last ones end.
test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/editlib fetch smollm2-135m
	$(MAKE) --no-print-directory --jobs 2 types suite

suite: $(VENV)/.ready
	$(PYTEST)
	PYTHONPATH=tests $(PYTEST) -p stand_in tests/test_accelerator.py tests/chain/test_chain_accelerator.py

# The core ratios of speed; a part that is finished is not measured again.
bench: $(VENV)/.ready
	$(BIN)/editlib fetch smollm2-135m
	$(BIN)/python benchmarks/bench.py --out runs/bench

lint: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/ as a site in docs/_build/html; the reference is made from the code first, and every link is checked.
docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py
	$(BIN)/sphinx-build -W --keep-going -q -b linkcheck docs docs/_build/links
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# torch comes first and pinned: a newer one would pull gigabytes of GPU libraries onto machines without a GPU.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist docs/_build *.egg-info
