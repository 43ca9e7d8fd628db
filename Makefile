# What a person runs. Every target sets up .venv by itself; `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
PROFILE ?= paper
# Parameters of all notebooks, each only if given: make reproduce BASE=gpt2-medium SEEDS=[0,1] DEVICE=cuda
OPTIONS := $(if $(BASE),--parameter 'base=$(BASE)') $(if $(SEEDS),--parameter 'seeds=$(SEEDS)') \
	$(if $(DEVICE),--device '$(DEVICE)') $(if $(RETRAIN),--retrain)

# The environment is known by the content of its pins; the stamp appears last, so an interrupted set-up is repeated.
READY := $(VENV)/ready-$(firstword $(shell cat requirements.txt pyproject.toml | cksum))
RUN := $(VENV)/bin/python
export CACHEMEDIC_CACHE ?= $(CURDIR)/build/cache

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

$(if $(filter paper smoke,$(PROFILE)),,$(error unknown PROFILE=$(PROFILE); allowed: paper, smoke))

# Which notebook makes what: notebooks/graph.toml as rules (defines NOTEBOOKS).
build/rules.mk: notebooks/graph.toml tools/graph.py tools/imports.py
	@mkdir -p build
	@$(PYTHON) tools/graph.py rules > $@.new && mv $@.new $@
include build/rules.mk

.PHONY: help
help:  ## This list
	@echo "make TARGET [PROFILE=paper|smoke] [BASE=name-or-path] [SEEDS=[0,1]] [DEVICE=cpu|cuda] [RETRAIN=1]"
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "  %-13s%s\n", $$1, $$2 }' Makefile
	@echo "  figures/NAME.pdf, results/NAME.csv, paper/tables/NAME.tex, or a notebook's name: what that needs, nothing else"
	@echo "notebooks: $(NOTEBOOKS)"

.PHONY: reproduce
reproduce: $(NOTEBOOKS)  ## Results, figures and tables from all notebooks (PROFILE=smoke: minutes, into build/smoke)

# Always asked, seldom run: tools/run_notebook.py compares contents and leaves what is up to date alone.
.PHONY: $(NOTEBOOKS)
$(NOTEBOOKS): $(READY)
	@$(RUN) tools/run_notebook.py $@ --profile $(PROFILE) $(OPTIONS) --goals $(MAKECMDGOALS)

figures/% results/% paper/tables/%:
	@$(PYTHON) tools/graph.py explain $@

.PHONY: test
test: $(READY)  ## Tests
	$(RUN) -m pytest

.PHONY: lint
lint: $(READY)  ## Style and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy

.PHONY: lab
lab: $(READY)  ## JupyterLab in notebooks/
	$(VENV)/bin/jupyter lab --notebook-dir=notebooks

.PHONY: bench
bench: $(READY)  ## Benchmarks into results/bench_*.csv
	$(RUN) -m cachemedic.bench

.PHONY: base-models
base-models: $(READY)  ## Train the embedded base models anew (hours; goes on after an interrupt)
	$(RUN) -m cachemedic.base_training gpt2
	$(RUN) -m cachemedic.base_training llama

.PHONY: clean
clean:  ## Remove build/ but for the checkpoints of base models; results and .venv stay
	find build -mindepth 1 -maxdepth 1 ! -name base -exec rm -rf {} +

$(READY):
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --requirement requirements.txt
	$(RUN) -m pip install --no-build-isolation --no-deps --editable .
	@rm -f $(VENV)/ready-*
	@touch $@
