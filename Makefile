# On a fresh machine with Python 3.11 or later; the first command makes a virtual environment.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
CODE = gpdfx passes kernels benchmarks examples tests setup.py

.DEFAULT_GOAL = help
.PHONY: help demo test lint slow examples package bench gpu

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## train, expand, collapse and report: the main job, about a minute
	$(RUN) -m gpdfx.cli.demo

lint: $(VENV)/installed ## ruff and mypy
	$(RUN) -m ruff check $(CODE)
	$(RUN) -m ruff format --check $(CODE)
	$(RUN) -m mypy

test: lint ## lint, and all default tests
	$(RUN) -m pytest -n 2 --dist loadfile

slow: $(VENV)/installed ## the tests that take minutes each
	$(RUN) -m pytest -n 2 --dist loadfile -m slow

examples: $(VENV)/installed ## every recipe under examples/, each as a program of its own
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[examples]'
	$(RUN) -m pytest tests/test_examples.py -m examples

package: $(VENV)/installed ## build it, install it into a bare environment, use it there (minutes)
	.ci/package $(RUN)

bench: $(VENV)/installed ## benchmarks of a few minutes: lines, import, steps (files in build/)
	$(RUN) -m benchmarks.code_lines
	$(RUN) -m benchmarks.import_time
	$(RUN) -m benchmarks.speed --device cpu --only noise teacher gpd --branches none auto \
		--pairs 3 --out build/speed_cpu.csv

gpu: $(VENV)/installed ## what a GPU can tell in 400 seconds, the most worth knowing first
	$(RUN) -m benchmarks.gpu --seconds 400 --out build/gpu

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
