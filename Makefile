# Four commands. Each makes the virtual environment it needs; the only requirement is Python >= 3.11.
#
#   make demo    train, reduce and compare on embedded data
#   make test    every test (TESTS=tests/test_x.py or PYTEST="-m 'not slow'" for fewer)
#   make lint    ruff
#   make clean   remove the environment and the caches
#
# PYTHON=/path/to/python3 chooses the interpreter; otherwise it is the newest that is found.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test lint clean FORCE

PYTHON ?=
TESTS ?=
PYTEST ?=
VENV := .venv
BIN := $(VENV)/bin

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.demo
	@$(BIN)/python -m tdm_jax.demo

test: $(VENV)/.test
	@$(BIN)/python -m pytest $(PYTEST) $(TESTS)

lint: $(VENV)/.test
	@$(BIN)/python -m ruff check

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find tdm_jax configs tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# An interpreter of use has venv and ensurepip, which Debian packages apart. `usable` prints what is
# wrong with one, if anything.
define FIND_PYTHON
usable='import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("it is Python %d.%d" % v); import ensurepip, venv'
if [ -n "$(PYTHON)" ]; then
  why=$$("$(PYTHON)" -c "$$usable" 2>&1) && python=$$(command -v "$(PYTHON)") || {
    echo "error: PYTHON=$(PYTHON) cannot be used: $${why##*$$'\n'}; expected Python 3.11 or newer with venv" >&2; exit 2; }
else
  python=
  for name in python3.13 python3.12 python3.11 python3 python; do
    if "$$name" -c "$$usable" >/dev/null 2>&1; then python=$$(command -v "$$name"); break; fi
  done
  [ -n "$$python" ] || {
    found=$$(python3 --version 2>&1 || true)
    echo "error: no Python 3.11 or newer with venv on PATH (python3: $${found:-none}); install one (Debian: python3-venv too) or pass PYTHON=/path/to/python3" >&2; exit 2; }
fi
endef

# Made anew when another PYTHON is asked for; written last, so an interrupted start is started again.
$(VENV)/.python: FORCE
	@[ -x $(BIN)/python ] && [ -f $@ ] && { [ -z "$(PYTHON)" ] || [ "$$(cat $@)" = "$(PYTHON)" ]; } && exit 0
	$(FIND_PYTHON)
	echo "environment: $(VENV) with $$("$$python" --version) ($$python)"
	rm -rf $(VENV)
	"$$python" -m venv $(VENV)
	echo "$(PYTHON)" > $@

# Says each package's name as pip resolves it, and keeps the rest for when something fails.
define INSTALL
echo "installing (once; a few minutes, about 1 GB):"
PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[$(EXTRAS)]' 2>&1 \
  | tee $(VENV)/pip.log | awk '/^Collecting/ {sub(/[<>=!~;\[(].*/, "", $$2); printf " %s", $$2; fflush()} \
      /^Installing collected/ {printf "\nunpacking ...\n"; fflush()}' \
  || { echo; tail -n 20 $(VENV)/pip.log >&2; echo "error: pip failed; the whole log is $(VENV)/pip.log" >&2; exit 2; }
touch $@
endef

$(VENV)/.demo: EXTRAS := viz
$(VENV)/.test: EXTRAS := viz,test
$(VENV)/.demo $(VENV)/.test: $(VENV)/.python requirements.txt pyproject.toml
	@$(INSTALL)
