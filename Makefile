# Five commands. Each makes the virtual environment it needs; the only requirement is Python >= 3.11.
#
#   make demo    train, reduce and compare on embedded data
#   make test    the tests, twelve minutes on two cores (PYTEST="-m slow" for the slow rest, PYTEST=tests/test_x.py for a file)
#   make lint    ruff, rules and format, and the types by mypy
#   make docs    the site, in docs/_build: warnings are errors
#   make clean   remove the environment and the caches
#
# PYTHON=/path/to/python3 chooses the interpreter; otherwise it is python3.12, python3.11 or another that serves.

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs clean
export PYTHON

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# glibc keeps a step's memory, in huge pages, instead of asking the system for it anew (docs/performance.md).
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=16000000000
demo:
	@.ci/venv viz
	@.venv/bin/python -m tdm_jax.demo

# In the order of tests/conftest.py: the files of few tests, which pytest-xdist would keep for the end, take longest.
test: PYTEST ?= -m "not slow"
test:
	@.ci/venv viz,test
	@.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

lint:
	@.ci/venv viz,test
	@.venv/bin/python -m ruff check
	@.venv/bin/python -m ruff format --check
	@.venv/bin/python -m mypy

docs:
	@.ci/venv docs
	@.venv/bin/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build
	@echo docs/_build/index.html

clean:
	rm -rf .venv .venv-extras .venv-peers build docs/_build docs/api docs/jupyter_execute *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find tdm_jax configs tests -name __pycache__ -prune -exec rm -rf {} +
