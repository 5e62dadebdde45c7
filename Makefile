# Most targets work in .venv, which the first of them creates and later ones reuse.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCHES ?= losses similarity data
OUT ?= runs
WORKERS ?= 2
# Losses that the adapters are compared with. Without their dependencies, but for the last six, which the imports need.
ORIGINALS := inf-cl info-nce-pytorch lightly lightly-utils open-clip-torch pytorch-metric-learning \
    sentence-transformers solo-learn stable-pretraining ftfy loguru regex tokenizers transformers wcwidth
CORE := $(addprefix tests/,losses project/test_structure.py project/test_rooms.py rowstats/test_rowstats.py \
    rowstats/test_dispatch.py rowstats/test_triton_prepare.py rowstats/test_triton_stats.py similarity/test_similarity.py \
    similarity/test_accumulator.py similarity/test_spearman.py data/test_plan.py data/test_loader.py train/test_config.py)

.DEFAULT_GOAL := help
.PHONY: help demo check test lint coverage docs matrix bench reproduce clean

help:
	@echo 'make demo      train small models on the same views, measure how they align, write a report to $(OUT)/demo'
	@echo 'make check     style, types and the core tests: run it after every change'
	@echo 'make test      style, types and all tests: about a quarter of an hour'
	@echo 'make lint      style and types only: about a minute'
	@echo 'make coverage  the core tests, with the lines of fastcl that they do not reach'
	@echo 'make docs      build the documentation into $(OUT)/docs; needs no network once .venv exists'
	@echo 'make matrix    other versions of PyTorch and Triton, on Python 3.12 and 3.10 if installed: 6 GB each in .matrix'
	@echo 'make bench     benchmarks ($(BENCHES)); results go to $(OUT)/bench'
	@echo 'make reproduce the questions of arXiv 2510.08852 on small networks: about 90 minutes on two cores, 1 GB of memory each;'
	@echo '               IMAGES=FOLDER has the images, results go to $(OUT)/reproduction; a stopped run goes on'
	@echo 'make clean     remove .venv, .matrix, build output and caches; keeps the results in $(OUT)/'
	@echo
	@echo 'The first demo, check, test, lint, docs, bench or reproduce installs everything into .venv: a few minutes and about 8 GB.'
	@echo 'To use another interpreter (3.11 or newer): make PYTHON=python3.12 demo'

# The stamp is removed before an update and restored only after the last step, so an interrupted install never counts as
# complete. Without a stamp the next run starts from an empty .venv, with an old one it updates the existing .venv.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is required; $(PYTHON) is " + sys.version.split()[0])'
	@if [ -e $@ ]; then \
	    echo 'Updating $(VENV): the dependencies have changed.'; rm $@; \
	else \
	    echo 'Creating $(VENV) with $(PYTHON).'; $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo 'Installing fastcl, PyTorch and the tools into $(VENV); pip writes its log to $(VENV)/install.log.'
	@echo 'The first time this takes a few minutes and about 8 GB.'
	@$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --no-input \
	    -c constraints.txt -e '.[train,dali,bench,docs,dev]' > $(VENV)/install.log 2>&1 \
	    && $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --no-input --no-deps \
	    -c constraints.txt $(ORIGINALS) >> $(VENV)/install.log 2>&1 \
	    || { tail -n 20 $(VENV)/install.log >&2; echo 'Installation failed; above is the end of $(VENV)/install.log.' >&2; exit 1; }
	@touch $@
	@echo 'Installed. Later runs reuse $(VENV).'

demo: $(STAMP)
	@echo 'Running the demo; its report goes to $(OUT)/demo.'
	@$(BIN)/fastcl demo --out $(OUT)/demo

lint: $(STAMP)
	@echo 'Checking style with ruff.'
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check --quiet .
	@echo 'Checking types with basedpyright.'
	@$(BIN)/python .ci/type_errors.py

check: lint
	@echo 'Running the core tests in $(WORKERS) processes.'
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m 'not slow and not dist' $(CORE)

coverage: $(STAMP)
	@echo 'Running the core tests in $(WORKERS) processes and measuring which lines of fastcl they reach.'
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m 'not slow and not dist' --cov --cov-report=term-missing:skip-covered $(CORE)

test: lint
	@echo 'Running the tests in $(WORKERS) processes; the ten slowest are listed at the end.'
	@$(BIN)/python -m pytest --durations=10 -n $(WORKERS) --dist loadfile --no-loadscope-reorder

docs: $(STAMP)
	@echo 'Building the documentation into $(OUT)/docs.'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir $(OUT)/docs
	@echo 'Built: $(OUT)/docs/index.html'

matrix:
	@.ci/matrix

bench: $(STAMP)
	@set -e; for bench in $(BENCHES); do \
	    echo "Measuring $$bench; results go to $(OUT)/bench."; \
	    $(BIN)/python -m bench.$$bench --out $(OUT)/bench; \
	done

reproduce: $(STAMP)
	@$(BIN)/python -m bench.reproduction --out $(OUT)/reproduction $(if $(IMAGES),--data $(IMAGES))

clean:
	@echo 'Removing $(VENV), .matrix, build output and caches; keeping $(OUT)/.'
	@rm -rf $(VENV) .matrix build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache .benchmarks .coverage
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
