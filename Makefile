# `make demo` and `make test` do all the set-up they need in .venv; a second call installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A GPU machine keeps the torch build of its CUDA version; elsewhere constraints.txt pins the tested one.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')
ifeq ($(CUDA),)
  EXTRAS := cpu,dev
  PINS := -c constraints.txt
else ifeq ($(shell test $(CUDA) -ge 13 && echo yes),yes)
  EXTRAS := cuda13,dev
  PINS :=
else
  EXTRAS := cuda12,dev
  PINS :=
endif

.PHONY: demo test check lint type docs doctor gpu tune sanitize bench convergence static clean

demo: $(VENV)/installed
	$(BIN)/mam2 demo --out runs/demo

# A process per core, up to eight; a file's tests stay in one process, which shares what they set up. Files with many slow
# tests come first (tests/helpers/order.py). JOBS=0: in this process.
JOBS ?= auto --maxprocesses 8
XDIST := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed
	$(BIN)/python -m pytest $(XDIST)

# The fast tier, before each commit: under 3 minutes on 2 idle cores.
check: $(VENV)/installed
	$(BIN)/python -m pytest $(XDIST) -m "not slow"
	$(MAKE) lint type

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/installed
	$(BIN)/mypy -p mam2

# The site, into build/site; the page of the config keys is written anew first.
docs: $(VENV)/docs
	$(BIN)/python docs/generate_configuration.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

doctor: $(VENV)/installed
	$(BIN)/mam2 doctor

# A GPU machine without network has no .venv: its own Python serves. `gpu` needs no installation there, the others do:
# pip install --no-deps --no-build-isolation -e .
PY = $(if $(wildcard $(VENV)/installed),$(BIN)/python,python3)

gpu:
	$(PY) -m benchmarks.gpu $(ARGS)

# Writes the GPU's rows of kernels/launch_table.json, or with ARGS="--out FILE" a table elsewhere.
tune:
	$(PY) -m benchmarks.tune $(ARGS)

sanitize:
	$(PY) -m benchmarks.sanitize $(ARGS)

bench:
	$(PY) -m pytest benchmarks --benchmark-quiet $(ARGS)

# Half the epochs, and half the time? About two hours on two cores; ARGS=--quick in minutes. With labeled real clips
# where there are any: ARGS="--real-train DATA --real-test DATA"; see docs/convergence.md.
MIRACL := ../shared/miracl
ASKED := words_by_speaker phrases_by_speaker speaker_by_instance
LISTS = $(foreach name,$(ASKED),--real-train $(MIRACL)/$(name)_train.csv --real-test $(MIRACL)/$(name)_test.csv)
REAL := $(if $(wildcard $(MIRACL)/meta.csv),$(LISTS) --real-pretrain $(MIRACL)/unlabelled_by_speaker_train.csv \
	--real-group $(MIRACL)/meta.csv:speaker --real-shots speaker_by_instance=5)
convergence: $(VENV)/installed
	$(BIN)/python -m benchmarks.convergence $(REAL) $(ARGS)

# The tables of machine code and the prediction from them: after a change of the kernels or their launch table.
static: $(VENV)/installed
	$(BIN)/python -m tests.kernels.compile_kernels --write
	$(BIN)/python -m benchmarks.predict

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/installed: setup.py constraints.txt mam2/__init__.py
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"Python 3.10 or newer is needed, found {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo 'installing the packages of [$(EXTRAS)] into $(VENV): minutes, only the first time'
	$(BIN)/python -m pip install --quiet $(PINS) -e '.[$(EXTRAS)]'
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@
