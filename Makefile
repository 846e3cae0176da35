# Every target sets up what it needs, in $(VENV), from the pins in requirements/.

PYTHON        ?= python3
KERAS_BACKEND ?= tensorflow
KNOWN         := tensorflow jax torch
BACKENDS      ?= $(KNOWN)
BENCH         ?= layers
VENV          := .venv
SUITE_NEEDS   := $(KNOWN) dev examples

# glibc shall keep freed memory, as it does once a large model has trained: else page faults on fresh
# memory, ours and the rivals', are most of what there is to measure.
KEEP_MEMORY := MALLOC_TRIM_THRESHOLD_=2147483648 MALLOC_MMAP_THRESHOLD_=2147483648 \
	MALLOC_TOP_PAD_=268435456 MALLOC_ARENA_MAX=1

# The oldest Keras is stated in one place, the package's own requirement.
OLDEST_KERAS := $(shell sed -n 's/.*"keras>=\([0-9.]*\)".*/\1/p' pyproject.toml)

COMPILED := $(wildcard keras_bn/kernels/compiled/*.[ch])

BIN     := $(VENV)/bin
# Modules are compiled when they are first imported: most of what is installed never is.
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
STAMPS  := $(VENV)/stamps
PARTIAL := $(VENV)/partial
OLDER   := $(VENV)/oldest-keras

# Else each of the many processes would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo bench test test-oldest lint clean known-KERAS_BACKEND known-BACKENDS
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: known-KERAS_BACKEND $(STAMPS)/$(KERAS_BACKEND) $(STAMPS)/examples  ## train on digits (KERAS_BACKEND=tensorflow|jax|torch)
	KERAS_BACKEND=$(KERAS_BACKEND) TF_CPP_MIN_LOG_LEVEL=2 $(BIN)/python examples/digits.py

bench: known-KERAS_BACKEND $(STAMPS)/$(KERAS_BACKEND) $(STAMPS)/examples  ## time the layers beside Keras' (KERAS_BACKEND=..., BENCH=passes)
	KERAS_BACKEND=$(KERAS_BACKEND) TF_CPP_MIN_LOG_LEVEL=3 $(KEEP_MEMORY) $(BIN)/python benchmarks/$(BENCH).py $(ARGS)

test: known-BACKENDS $(SUITE_NEEDS:%=$(STAMPS)/%)  ## run the suite (BACKENDS="jax torch", ARGS="-k moments", MINUTES=30)
	@$(BIN)/python tests/run_suite.py --backends="$(BACKENDS)" $(if $(MINUTES),--minutes=$(MINUTES)) $(ARGS)

# Only tests that ask something of Keras. It alone is older: the rest is what `test` has installed.
test-oldest: ARGS ?= tests/core tests/layers tests/models
test-oldest: $(patsubst %,$(STAMPS)/%,torch dev examples oldest-keras)  ## test on the oldest supported Keras, with PyTorch
	@PYTHONPATH=$(CURDIR)/$(OLDER) $(BIN)/python tests/run_suite.py --backends=torch $(ARGS)

lint: $(STAMPS)/dev  ## ruff and mypy
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

clean:  ## remove the environments, caches and builds
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

known-KERAS_BACKEND known-BACKENDS: known-%:
	$(if $(filter-out $(KNOWN),$(or $($*),none)),$(error $* must be among: $(KNOWN). Received: $*=$($*)))

# One stamp per requirement file, written after its installation. An interrupted pip can leave
# a package that looks installed, so the mark it leaves behind makes the next run start afresh.
define install
	@echo "$(VENV): installing $(@F)"
	@touch $(PARTIAL)
	@$(PIP) $(1)
	@touch $@ && rm $(PARTIAL)
endef

$(STAMPS)/venv: $(wildcard $(PARTIAL))
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo 'PYTHON must be Python 3.11 to 3.13. Received: PYTHON=$(PYTHON)' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@mkdir $(STAMPS) && touch $@

$(STAMPS)/base: requirements/base.txt requirements/constraints.txt pyproject.toml setup.py $(STAMPS)/venv $(COMPILED)
	$(call install,-r $< && $(PIP) --no-deps --no-build-isolation --editable .)

$(STAMPS)/oldest-keras: pyproject.toml $(STAMPS)/venv | $(STAMPS)/base
	$(call install,--no-deps --upgrade --target $(OLDER) keras==$(OLDEST_KERAS))

$(STAMPS)/%: requirements/%.txt requirements/constraints.txt $(STAMPS)/venv | $(STAMPS)/base
	$(call install,-r $<)
