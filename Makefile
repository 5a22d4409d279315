# `make help` lists what there is. Settings: PYTHON, TORCH (a version of torch), ARGS (for the demo),
# WORKERS (processes that run the tests), DOCS (options of sphinx-build, such as -D plot_gallery=0).

PYTHON ?= python3
TORCH ?= 2.13.0
WORKERS ?= 2
# Kernels are compiled with the newest Triton, and with this one, beside it.
OLDEST_TRITON := 3.6.0
BIN := .venv/bin
STAMP := .venv/torch-$(TORCH).installed
# The demo needs less, in an environment that is not there yet.
QUICK := .venv/demo-$(TORCH).installed
BENCH := .venv/bench-$(TORCH).installed
NATIVE := $(shell find csrc)

# Tests compile CUDA kernels where no GPU is.
check test lint bench docs: export PYCOHERENCE_BUILD ?= $(if $(shell command -v nvcc || ls $(CUDA_HOME)/bin/nvcc 2>/dev/null),cuda,cpu)

# The Python layers; ops, kernels, builds, traces, hosts, several processes and what is marked slow are left out.
CHECKED := --ignore tests/unit/ops --ignore tests/unit/distributed --ignore tests/unit/compiled tests/unit \
	tests/package/test_layout.py tests/package/test_docs.py tests/package/test_site.py pycoherence

.PHONY: help demo check test lint bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train on true and on random labels and plot the coherence (ARGS=... are passed on)"
	@echo "make check   run the tests of the Python layers, in two minutes on two cores"
	@echo "make test    run all tests"
	@echo "make lint    check formatting, style and types"
	@echo "make bench   measure ops and training beside other libraries, for docs/benchmarks.md"
	@echo "make docs    build the documentation site in build/docs, and run the examples (DOCS=... are passed on)"
	@echo "make clean   remove the environment and everything built"
	@echo "Each sets up .venv first, with torch $(TORCH); TORCH=... picks another version."

demo: $(if $(wildcard $(STAMP)),$(STAMP),$(QUICK))
	$(BIN)/python -m pycoherence demo $(ARGS)

check: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) -m "not slow" $(CHECKED)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --durations=30 --durations-min=1

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(NATIVE))
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(BENCH)
	$(BIN)/python -m bench ops
	$(BIN)/python -m bench training
	$(BIN)/python -m bench report

# Warnings are errors, among them links and anchors that lead nowhere.
docs: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -q -d build/doctrees $(DOCS) docs build/docs

clean:
	rm -rf docs/gallery
	rm -rf .venv build dist *.egg-info pycoherence/*.so pycoherence/_build.json

$(QUICK): Makefile pyproject.toml setup.py $(NATIVE)
	@echo "Making an environment in .venv with torch $(TORCH), and building the CPU kernels: about two minutes"
	@echo "beside the download of torch."
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "torch==$(TORCH)" "setuptools>=77.0.3" wheel ninja
	bash -o pipefail -c '$(BIN)/pip install -v --no-build-isolation -e ".[studies]" 2>&1 | \
		grep --line-buffered -E "^ *\[[0-9]+/[0-9]+\]|error|Successfully"'
	touch $@

# torch comes first, alone: it is large, and the build and all that depends on it must use this one.
$(STAMP): Makefile pyproject.toml setup.py $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "$(PYTHON) cannot make environments: install its venv package (Debian: python3-venv)"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install "torch==$(TORCH)"
	$(BIN)/pip install "setuptools>=77.0.3" wheel ninja
	$(BIN)/pip install --no-build-isolation "torch==$(TORCH)" -e ".[dev,studies,models,hosts,docs]"
	test "$$(uname -s)" != Linux || \
		$(BIN)/pip install --upgrade --no-deps --target .venv/triton-oldest "triton==$(OLDEST_TRITON)"
	rm -f .venv/*.installed
	touch $@

# The rivals ask for torchvision, which asks for a torch of its own: the one that is here is named too.
$(BENCH): $(STAMP)
	$(BIN)/pip install --no-build-isolation "torch==$(TORCH)" -e ".[bench]"
	touch $@
