# `make` shows what there is. `make run` and `make test` set up by themselves.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/set-up
CODE := leadre_lib jobs dags tests benchmarks

# What a user says on the command line, as the settings that it stands for.
ifdef SOURCE
export LEADRE_SOURCE := $(SOURCE)
endif
ifdef ENGINE
export LEADRE_ENGINE := $(ENGINE)
endif
ifdef DATA
export LEADRE_DATA := $(DATA)
endif
ifdef PROFILE
export LEADRE_PROFILE := $(PROFILE)
endif
ifdef HOME_DIR
export LEADRE_HOME := $(HOME_DIR)
endif
# One build of DeepSpeed's extension a clone: clones do not wait for each other's locks.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

# Of the benchmarks that train; SOURCE and DATA reach them as settings.
SEED_OPTIONS = $(if $(SEEDS),--seeds "$(SEEDS)") $(if $(DAYS),--days "$(DAYS)") \
  $(if $(filter-out 0,$(FORCE)),--force) $(if $(JSON),--json "$(JSON)")

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run test bench-quality ablation bench-decode bench-train bench-bulk-inference bench-cost bench-constraint-index bench-neighbours bench-churn bench-semantic-ids bench-quantiser-scale lint format airflow lock clean clean-state java

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  options of run: SOURCE=simulator|movielens|amazon|lake  DATA=folder  ENGINE=sail|spark"
	@echo "                  DAYS=2  FORCE=1  JSON=file  PROFILE=name in conf/  HOME_DIR=folder"
	@echo "  options of airflow: PORT=8080 and those of run that choose the data"

setup: $(STAMP) ## virtual environment in .venv with everything that is needed

$(STAMP): requirements.txt
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "error: Python 3.11 is needed and $(PYTHON) is not it: install it or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null \
	  || { echo "error: a C++ compiler is needed to build DeepSpeed's CPU extension: install g++ (Debian: apt-get install g++)" >&2; exit 1; }
	@echo "setting up $(VENV): about three minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet -r requirements.txt
	@rm -rf "$(TORCH_EXTENSIONS_DIR)"
# By its whole path, as the ranks are started: another path is another command, and built again.
	@PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu "$(CURDIR)/$(BIN)/python" -c \
	  'from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder as B; B().load(verbose=False)' >/dev/null
	@touch $@

run: setup ## the daily chain over a few days, through Airflow; ends with a table of results
	@$(BIN)/python -m jobs.run --days $(or $(DAYS),2) $(if $(filter-out 0,$(FORCE)),--force) \
	  $(if $(JSON),--json "$(JSON)")

test: setup java ## all tests
	$(BIN)/python -m pytest

bench-quality: setup ## all methods over SEEDS=3 seeds, without Airflow; SOURCE=, DATA=folder, JSON=
	@$(BIN)/python -m benchmarks.quality $(SEED_OPTIONS)

ablation: setup ## what each part is worth, over SEEDS=3 seeds (hours); ONLY=name,name, as bench-quality
	@$(BIN)/python -m benchmarks.ablation $(SEED_OPTIONS) $(if $(ONLY),--only "$(ONLY)")

bench-decode: setup ## users a second of the decoder against two baselines
	$(BIN)/python -m benchmarks.decode $(if $(JSON),--json "$(JSON)")

bench-train: setup ## tokens and targets a second of SFT, beside one target a sequence and a bare loop
	$(BIN)/python -m benchmarks.train $(if $(JSON),--json "$(JSON)")

bench-bulk-inference: setup ## 100,000 simulated users through the job: time, memory, kill, next day (an hour)
	$(BIN)/python -m benchmarks.bulk_inference $(if $(JSON),--json "$(JSON)")

bench-cost: setup ## the arithmetic of a night: FLOPs, bytes and GPUs; no measurement
	@$(BIN)/python -m benchmarks.cost $(if $(JSON),--json "$(JSON)")

bench-semantic-ids: setup ## report card of the four quantisers; DATA=folder adds Amazon reviews
	$(BIN)/python -m benchmarks.semantic_ids $(if $(SOURCE),--source "$(SOURCE)") \
	  $(if $(SEEDS),--seeds "$(SEEDS)") $(if $(JSON),--json "$(JSON)")

bench-quantiser-scale: setup ## seconds and memory of the quantisers up to 1,000,000 objects
	$(BIN)/python -m benchmarks.quantiser_scale $(if $(JSON),--json "$(JSON)")

bench-constraint-index: setup ## the constraint index against a trie of dictionaries
	$(BIN)/python -m benchmarks.constraint_index $(if $(JSON),--json "$(JSON)")

bench-neighbours: setup ## nearest marketing objects by embedding at three sizes, beside exact search
	$(BIN)/python -m benchmarks.neighbours $(if $(JSON),--json "$(JSON)")

bench-churn: setup ## a month of a changing catalogue through the index rebuild
	$(BIN)/python -m benchmarks.churn $(if $(JSON),--json "$(JSON)")

lint: setup ## check style, format and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: setup ## mend style and format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

airflow: setup ## Airflow's web interface and scheduler, on loopback, with the schedules on
	@$(BIN)/python -m jobs.airflow_server --port $(or $(PORT),8080)

# A local suffix such as torch's +cpu names one index's build; without it any build fits.
lock: setup ## resolve requirements.in into requirements.txt
	$(BIN)/pip-compile --strip-extras --no-emit-index-url --no-emit-find-links \
	  --no-emit-trusted-host --no-header --quiet --output-file requirements.txt requirements.in
	sed -i.bak -E 's/^([A-Za-z0-9_.-]+==[^+ ]+)\+[A-Za-z0-9.]+/\1/' requirements.txt
	rm requirements.txt.bak

# The tests of the `spark` engine need it; nothing else does.
java: # Java 17 or 21: there already, or installed where that is possible without asking
	@if java -version 2>&1 | grep -Eq 'version "(17|21)'; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Java 17 for the tests of the spark engine"; \
	  { apt-get update -qq && apt-get install -y -qq openjdk-17-jre-headless; } >/dev/null; \
	else \
	  echo "error: the tests of the spark engine need Java 17 or 21 (Debian: apt-get install openjdk-17-jre-headless)" >&2; \
	  exit 1; \
	fi

clean: ## remove the virtual environment and caches; results and state stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-state: ## remove the state in .leadre: lakes, releases, reports, Airflow's database
	rm -rf .leadre
