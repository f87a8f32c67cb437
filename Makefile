VENV ?= .venv
PY = $(VENV)/bin/python

.PHONY: install test lint bench sanitize gpu rehearse clean

install:  ## editable, with the test extra; builds the C++ extension in place
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -c constraints.txt -e '.[test]'

test:
	OMP_NUM_THREADS=1 $(PY) -m pytest

lint:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench:  ## small sizes, one thread, table and CSV
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.run --size small

SANITIZED = build/sanitized
# libstdc++ too: without it at the start, AddressSanitizer does not find what throws exceptions
PRELOADED = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
SANITIZERS = -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g

sanitize:  ## op tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer (GCC or Clang, Linux)
	$(PY) -m pip install -q -c constraints.txt pybind11 setuptools
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r csrc ffmerge_fast tests setup.py pyproject.toml README.md $(SANITIZED) && rm -f $(SANITIZED)/ffmerge_fast/*.so
	cd $(SANITIZED) && CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" $(abspath $(PY)) setup.py -q build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$(PRELOADED)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
		$(abspath $(PY)) -m pytest -n 1 tests/ops -m "not gpu" -k "not triton and not interpreter"

gpu:  ## CUDA tests and benchmarks/gpu.py, under ten minutes; says why not where there is no GPU
	@if reason=$$($(PY) -m benchmarks.harness.measure --why-no-gpu); then \
		$(PY) -m pytest -n 0 -m gpu; tests=$$?; $(PY) -m benchmarks.gpu && exit $$tests; \
	else echo "make gpu: nothing run: $$reason"; fi

rehearse:  ## the list of `make gpu` at tiny sizes in Triton's interpreter
	$(PY) -m benchmarks.gpu --rehearse

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find ffmerge_fast -name '*.so' -delete
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
