PYTHON ?= python3
VENV := .venv
BIN = $(VENV)/bin

.PHONY: run test parity emulate long lower compile lint clean

run: $(VENV)/installed
	$(BIN)/python run.py < /dev/null

# Starts of programs find the modules compiled; memory isn't given back to be asked for again.
test: export PYTHONDONTWRITEBYTECODE =
test: export MALLOC_TRIM_THRESHOLD_ = 4294967296
test: export MALLOC_MMAP_THRESHOLD_ = 1073741824
test: export MALLOC_TOP_PAD_ = 268435456
test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The comparison with transformers, peft and lm_eval themselves, not with what they once said;
# installs PyTorch.
parity: $(VENV)/installed-test
	$(BIN)/pip install --quiet -e '.[parity]'
	$(BIN)/python -m pytest -n 2 --dist loadfile -m live

# The decode step's kernels run on NumPy, where races and unwritten words show; a minute.
emulate: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 -m emulated tests/kernels

# What takes long for what it shows, and what needs several processes, which alone is
# make long MARKS=hosts; three minutes.
long: MARKS = long or hosts
long: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m '$(MARKS)' --ignore=tests/mesh

# Every kernel lowered for CUDA by the JAX of a Python: make lower PYTHON=python3.13
lower: VENV = .venv-lower
lower:
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet -e . pytest pytest-xdist hypothesis 'jax$(JAX)'
	$(BIN)/python -m pytest -n 2 -m lower tests/kernels

# Every kernel compiled to machine code for Hopper, without a GPU; downloads 190 MB.
# JAX's CUDA plugin stays out of the virtual environment, where every run would look for a GPU.
compile: VERSION = "$$($(BIN)/python -c 'import jax; print(jax.__version__)')"
compile: $(VENV)/installed-test
	rm -rf .cuda
	$(BIN)/pip install --quiet --no-deps --target .cuda nvidia-cuda-nvcc \
		jax-cuda13-plugin==$(VERSION) jax-cuda13-pjrt==$(VERSION)
	PYTHONPATH=.cuda JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \
		XLA_FLAGS=--xla_backend_optimization_level=3 $(BIN)/python -m pytest -n 2 -m lower tests/kernels

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	sed -n '/^```python$$/,/^```$$/{/^```/d;p}' README.md > $(VENV)/readme.py
	$(BIN)/mypy $(VENV)/readme.py

clean:
	rm -rf $(VENV) .venv-lower .cuda build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/installed: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet -e '.[test,train,report]'
	touch $@
