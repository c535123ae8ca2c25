# `make` alone prints what there is. Another interpreter: make PYTHON=python3.12 demo
# pip takes its options (another index, a proxy) from the environment: PIP_INDEX_URL and so on.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo up test soak lint format migrate bench constraints clean

ARGS ?=
BIN := .venv/bin

help: ## Print this list
	@echo "make demo trains, evaluates and predicts on this machine, in about two minutes."
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "ARGS is passed on: make test ARGS='-k lifecycle -x', make up ARGS='--port 8001'"

demo: .venv/.server ## Set up, then train, evaluate and predict once
	@$(BIN)/skipline demo $(ARGS)

up: .venv/.server ## Set up, then start the service and stay
	@$(BIN)/skipline up $(ARGS)

migrate: .venv/.server ## Bring the database to the newest schema
	@$(BIN)/skipline migrate

# What starts whole services comes last: two at a time, since most of it is waiting. 5: none of
# these was chosen.
test: .venv/.test ## Run every test
	@$(BIN)/python -m pytest -m 'not alone' -n auto --maxprocesses 4 --dist loadfile $(ARGS) \
	  || [ $$? -eq 5 ]
	@$(BIN)/python -m pytest -m alone -n 2 --dist loadfile $(ARGS) || [ $$? -eq 5 ]

soak: .venv/.test ## Kill processes at random for ten minutes while short jobs run
	@$(BIN)/python -m tests.soak $(ARGS)

lint: .venv/.test ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/.test ## Put the code into the one format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: .venv/.server ## Measure training against what a user would have otherwise
	@$(BIN)/python benchmarks/training.py $(ARGS)

constraints: .venv/bin/python ## Pin the newest versions of everything anew
	@echo "Resolving in a fresh environment; this downloads everything again."
	@rm -rf .venv-constraints
	@$(BIN)/python -m venv .venv-constraints
	@.venv-constraints/bin/python -m pip install --quiet '.[test]'
	@{ sed '/^[^#]/,$$d' constraints.txt; .venv-constraints/bin/python -m pip freeze \
	  | grep -v '^skipline '; } > constraints.new
	@mv constraints.new constraints.txt
	@rm -rf .venv-constraints build
	@echo "constraints.txt is new: run make test before committing it."

clean: ## Remove the environment and the caches; jobs and datasets stay
	@rm -rf .venv .venv-constraints .mypy_cache .ruff_cache .pytest_cache .hypothesis build

# The environment. A stamp is made when an installation is complete, and is out of date when what
# it was made from has changed. The test set-up holds the server's.

.venv/.test: pyproject.toml constraints.txt | .venv/bin/python
	@$(call install,test)
	@touch .venv/.server .venv/.test

# With what exports models as ONNX; a comma in a call would be its own.
SERVER := server,onnx

.venv/.server: pyproject.toml constraints.txt | .venv/bin/python
	@$(call install,$(SERVER))
	@touch .venv/.server

# On a terminal pip shows its progress, since torch is large; elsewhere only what goes wrong.
define install
echo "Installing Skipline into .venv; the first time this takes some minutes."; \
[ -t 1 ] || quiet=--quiet; \
$(BIN)/python -m pip install $$quiet --disable-pip-version-check -c constraints.txt -e '.[$(1)]'
endef

.venv/bin/python:
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	      2>/dev/null; then \
	    echo "Making .venv with $$("$$python" --version)."; \
	    exec "$$python" -m venv --clear .venv; \
	  fi; \
	done; \
	echo "Skipline needs Python 3.11 or newer, with venv (on Debian and Ubuntu: python3-venv)." >&2; \
	echo "If you have one under another name: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1
