# portllm: `make repro` rebuilds every result, `make test` runs the tests; both set up .venv first.
# `make repro PROFILE=mistral-7b` runs the same dvc.yaml with profiles/mistral-7b.yaml, in workspaces/mistral-7b.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
SEEDS ?= 1 2
PORT ?= 5000
PROFILE ?=
WORKSPACE := workspaces/$(PROFILE)
THERE := $(if $(PROFILE),cd '$(WORKSPACE)' && )
export PATH := $(BIN):$(PATH)

# DVC stops in a tree without git, such as an exported archive, unless core.no_scm is set
define ALLOW_NO_GIT
{ git rev-parse --git-dir >/dev/null 2>&1 || grep -qs no_scm .dvc/config.local || { \
  dvc config --local core.no_scm true && \
  echo 'note: no git repository here, so core.no_scm is set; after git init: dvc config --local --unset core.no_scm'; }; }
endef

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make .venv with the exact versions of constraints.txt

$(READY): pyproject.toml constraints.txt setup.py portllm/algebra/_sums.c portllm/algebra/_sums_tile.h
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test,dev]"
	$(VENV)/bin/python -m compileall -q portllm  # forty short processes read it, some where Python may not write it
	touch $@

repro: $(READY) $(if $(PROFILE),doctor) ## rebuild the whole experiment (dvc repro); with PROFILE=NAME that of profiles/NAME.yaml
	@$(THERE)$(ALLOW_NO_GIT)
	$(THERE)dvc repro

doctor: $(READY) $(if $(PROFILE),workspace) ## what the experiment needs, and whether this machine has it
	$(THERE)portllm doctor --params params.yaml

# A DVC project of its own beside the others, with its own lock, results and cache: the files it shares with this one
# are links, so that there is one dvc.yaml; its params.yaml is a copy of the profile, yours to edit and `dvc exp`'s.
workspace: $(READY) ## make workspaces/NAME for PROFILE=NAME, where dvc and portllm then work as they do here
	@test -n '$(PROFILE)' -a -f 'profiles/$(PROFILE).yaml' || { \
	  echo "profiles/$(PROFILE).yaml is not there; expected PROFILE=one of:" $(basename $(notdir $(wildcard profiles/*.yaml))); exit 1; }
	@mkdir -p '$(WORKSPACE)/.dvc' '$(WORKSPACE)/data' data/local
	@ln -sfn ../../dvc.yaml '$(WORKSPACE)/dvc.yaml'
	@test ! -L '$(WORKSPACE)/params.yaml' || rm '$(WORKSPACE)/params.yaml'  # an earlier version made a link
	@test -e '$(WORKSPACE)/params.yaml' || cp 'profiles/$(PROFILE).yaml' '$(WORKSPACE)/params.yaml'
	@cmp -s 'profiles/$(PROFILE).yaml' '$(WORKSPACE)/params.yaml' || echo \
	  'note: $(WORKSPACE)/params.yaml is not profiles/$(PROFILE).yaml and is what counts; remove it to take the profile'
	@ln -sfn ../../portllm '$(WORKSPACE)/portllm'
	@ln -sfn ../../.dvcignore '$(WORKSPACE)/.dvcignore'
	@ln -sfn ../../../data/local '$(WORKSPACE)/data/local'
	@ln -sfn ../../../.dvc/plots '$(WORKSPACE)/.dvc/plots'
	@test -f '$(WORKSPACE)/.dvc/config' || cp .dvc/config '$(WORKSPACE)/.dvc/config'
	@printf '%s\n' /config.local /tmp /cache >'$(WORKSPACE)/.dvc/.gitignore'
	@cd '$(WORKSPACE)' && dvc config cache.type reflink,hardlink,copy  # large files are not kept twice

# One process for each core; tests that share what is slow to make stay together (tests/conftest.py has the groups).
PYTEST := HF_HUB_OFFLINE=1 pytest -n auto --dist loadgroup --no-loadscope-reorder

test: $(READY) ## run the tests
	$(PYTEST)

test-fast: $(READY) ## run the tests that take no more than a few seconds each
	$(PYTEST) -m 'not slow'

check: $(READY) ## lint, types and the architecture's laws
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-cache

seeds: $(READY) ## repeat the experiment with other seeds: make seeds SEEDS="1 2"
	@git rev-parse --git-dir >/dev/null 2>&1 || { echo 'make seeds: dvc exp stores its runs in git, and there is no' \
	  'repository here; create one: git init && git add -A && git commit -m "Start"'; exit 1; }
	for seed in $(SEEDS); do dvc exp run --temp --name seed-$$seed \
	  -S prepare.seed=$$seed -S fetch.seed=$$seed -S evolve.seed=$$seed -S train.seed=$$seed || exit 1; done
	python benchmarks/seeds.py

costs: $(READY) ## report what the stages cost on this machine (results/cost, which DVC and git do not track)
	$(THERE)portllm report --costs

ui: $(READY) ## browse the runs and the registered models in MLflow
	@echo "open http://127.0.0.1:$(PORT)/#/experiments/1/runs?workflowType=machine_learning"
	$(THERE)MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
	  mlflow ui --port $(PORT) --workers 1 --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"

constraints: $(READY) ## write constraints.txt from what .venv holds
	{ head -1 constraints.txt; pip list --format=freeze --exclude-editable | sed 's/+cpu//' | grep -v '^pip='; } > .constraints.new
	mv .constraints.new constraints.txt

clean: ## remove caches and what make setup made (results and DVC's cache stay)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup repro doctor workspace test test-fast check seeds costs ui constraints clean
