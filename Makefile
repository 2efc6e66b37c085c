# make demo and make test each work alone on a fresh clone: Python 3.10+ and a C++17 compiler are all they need.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*)
DEMO := runs/demo

.PHONY: build test demo bench lint clean

build: .venv/.built

.venv/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -q $$(grep '^torch==' requirements.txt)
	$(PIP) install -q -r requirements.txt
	touch $@

.venv/.built: .venv/.installed $(SOURCES)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

test: build
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

demo: build
	rm -rf $(DEMO)
	$(BIN)/pix2rep phantom $(DEMO)/data
	$(BIN)/pix2rep pretrain $(DEMO)/data $(DEMO)/run --config demo
	$(BIN)/pix2rep probe $(DEMO)/run
	$(BIN)/pix2rep finetune $(DEMO)/run
	$(BIN)/pix2rep check $(DEMO)/run --probe-above-random

bench: build
	$(BIN)/python -m pytest benchmarks/bench_*.py

lint: .venv/.installed
	$(BIN)/ruff check .

clean:
	rm -rf .venv build dist runs *.egg-info pix2rep_kernels/*.so pix2rep_kernels/_build.json
