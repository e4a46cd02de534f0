# Every target builds .venv on first use and installs what it needs; nothing has to be set up by hand.
PYTHON ?= python3
BIN = .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-fast bench gpu-check lint format

demo: .venv/installed  ## The three-step pipeline on the sandbox, ending in runs/demo/report.html
	$(BIN)/prefopt pipeline --config recipes/tiny/pipeline.yaml

# One worker per core, one thread each: tiny tensors gain nothing from more. A worker has whole files, whose fixtures are
# made once, until it takes from the other's rest.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: .venv/installed  ## Everything
	$(PYTEST)

test-fast: .venv/installed  ## Without the files marked slow: the arithmetic, the rows, the commands, each in moments
	$(PYTEST) -m "not slow"

bench: .venv/installed  ## Ratios against K rows and against TRL in one table, with the bound of each; FOLDER=models/smollm2
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench.py $(FOLDER)

gpu-check: .venv/installed  ## Everything that only a GPU can show, in one table within 8 minutes; on a CPU in miniature
	$(BIN)/prefopt gpu-check

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,eval,label]'
	touch $@
