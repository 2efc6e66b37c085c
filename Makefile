# make demo and make test each work alone on a fresh clone: Python 3.10+ and a C++17 compiler are all they need.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/* tests/emulate/*)
DEMO := runs/demo
TORCH36 ?= $$(grep '^torch==' requirements.txt)

.PHONY: gpu build test test-full sanitize static test-triton36 demo bench docs lint clean

build: .venv/.built

.venv/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -q $$(grep '^torch==' requirements.txt)
	$(PIP) install -q -r requirements.txt
	touch $@

.venv/.built: .venv/.installed $(SOURCES)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	PIX2REP_BUILD=emulate $(BIN)/python setup.py -q build_ext --inplace
	touch $@

test: build
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

# Wider sweeps, 400 Hypothesis examples a test, every kernel compiled for every chip.
test-full: build
	PIX2REP_TEST=full $(BIN)/python -m pytest

# The C++ bodies without torch under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
sanitize: .venv/.installed
	$(BIN)/python tests/sanitize/run.py

static: build
	$(BIN)/python -m benchmarks.static

# The oldest Triton that is supported, beside the same torch: every kernel compiles, every op runs interpreted once.
test-triton36: .venv36/.built
	.venv36/bin/python -m benchmarks.static --sample --out build/static36
	TRITON_INTERPRET=1 .venv36/bin/python -m pytest tests/test_smoke.py

.venv36/.built: requirements-triton36.txt requirements.txt $(SOURCES)
	test -x .venv36/bin/python || $(PYTHON) -m venv .venv36
	.venv36/bin/python -m pip install -q $(TORCH36) $$(grep -E '^(setuptools|pytest)==' requirements.txt)
	.venv36/bin/python -m pip install -q --no-deps -r requirements-triton36.txt
	.venv36/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

demo: build
	rm -rf $(DEMO)
	$(BIN)/pix2rep phantom $(DEMO)/data
	$(BIN)/pix2rep pretrain $(DEMO)/data $(DEMO)/run --config demo
	$(BIN)/pix2rep probe $(DEMO)/run
	$(BIN)/pix2rep finetune $(DEMO)/run
	$(BIN)/pix2rep check $(DEMO)/run --probe-above-random

# Every op at its default sizes, under ten minutes on two idle cores; the committed results are those of --large with the peers (README).
bench: build
	$(BIN)/python -m benchmarks.run --json build/bench

# Where a GPU is, with the environment's own torch and triton; objects that load are used, others built for that GPU alone.
gpu:
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m benchmarks.gpu $(GPU_OPTIONS)

# The pages of docs/ in build/site, with tools of their own; `make test` runs what the pages say.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/.installed: requirements-docs.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install -q -r requirements-docs.txt
	touch $@

lint: .venv/.installed
	$(BIN)/ruff check .

clean:
	rm -rf .venv .venv36 .venv-docs build dist runs *.egg-info pix2rep_kernels/*.so pix2rep_kernels/_build.json
