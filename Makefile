# make demo: train two small networks in mixed precision, in under two minutes
# make test: lint, format, types, and every test that is for every day
# make slow: the tests that take minutes more
# make benchmark: times, casts and memory of models in each variant, in about ten minutes, into benchmarks/results/
# make third-party: the models of transformers, timm and others, from their packages
# All need Python 3.11 or later and build their own virtual environment in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread: the networks are small, and threads that wait for a busy core cost more than they bring.
export OMP_NUM_THREADS ?= 1

# These name torchvision, which they need only for what no model does.
WITHOUT_TORCHVISION := timm segmentation-models-pytorch vit-pytorch denoising-diffusion-pytorch

.PHONY: demo test slow benchmark third-party clean
.NOTPARALLEL:

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not third_party"

slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 -m "slow and not third_party"

benchmark: $(VENV)/.benchmark
	$(BIN)/python -m benchmarks

third-party: $(VENV)/.third-party
	$(BIN)/python -m pytest -q tests/third_party

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# Stamps: a second make installs nothing, unless what it installs from has changed.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.third-party: $(VENV)/.test
	$(PIP) -e '.[third-party]'
	$(PIP) --no-deps $(WITHOUT_TORCHVISION)
	touch $@

$(VENV)/.benchmark $(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[$*]'
	touch $@
