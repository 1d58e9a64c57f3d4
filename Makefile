# `make demo` and `make test` do all their own set-up; nothing else is needed. Tests of pages need `make browser` too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# BROWSER=required: no Chromium is an error, and not a reason to leave its tests out.
BROWSER ?= optional
# Tests run in so many processes, of a thread each; sets have the same order in all.
PROCESSES ?= 2
ONE_THREAD := PYTHONHASHSEED=0 OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
# Files in their order: by number of tests, the slow ones, which are whole runs, would come last, one process waiting.
PYTEST := pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
HAVE_BROWSER = command -v chromium >/dev/null && command -v chromedriver >/dev/null
NO_BROWSER = NOT RUN: the tests marked 'browser' (the report in a real browser): chromium or chromedriver is missing; make browser

.PHONY: demo vision-demo test docs test-long transformers-4 other-python browser format clean

demo: $(STAMP)
	$(BIN)/ksvd-sae run demo

# Two wheels of 104 MB are fetched beside, and not installed.
vision-demo: $(STAMP)
	$(BIN)/ksvd-sae run vision-demo
	$(BIN)/ksvd-sae run vision-demo-digits

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	@if [ $(BROWSER) = required ] || { $(HAVE_BROWSER); }; then \
		set -x; $(ONE_THREAD) $(BIN)/$(PYTEST) -m "not slow and not gpu"; \
	else \
		echo "$(NO_BROWSER)"; \
		$(ONE_THREAD) $(BIN)/$(PYTEST) -m "not slow and not gpu and not browser" && echo "$(NO_BROWSER)"; \
	fi

# NO_MKDOCS_2_WARNING: Material's news of MkDocs' future, in colours.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html; with search: $(BIN)/python -m http.server -d site"

# Debian's packages; elsewhere, install Chromium and its driver by hand.
browser:
	@if ! { $(HAVE_BROWSER); }; then \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; } \
			|| { echo "make browser needs root and apt-get: install chromium and chromedriver by hand" >&2; exit 1; }; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
	fi
	chromium --version && chromedriver --version

# Minutes to hours; their counts go to results/reliability.json.
test-long: $(STAMP)
	$(BIN)/pytest -m "slow or not slow" --reliability tests/survival
	$(BIN)/pytest -m slow --ignore tests/survival

# constraints.txt names the newest; this runs what loads and scores models with the oldest allowed, which it adds beside.
OLDEST := $(CURDIR)/$(VENV)/transformers-4
transformers-4: $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(OLDEST) 'transformers==4.57.*' \
		'transformer-lens==3.2.*' 'huggingface_hub==0.36.*' 'tokenizers==0.22.*'
	PYTHONPATH=$(OLDEST) $(BIN)/pytest -p no:cacheprovider -m "not slow and not gpu and not browser" \
		tests/activations tests/evals tests/hub tests/offline tests/path tests/run/test_published_run.py

# With PYTHON=...: the tests that another Python is likely to tell apart. Its environment, 7 GB, is deleted after.
OTHER := $(VENV)/other-python
other-python:
	@$(PYTHON) -c 'import sys; print("Python", sys.version)'
	@trap 'rm -rf $(OTHER)' EXIT; set -ex; \
		$(MAKE) VENV=$(OTHER) $(OTHER)/.installed; \
		$(ONE_THREAD) $(OTHER)/bin/$(PYTEST) -p no:cacheprovider -m "not slow and not gpu and not browser" $(OTHER_TESTS)
OTHER_TESTS := tests/learning tests/activations/test_harvest.py tests/run/test_config.py tests/run/test_pipeline.py \
	tests/evals/test_heldout.py tests/path/test_bridge_path.py \
	$(patsubst %,tests/test_%.py,arguments cli dictionary estimator import sae sae_gradients store)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13) and "ksvd_sae needs Python 3.10 to 3.12: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,docs]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) site
