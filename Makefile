# One environment, .venv, serves every target; the first of them makes it.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
DIST := dist
# Two processes share the tests, a file each; the longest files begin (see tests/conftest.py).
JOBS ?= 2
TESTED := -n $(JOBS) --dist loadfile --no-loadscope-reorder --doctest-modules bnfix tests
COVERAGE := 95
SHOWN := bnfix-demo
CASES ?= 5000
CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3 python

# What a caller's shell puts before the environment's own packages would be tested in their place.
unexport PYTHONPATH PYTHONHOME

# Threads that spin while they wait bring small networks to a stand where cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

# A stamp is void if the interpreter is gone, or if the checkout has moved: scripts hold its path.
STATE := $(shell $(PY) -c "" 2>/dev/null && cat $(STAMP) 2>/dev/null)
ifneq ($(STATE),$(CURDIR))
$(STAMP): again
endif

.PHONY: help demo test test-lowest test-browser screenshots fuzz lint coverage wheel again
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 22

demo: $(STAMP) ## the whole way on embedded data, offline, in under a minute
	$(VENV)/bin/bnfix demo

# A second thread costs small networks more than it saves, and two processes share the cores.
test test-lowest coverage: export OMP_NUM_THREADS ?= 1

test: $(STAMP) ## all tests and doctests
	$(PY) -m pytest -q $(TESTED)

test-lowest: $(LOWEST)/.installed ## all tests on the oldest torch that is supported, in .venv-lowest
	$(LOWEST)/bin/python -m pytest -q $(TESTED)

test-browser: $(STAMP) ## the report's page in a real browser; needs chromium and chromedriver
	$(PY) -m pytest -q -rs tests/browser

screenshots: $(STAMP) ## pictures of the demo's page for README, in docs/
	$(VENV)/bin/bnfix demo --quiet --force -o $(SHOWN)
	$(PY) -m tests.browser.screenshots $(SHOWN)/digits_net.fixed.safetensors.report.html docs

fuzz: $(STAMP) ## damaged and hostile files for every reader; CASES=5000 a file of tests
	BNFIX_FUZZ_CASES=$(CASES) $(PY) -m pytest -q --timeout 0 tests/fuzz

lint: $(STAMP) ## formatting, lint, types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

coverage: $(STAMP) ## the tests, with the branches they miss
	$(PY) -m pytest -q --cov --cov-report=term-missing --cov-fail-under=$(COVERAGE) $(TESTED)

wheel: $(STAMP) ## the source distribution and the wheel, in dist/
	@# The wheel is built from the source distribution, which shows that nothing is missing there.
	$(PY) -m build --outdir "$(DIST)" >/dev/null
	$(PY) -m twine check --strict "$(DIST)"/*

$(STAMP): pyproject.toml
	@rm -f $(STAMP)
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		for python in $(PYTHON) $(CANDIDATES); do \
			if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
				>/dev/null 2>&1; then found=$$python; break; fi; \
		done; \
		if [ -z "$${found:-}" ]; then \
			echo "make: no Python 3.11 or newer (with venv) was found as any of:" \
				"$(PYTHON) $(CANDIDATES). Install one, or name it: make PYTHON=/path/to/python" >&2; \
			exit 1; \
		fi; \
		echo "make: a new environment in $(VENV), by $$found"; \
		rm -rf $(VENV) && "$$found" -m venv $(VENV); \
	fi
	@echo "make: installing what pyproject.toml asks for (minutes the first time)"
	$(PY) -m pip install --disable-pip-version-check -e ".[dev]"
	@printf '%s\n' "$(CURDIR)" >$(STAMP)

# torch and torchvision of the very versions that pyproject.toml names as the least.
$(LOWEST)/.installed: pyproject.toml | $(STAMP)
	rm -rf $(LOWEST) && $(PY) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check -e ".[dev]" \
		$$(sed -n 's/^ *"\(torch\(vision\)\{0,1\}\)>=\([0-9.]*\)",/\1==\3.*/p' pyproject.toml)
	touch $@
