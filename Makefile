# Two commands on a fresh machine with Python 3.11 or later: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test lint slow
demo: $(VENV)/installed
	$(RUN) -m gpdfx.cli.demo

test: lint
	$(RUN) -m pytest -n 2

lint: $(VENV)/installed
	$(RUN) -m ruff check gpdfx passes kernels benchmarks tests
	$(RUN) -m ruff format --check gpdfx passes kernels benchmarks tests
	$(RUN) -m mypy

slow: $(VENV)/installed
	$(RUN) -m pytest -n 2 -m slow

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
