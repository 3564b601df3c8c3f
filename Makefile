# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Each process computes in one thread, and takes a gigabyte of memory.
PARALLEL := --numprocesses=2 --dist=worksteal
# What make fuzz runs.
FUZZ := readers streams containers stores
CASES ?= 5000
SEED ?= 0

.PHONY: test unit explore fuzz lint types demo bench clean

test: lint types unit

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers don't follow an editable install to compressors/ and analyses/: show them the tree that a wheel has.
types: $(INSTALLED)
	$(BIN)/python tests/type_tree.py build/types
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p kcomplex

# The same examples in every run: a failure belongs to the change that it shows on.
unit: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) --hypothesis-profile=ci

# New random examples in every run.
explore: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) --hypothesis-profile=default

# Damaged and forged inputs: CASES of each script, from SEED on.
fuzz: $(INSTALLED)
	for script in $(FUZZ); do \
		OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.$$script --cases $(CASES) --seed $(SEED) || exit 1; \
	done

demo: $(INSTALLED)
	$(BIN)/kcomplex demo

bench: $(INSTALLED)
	$(BIN)/python tests/bench/run.py

clean:
	rm -rf .venv .venv-bench build dist out *.egg-info
