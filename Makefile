# Two commands: `make demo` and `make test`. Everything else is for those who work on it.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SLUGS  := $(notdir $(wildcard plugins/*))
DEMO   ?= memm crf zlpr

# pip says nothing of what is already there, and does not look for a newer pip
PIP = $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo install test lint format bench plugin plugins clean

help:
	@echo 'make demo                 install everything and measure what three posts claim'
	@echo 'make test                 install everything and run the whole suite'
	@echo 'make lint                 ruff and mypy'
	@echo 'make bench                ours beside the fastest peer; writes benchmarks/results.json'
	@echo 'make plugin SLUG=crf      one plugin alone in a fresh environment, and its tests'
	@echo 'make plugins              the same for all plugins in turn'

# -- the environment: made once, renewed when a pyproject.toml changes ---------------------------

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kexue needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	$(PIP) install --quiet --constraint constraints.txt torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(wildcard plugins/*/pyproject.toml)
	$(PIP) install --quiet --constraint constraints.txt \
	    --editable '.[lab]' $(SLUGS:%=--editable plugins/%)
	$(BIN)/python -m compileall -q cli.py core plugins
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --group test --group peers --group lint
	@touch $@

install: $(VENV)/.installed

# -- what users do --------------------------------------------------------------------------------

demo: $(VENV)/.installed
	$(BIN)/kexue list
	$(BIN)/kexue reproduce $(DEMO) $(FLAGS)

test: $(VENV)/.tools
	$(BIN)/pytest
	$(MAKE) plugin SLUG=zlpr

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/types && ln -sfn ../.. build/types/kexue
	MYPYPATH=build/types $(BIN)/mypy -p kexue.core -m kexue.cli
	MYPYPATH=build/types:$(subst $(eval) ,:,$(SLUGS:%=plugins/%)) \
	    $(BIN)/mypy $(foreach slug,$(SLUGS),-p kexue_$(subst -,_,$(slug)))
	MYPYPATH=build/types:benchmarks $(BIN)/mypy --explicit-package-bases \
	    tests $(wildcard plugins/*/tests) benchmarks

format: $(VENV)/.tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.tools
	$(PIP) install --quiet --constraint constraints.txt --group bench
	$(BIN)/python benchmarks/run.py $(FLAGS)

# -- independence: a plugin with the core alone ---------------------------------------------------
#
# .venvs/base holds torch, what the core and its lab need and the test tools, but neither the core
# nor a plugin; a fresh environment on top of it gets the core and the plugin as wheels.

BASE := .venvs/base

$(BASE)/.ready: constraints.txt pyproject.toml
	rm -rf $(BASE)
	$(PYTHON) -m venv $(BASE)
	$(BASE)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BASE)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(BASE)/bin/python -m pip install --quiet --constraint constraints.txt '.[lab]' --group test
	$(BASE)/bin/python -m pip uninstall --quiet --yes kexue
	@touch $@

plugin: $(BASE)/.ready
	@test -f 'plugins/$(SLUG)/pyproject.toml' || { echo 'make plugin SLUG=…: one of $(SLUGS)'; exit 2; }
	rm -rf .venvs/$(SLUG)
	$(PYTHON) -m venv --without-pip .venvs/$(SLUG)
	$(BASE)/bin/python -c "import glob, sysconfig; \
	    site, = glob.glob('.venvs/$(SLUG)/lib/python3*/site-packages'); \
	    open(site + '/base.pth', 'w').write(sysconfig.get_path('purelib'))"
	.venvs/$(SLUG)/bin/python -m pip install --quiet .
	.venvs/$(SLUG)/bin/kexue install $(SLUG)
	.venvs/$(SLUG)/bin/kexue list
	.venvs/$(SLUG)/bin/python -m pytest plugins/$(SLUG)

plugins:
	@set -e; for slug in $(SLUGS); do echo "== $$slug"; $(MAKE) --no-print-directory plugin SLUG=$$slug; done

clean:
	rm -rf $(VENV) .venvs build reports
