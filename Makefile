# Every target works on a fresh clone: what needs the environment makes it first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RAW ?= raw
DATA ?= data
PRESET ?= tiny
RUN ?= runs/$(PRESET)
DEMO := demo
STAMP := $(VENV)/.installed
JOBS ?= 2
# More threads than one in each of the processes would only compete.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help setup demo ingest stats train check test test-slow bench clean

help:  ## show these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

setup: $(STAMP)  ## create .venv and install everything, with the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11. Say which to use: make PYTHON=python3.12 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(STAMP)  ## ingest the shipped images, audit them, train tokenizer and ViT for some steps, write pictures
	rm -rf $(DEMO)
	$(BIN)/pumit-data ingest sample --raw . --data $(DEMO)
	$(BIN)/pumit-data stats --data $(DEMO) --plot $(DEMO)/audit.png
	$(BIN)/pumit-train tokenizer --preset tiny --data $(DEMO) --run $(DEMO)/tokenizer
	$(BIN)/pumit-train mim --preset tiny --data $(DEMO) --tokenizer $(DEMO)/tokenizer --run $(DEMO)/mim
	@$(BIN)/python -c 'from pathlib import Path; d = Path("$(DEMO)"); \
	  print("\nWhat the demo left:", *sorted(str(p) for g in ("catalog", "shards", "*.png", "*/pictures/*.png", "*/checkpoints/*") for p in d.glob(g)), sep="\n  ")'

ingest: $(STAMP)  ## ingest one dataset: make ingest DATASET=amos [RAW=folder] [DATA=folder]
	@$(BIN)/pumit-data ingest '$(DATASET)' --raw '$(RAW)' --data '$(DATA)'

stats: $(STAMP)  ## audit the corpus: make stats [DATA=folder]
	@$(BIN)/pumit-data stats --data '$(DATA)' --plot '$(DATA)/audit.png'

train: $(STAMP)  ## train tokenizer, then ViT: make train [PRESET=tiny] [DATA=folder] [RUN=folder]
	$(BIN)/pumit-train tokenizer --preset $(PRESET) --data '$(DATA)' --run '$(RUN)/tokenizer'
	$(BIN)/pumit-train mim --preset $(PRESET) --data '$(DATA)' --tokenizer '$(RUN)/tokenizer' --run '$(RUN)/mim'

check: $(STAMP)  ## lint, format, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ingest catalog shards training cli.py
	$(BIN)/lint-imports

test: check  ## check, then the test suite (under 10 minutes on 2 cores)
	$(PYTEST) --dist loadfile -m 'not slow'  # the tests of a file share costly fixtures

test-slow: $(STAMP)  ## what takes longer (under 40 minutes on 2 cores)
	$(PYTEST) -m slow

bench: $(STAMP)  ## run the benchmarks against their peers; figures go to build/benchmarks/
	@mkdir -p build/benchmarks
	@for script in $$(grep -l '"--json"' benchmarks/*.py); do \
	  $(BIN)/python $$script --json build/benchmarks/$$(basename $$script .py).json || exit 1; done

clean:  ## remove the environment, caches and what the demo made
	rm -rf $(VENV) $(DEMO) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
