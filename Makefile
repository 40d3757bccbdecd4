# make demo: environment, build, a short training on synthetic pictures, evaluation, report.
# make test: everything that is tested. Both set up whatever is missing, in .venv.
#
#   PYTHON     the Python (3.10 or later) that .venv is made from
#   TORCH      what pip installs for torch; the default is the pair tested with. 'torch>=2.10' takes
#              the newest; --index-url in it chooses a CPU-only or a CUDA build.
#   EXTRAS     extras of the package that are installed
#   PYTEST     arguments of pytest, e.g. PYTEST='-k gate_statistics'
#   PROCESSES  that pytest shares the tests among, each of up to 3 GiB; 0: its own only
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
EXTRAS ?= train,test,dev
PYTEST ?=
PROCESSES ?= 2

VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py $(shell find csrc -type f) eamnet_kernels/ops/schemas.py

.PHONY: venv build demo test lint sanitize tables wheel wheels clean
.DELETE_ON_ERROR:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is older than Python 3.10; choose another with PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "Python's venv module is missing (Debian, Ubuntu: apt install python3-venv)"; exit 1; }

# torch first and by itself: the editable install below builds against the torch that is there.
$(VENV)/installed: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet $(TORCH) 'setuptools>=77' wheel ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

# The editable install has built, too, but it is not repeated for every change to a source.
$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

venv: $(VENV)/installed

build: $(VENV)/built

demo: build
	$(BIN)/eamnet demo

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint build
	$(BIN)/pytest -n $(PROCESSES) --dist worksteal $(PYTEST)

# The compiled operators' tests under each sanitizer, in copies of the package under build/.
sanitize: build
	$(BIN)/python tests/packaging/sanitize.py

# The benchmark's tables in the pages, from the committed result files.
tables: build
	$(BIN)/python -m bench.readme

wheel: build
	$(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir dist .

# The CPU wheel and the CUDA wheel, each tried in a fresh environment; needs nvcc, but no GPU.
# TRY: older and other versions of torch to try the CPU wheel on, each installed for it.
wheels: build
	$(BIN)/python tests/packaging/wheels.py $(TRY:%=--torch %)

clean:
	rm -rf build dist *.egg-info eamnet_kernels/_C*.so eamnet_kernels/_C*.json
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
