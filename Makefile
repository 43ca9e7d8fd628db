# What a person runs. Every target sets up .venv by itself; `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
PROFILE ?= paper
ifndef CACHEMEDIC_CACHE
CACHEMEDIC_CACHE := $(CURDIR)/build/cache
endif
export CACHEMEDIC_CACHE
# What a person gives is one word to the shell, whatever is in it, and make expands none of it.
quote = '$(subst ','\'',$(1))'
given = $(call quote,$(value $(1)))
GIVEN := PYTHON VENV PROFILE BASE SEEDS FAMILY OBJECTIVE DEVICE TEXT REVIEWS TEXT_FOLDER EXECUTOR CLUSTER RETRAIN \
	ROUNDS CONTAINER CACHEMEDIC_CACHE
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
# Parameters of notebooks, each only if given: make reproduce BASE=gpt2-medium SEEDS=[0,1] DEVICE=cuda. A notebook takes
# those that it has: make 06_protected_layers FAMILY=E OBJECTIVE=valence
OPTIONS := $(if $(value BASE),--parameter base=$(call given,BASE)) $(if $(value SEEDS),--parameter seeds=$(call given,SEEDS)) \
	$(if $(value FAMILY),--parameter family=$(call given,FAMILY)) \
	$(if $(value OBJECTIVE),--parameter objective=$(call given,OBJECTIVE)) \
	$(if $(value DEVICE),--device $(call given,DEVICE)) $(if $(value RETRAIN),--retrain) \
	$(if $(value EXECUTOR),--executor $(call given,EXECUTOR) $(if $(value CLUSTER),--cluster $(call given,CLUSTER)))

# Text from outside, for the notebook that reads it: make 13_second_model BASE=gpt2-medium TEXT=wikitext2 REVIEWS=sst2
13_second_model: private OPTIONS += $(if $(value TEXT),--parameter text=$(call given,TEXT)) \
	$(if $(value REVIEWS),--parameter reviews=$(call given,REVIEWS))

# A notebook has one thread, and this many run at once (make -j4 for more; each takes up to 4 GB): results are the same.
# As jobs of a cluster they wait in its queue.
MAKEFLAGS += --jobs=$(if $(filter slurm,$(value EXECUTOR)),64,2)

# The environment is known by the content of its pins; the stamp appears last, so an interrupted set-up is repeated.
READY := $(VENV)/ready-$(firstword $(shell cat requirements.txt pyproject.toml | cksum))
RUN := $(VENV)/bin/python

# Also what .ci/run installs.
TEX_PACKAGES := latexmk lmodern texlive-latex-recommended texlive-fonts-recommended
TEX_STYLES := amsmath amssymb amsthm booktabs caption etoolbox fontenc geometry graphicx hyperref inputenc lmodern \
	microtype natbib pdflscape xspace
TEX_HINT := Debian and Ubuntu: apt-get install $(TEX_PACKAGES); macOS: MacTeX; or TeX Live from https://tug.org/texlive

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

$(if $(filter 1,$(words $(PROFILE))),$(if $(filter paper smoke,$(PROFILE)),,$(error unknown PROFILE=$(PROFILE); allowed: \
	paper, smoke)),$(error PROFILE=$(PROFILE) is not one word; allowed: paper, smoke))
$(if $(filter 1,$(words $(VENV))),,$(error VENV=$(VENV): make cannot name a folder with spaces))
$(foreach sign,; ' " & | < > ` $$ \ *,$(if $(findstring $(sign),$(VENV)),$(error VENV=$(VENV): make cannot name a folder with $(sign))))
$(if $(value TEXT)$(value REVIEWS),$(if $(filter reproduce 13_second_model,$(MAKECMDGOALS)),,$(error TEXT and REVIEWS are parameters of \
	13_second_model: no other target takes them)))
$(if $(value CLUSTER),$(if $(value EXECUTOR),,$(error CLUSTER holds options of jobs: it needs EXECUTOR=slurm or EXECUTOR=local)))

# Only the paper profile with parameters of its own makes what is committed, and can be compared with it.
COMMITTED := $(if $(filter paper,$(PROFILE)),$(if $(strip $(foreach name,BASE SEEDS FAMILY OBJECTIVE TEXT REVIEWS,$(value $(name)))),,yes))
COMPARE = $(if $(COMMITTED),$(RUN) -m cachemedic.studies.compare --brief $(1) || true)

# Which notebook makes what: notebooks/graph.toml as rules (defines NOTEBOOKS, and those APART from `reproduce`).
build/rules.mk: notebooks/graph.toml tools/graph.py tools/imports.py
	@mkdir -p build
	@$(call given,PYTHON) tools/graph.py rules > $@.$$$$.new && mv $@.$$$$.new $@
include build/rules.mk

.PHONY: help
help:  ## This list
	@echo "make TARGET [PROFILE=paper|smoke] [BASE=name-or-path] [SEEDS=[0,1]] [DEVICE=cpu|cuda] [RETRAIN=1]"
	@echo "     notebooks that have these: [FAMILY=A|B|C|D|E] [OBJECTIVE=canonical|valence]"
	@echo "     [EXECUTOR=slurm|local] [CLUSTER=options of its jobs]   notebooks as jobs: docs/clusters.md"
	@echo "     13_second_model [TEXT=name-or-folder] [REVIEWS=name-or-folder]"
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "  %-13s%s\n", $$1, $$2 }' Makefile
	@echo "  figures/NAME.pdf, results/NAME.csv, paper/tables/NAME.tex, or a notebook's name: what that needs, nothing else"
	@echo "notebooks: $(NOTEBOOKS)"
	@echo "notebooks that reproduce leaves out: $(APART)"

.PHONY: reproduce
reproduce: $(NOTEBOOKS)  ## Results, figures, tables and the paper's numbers (PROFILE=smoke: minutes, into build/smoke)
	@$(if $(COMMITTED),$(RUN) -m cachemedic.studies.paper_numbers)
	@$(COMPARE)

# Always asked, seldom run: tools/run_notebook.py compares contents and leaves what is up to date alone.
.PHONY: $(NOTEBOOKS) $(APART)
$(NOTEBOOKS) $(APART): $(READY) | parameters
	@$(RUN) tools/$(if $(value EXECUTOR),submit,run_notebook).py $@ --profile $(PROFILE) $(OPTIONS) \
		--goals $(foreach goal,$(MAKECMDGOALS),$(call quote,$(goal)))

# Once, before the first notebook: a wrong value is told at once, not after an hour.
VALUES := $(strip $(foreach name,BASE SEEDS FAMILY OBJECTIVE DEVICE TEXT REVIEWS EXECUTOR CLUSTER,$(if $(value $(name)),$(name))))
.PHONY: parameters
parameters: $(READY)
	@$(if $(VALUES),$(RUN) tools/parameters.py $(foreach name,$(VALUES),$(name)=$(call given,$(name))))

figures/% results/% paper/tables/%:
	@$(call given,PYTHON) tools/graph.py explain $(call quote,$@)

.PHONY: test
test: $(READY)  ## Tests, on up to four cores (a file stays on one, and has one thread)
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.PHONY: verify
verify: $(READY)  ## Check the hashes of results, compute a sample of their rows again and compare (about 3 minutes)
	@TQDM_DISABLE=1 $(RUN) -m cachemedic.studies.verify

.PHONY: compare
compare: $(READY)  ## Compare results of now with those of the last commit, column by column
	@$(RUN) -m cachemedic.studies.compare

# Without TeX nothing of this would succeed: say so before an environment is set up.
ifneq ($(filter paper,$(MAKECMDGOALS)),)
$(READY): | tex
endif
.PHONY: paper
paper: tex $(READY)  ## paper/main.pdf from the committed results (needs TeX: latexmk, pdflatex)
	$(RUN) -m cachemedic.studies.paper_numbers
	@mkdir -p build/paper
	SOURCE_DATE_EPOCH=0 FORCE_SOURCE_DATE=1 latexmk -cd -pdf -silent -halt-on-error -Werror \
		-outdir=$(call quote,$(CURDIR)/build/paper) paper/main.tex
	cp build/paper/main.pdf paper/main.pdf

.PHONY: tex
tex:
	@for program in latexmk pdflatex kpsewhich; do command -v $$program > /dev/null || { \
		echo "error: make paper needs $$program of a TeX distribution. $(TEX_HINT)" >&2; exit 1; }; done
	@for package in $(TEX_STYLES); do \
		kpsewhich $$package.sty > /dev/null || { \
		echo "error: make paper needs the TeX package $$package. $(TEX_HINT)" >&2; exit 1; }; done

.PHONY: tex-packages
tex-packages:
	@echo $(TEX_PACKAGES)

.PHONY: lint
lint: $(READY)  ## Style, types, and what may import what
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# All that JupyterLab and its kernels keep beside notebooks: settings, checkpoints, history. To look for language servers it
# would run npm, which writes a log at home.
JUPYTER := $(call quote,$(CURDIR)/build/jupyter)
.PHONY: lab
lab: $(READY)  ## JupyterLab with the notebooks open (CONTAINER=1: as root, reachable from outside, no browser)
	@mkdir -p build/jupyter
	JUPYTER_DATA_DIR=$(JUPYTER)/data JUPYTER_RUNTIME_DIR=$(JUPYTER)/runtime IPYTHONDIR=$(JUPYTER)/ipython \
		JUPYTERLAB_SETTINGS_DIR=$(JUPYTER)/settings JUPYTERLAB_WORKSPACES_DIR=$(JUPYTER)/workspaces \
		$(RUN) -m jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks \
		--FileCheckpoints.checkpoint_dir=$(JUPYTER)/checkpoints --LanguageServerManager.autodetect=False \
		$(if $(value CONTAINER),--allow-root --ip=0.0.0.0 --no-browser)

.PHONY: torture
torture: $(READY)  ## Damage every kind of file, give odd values to public functions (ROUNDS=3000: about 20 minutes)
	@TQDM_DISABLE=1 $(RUN) tools/torture.py $(if $(value ROUNDS),$(call given,ROUNDS))

.PHONY: site
site: $(READY)  ## Gallery, guides, executed notebooks, paper and API as HTML, into build/site
	@$(RUN) tools/site_pages.py

.PHONY: bench
bench: $(READY)  ## Benchmarks into results/bench_*.csv
	$(RUN) -m cachemedic bench

.PHONY: base-models
base-models: $(READY)  ## Train the base models anew (hours; goes on after an interrupt; TEXT_FOLDER=... for one on real text)
	$(RUN) -m cachemedic.studies.pretraining.train gpt2
	$(RUN) -m cachemedic.studies.pretraining.train llama
	for base in embedded-gpt2 embedded-llama; do $(RUN) -m cachemedic.training.valence.head $$base || exit; done
	$(RUN) -m cachemedic.studies.ship_operators
	$(if $(value TEXT_FOLDER),$(RUN) -m cachemedic.studies.pretraining.train wikipedia --text $(call given,TEXT_FOLDER) && \
		$(RUN) -m cachemedic.training.valence.head embedded-wikipedia)

.PHONY: clean
clean:  ## Remove build/ but for the checkpoints of base models; results and .venv stay
	find build -mindepth 1 -maxdepth 1 ! -name base -exec rm -rf {} +

# An environment that is there is used as it is, so that VENV may be one of conda: its pins are installed into it.
$(READY):
	$(RUN) -m pip --version > /dev/null 2>&1 || $(call given,PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --requirement requirements.txt
	$(RUN) -m pip install --no-build-isolation --no-deps --editable .
	@rm -f $(VENV)/ready-*
	@touch $@
