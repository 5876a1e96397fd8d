# Needs Python 3.11 or newer with venv, make and git. Each target is plain pip plus the `headwater` command.
PYTHON ?= python3
PIP := .venv/bin/pip --disable-pip-version-check install --quiet --no-input -c constraints.txt

.PHONY: demo test pages quick fuzz check trained bench matrix docs clean
.DELETE_ON_ERROR:

# Opens on a language model that others trained, and where it can not be had on one that comes with Headwater.
demo: .venv/.demo
	@.venv/bin/headwater models add smollm2-135m > /dev/null || true
	@.venv/bin/headwater dashboard

# Everything but the scripts of `make pages`, and its time in the last line: about fifteen minutes on two idle cores.
test: .venv/.test trained
	@.venv/bin/python -m pytest -n 2 -m "not page"

# The scripts behind docs/vision.md, held to the numbers there: about six minutes on two idle cores.
pages: .venv/.test trained
	@.venv/bin/python -m pytest -n 2 -m page

# While you work: without what takes seconds a test or needs a browser. About three minutes on two idle cores.
quick: .venv/.test trained
	@.venv/bin/python -m pytest -n 2 -m "not slow and not browser"

# Files changed at random, a minute for each kind; HEADWATER_FUZZ_SECONDS=3600 for hours. Another seed tries others.
fuzz: .venv/.test
	@HEADWATER_FUZZ_SECONDS=$${HEADWATER_FUZZ_SECONDS:-60} HEADWATER_FUZZ_SEED=$${HEADWATER_FUZZ_SEED:-$$(date +%s)} \
		.venv/bin/python -m pytest -n 2 tests/fuzz

check: .venv/.dev trained
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/python -m pytest -n 2

# The trained models that tests marked `real` run on: 267 MB to fetch, 722 MB in the cache; a second run skips this.
trained: .venv/.test
	@.venv/bin/headwater models add smollm2-135m dinov2-small minilm > /dev/null || \
		echo "Tests marked real are skipped on the models that could not be added."

# On an idle machine; each script says first what it measures, and writes nothing when a result is wrong.
bench: .venv/.test
	.venv/bin/python benchmarks/busy.py
	.venv/bin/python benchmarks/received_cpu.py
	.venv/bin/python benchmarks/flow.py
	.venv/bin/python benchmarks/patching.py
	.venv/bin/python benchmarks/pruning.py
	.venv/bin/python benchmarks/findings.py
	.venv/bin/python benchmarks/record_cpu.py --lengths 1024 4096 16384 32768
	.venv/bin/python benchmarks/overheads.py
	.venv/bin/python benchmarks/real_models.py
	.venv/bin/python benchmarks/circuits_mib.py --quick
	.venv/bin/python benchmarks/edge_attribution.py

# Every analysis on every architecture, into docs/models.md: about ten minutes on an idle core. One that was stopped goes on.
matrix: .venv/.test
	@.venv/bin/headwater doctor --matrix --write docs/models.md --resume .matrix > /dev/null
	@rm .matrix

# The documentation site, without a network: open build/docs/index.html. A warning is an error.
docs: .venv/.test
	@.venv/bin/python -m sphinx -q -W --keep-going docs build/docs
	@echo "The site is in build/docs/index.html"

# A stamp is older than the pins or the project file exactly when pip has to run again.
.venv/bin/python:
	@$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing Headwater into .venv (two to three minutes, 1.8 GB; a second run skips this)"
	@$(PIP) -e '.[dashboard,real]'
	@touch $@

.venv/.test: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing Headwater and its test tools into .venv (two to six minutes, 3.2 GB; a second run skips this)"
	@$(PIP) -e '.[test]'
	@touch $@ .venv/.demo

.venv/.dev: .venv/.test
	@$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache .hypothesis
