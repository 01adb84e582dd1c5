# Two commands on a fresh machine with Python 3.11, pip and make: `make demo` and `make test`.
# Both make .venv from constraints.txt when it is missing; nothing else is installed anywhere.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT := demo-data
# Two processes, each with whole files, because files share what is slow to set up (Ray, a trained model).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test unit lint slow clean

demo: $(STAMP)  ## the whole path on a small generated corpus; ends with a report and a query
	$(BIN)/videobert demo --out $(OUT)

test: $(STAMP)  ## every test but the slow ones
	$(PYTEST) -m "not slow"

unit: $(STAMP)  ## the tests that start no Ray and no network: about a minute
	$(PYTEST) -m "not slow and not integration"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(STAMP)  ## proofs of minutes
	$(BIN)/python -m pytest -m slow

# pip takes the versions from constraints.txt, so the environment is the one that the tests ran in.
$(STAMP): constraints.txt pyproject.toml
	@echo "installing into $(VENV) (about 3 GB, a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) demo-data .pytest_cache .mypy_cache .ruff_cache
