# `make quickstart` needs nothing but Python 3.11 or 3.12 (PYTHON=python3.12 where python3 is another), `make test` also Chromium, Slurm
# and munge, which .ci/run installs. Each makes .venv first if there is none.
PYTHON ?= python3
# PIP_FLAGS goes to every pip install: an index with the CPU build of torch, say, where the default one has CUDA builds only.
PIP_FLAGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test check unit lint bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## the virtual environment .venv with everything pinned in constraints.txt

# torch comes first and from the constraints: what follows must not choose another build of it.
$(STAMP): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev,decoders,export,lora,remote,text]"
	touch $@

quickstart: $(STAMP)  ## the main job: demo videos -> curation -> VAE -> DiT -> samples -> evaluation -> export -> report
	$(BIN)/videofm run configs/quickstart.yaml

test: $(STAMP)  ## lint, types, import rules and every test (those that need a GPU are skipped without one)
	$(BIN)/python tools/check.py --no-tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(STAMP)  ## lint, types, import rules, unit tests; a minute or two
	$(BIN)/python tools/check.py

lint: $(STAMP)  ## ruff, with its safe repairs
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## list the benchmarks
	@$(BIN)/python tools/check.py --list-bench

clean:  ## caches and build outputs; runs/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
