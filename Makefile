# make demo         install into .venv, align the bundled miniature, and say where the report lies
# make test         lint, types and the whole test suite
# make miniature    train the bundled model and its reward models again (hours; MINIATURE_QUICK=build/quick: minutes)
# make clean        remove .venv and what builds leave behind; runs/ stays

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt

# The miniature is too small to gain from threads (0.9 s with one, 0.8 s with two for a batch of pictures), and more
# threads than free cores make it many times slower. Large models on a CPU want more: run `tailorpo train` yourself.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: demo test miniature clean

demo: $(VENV)/.installed
	$(ONE_THREAD) $(BIN)/tailorpo train recipes/emoji_tailorpo_g.yaml

test: $(VENV)/.installed-dev
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== types"
	$(BIN)/pyright --pythonpath $(BIN)/python
	@echo "== tests"
	$(ONE_THREAD) $(BIN)/python -m pytest -n logical --maxprocesses 4

miniature: $(VENV)/.installed-miniature
	$(BIN)/python -m miniature

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit(f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	@echo "== making $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "== installing tailorpo and what it needs into $(VENV) (torch is large; this takes a few minutes)"
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "== installing the tools of the tests"
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.installed-miniature: $(VENV)/.installed
	@echo "== installing what the miniature's training needs"
	$(PIP) -e '.[miniature]'
	@touch $@
