# Works with GNU make 3.81 (macOS) and newer. Everything runs in .venv, which the first target builds.

PYTHON ?= python3
NOTEBOOKS ?=
OUTPUT ?= runs
TESTS ?=
FORCE ?=
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup run test validate lab lint clean
MAKEFLAGS += --no-print-directory

# A mistyped variable (NOTEBOKS=01) would otherwise be ignored without a word.
VARIABLES_KNOWN := PYTHON NOTEBOOKS OUTPUT TESTS FORCE WORKERS
VARIABLES_GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
VARIABLES_UNKNOWN := $(filter-out $(VARIABLES_KNOWN) MAKEFLAGS SHELL,$(VARIABLES_GIVEN))
ifneq ($(strip $(VARIABLES_UNKNOWN)),)
$(error unknown variable $(VARIABLES_UNKNOWN): the variables are $(VARIABLES_KNOWN); see `make help`)
endif

# A Python that was named is used or refused; the default gives way to a newer one on PATH.
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
FOUND := $(shell for name in python3 python3.13 python3.12 python3.11; do \
  $$name $(IS_NEW_ENOUGH) && echo $$name && break; done)
CHOSEN := $(if $(filter file,$(origin PYTHON)),,$(if $(strip $(PYTHON)),--chosen))
INTERPRETER := $(if $(CHOSEN),$(strip $(PYTHON)),$(or $(FOUND),python3))
VENV := .venv/bin

help:
	@echo 'GLM-4V-9B on several GPUs: a suite of notebooks. Needs Python 3.11 or newer and make.'
	@echo
	@echo '  make run       execute the notebooks that are not done yet; report: runs/suite/report.html'
	@echo '  make test      unit tests, parity tests, every notebook cell by cell, the panel in a browser'
	@echo '  make validate  only the notebooks: the rules for what is stored, then every cell run'
	@echo '  make lab       open JupyterLab on this machine only (127.0.0.1), kernel ready'
	@echo '  make lint      check the style of code and notebooks'
	@echo '  make setup     only build .venv from requirements.lock (each target above does it by itself)'
	@echo '  make clean     remove .venv and caches; runs/ stays'
	@echo
	@echo 'Variables:'
	@echo '  PYTHON=python3.12     the Python that builds .venv                      (python3)'
	@echo '  NOTEBOOKS="01 02"     run (to runs/suite-01-02/), validate: only these  (all)'
	@echo '  OUTPUT=runs           run: where results go                             (runs)'
	@echo '  TESTS=tests/simgpu    test: only these files or folders                 (all)'
	@echo '  FORCE=1               run: also the notebooks that are done              (no)'
	@echo '  WORKERS=4             run, test, validate: files at a time              (2)'

setup: export MAKE_TARGET := $(or $(firstword $(MAKECMDGOALS)),run)
setup:
	@command -v $(INTERPRETER) >/dev/null 2>&1 || { \
	  echo "error: $(INTERPRETER) is not on PATH. Install Python 3.11 or newer, or name yours:" \
	    "make $(MAKE_TARGET) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(INTERPRETER) -u tools/setup_environment.py $(CHOSEN)

run: setup
	@echo 'Starting the notebooks ...'
	@$(VENV)/python -m glm4v_nb run $(NOTEBOOKS) --workers '$(WORKERS)' --output '$(OUTPUT)' $(if $(filter-out 0 no,$(FORCE)),--force)

test: setup
	@HF_HUB_OFFLINE=1 $(VENV)/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

# `make test` has both parts too: the rules as a test, and the notebooks among its files.
validate: setup
	@$(VENV)/python tools/notebook_rules --execute --workers '$(WORKERS)' $(NOTEBOOKS)

# Containers often have only root, which Jupyter refuses unless told. A picture is uploaded in one
# message; the server closes the connection on longer ones, and kernels cannot ask how long.
MESSAGE_MIB := 64
MESSAGE_BYTES := 67108864
lab: setup
	@GLM4V_NB_MESSAGE_MIB=$(MESSAGE_MIB) $(VENV)/jupyter lab --ServerApp.ip=127.0.0.1 \
	  --ServerApp.root_dir="$(CURDIR)/notebooks" \
	  --ServerApp.tornado_settings="{'websocket_max_message_size': $(MESSAGE_BYTES)}" $$([ "$$(id -u)" -ne 0 ] || echo --allow-root)

lint: setup
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/lint-imports --no-cache
	@$(VENV)/nb-clean check --preserve-cell-outputs --preserve-execution-counts --preserve-cell-metadata-field tags notebooks sweeps/targets

clean:
	@rm -rf .venv build .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -not -path './.git/*' -exec rm -rf {} +
