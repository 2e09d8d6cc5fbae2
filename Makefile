# Everything sets itself up in .venv from a clean clone; needs Python 3.10+, make and a C++ compiler.
PYTHON ?= python3
# The torch that .venv gets, and the older one that the same wheel is tested on.
TORCH ?= torch==2.14.1 torchvision==0.29.1
OLDER_TORCH ?= torch==2.13.0
# 1: build the CUDA kernels, with PyPI's compiler where no nvcc is on the PATH.
CUDA ?= 1

BIN := .venv/bin
OLD := .venv-older/bin
PIP_FLAGS := --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc resnet_reg_ext -name '*.py' -o -name '*.jinja' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu')
WHEEL := build/wheel/.done

.PHONY: demo test test-main test-beside test-older test-python-reader test-sanitize test-matrix test-aarch64 gpu-check report-check bench bench-quick lint format dist docs clean

demo: .venv/.ready-demo
	rm -rf out/demo
	OMP_WAIT_POLICY=passive $(BIN)/resnet-reg compare --out out/demo

# Processes of tests, whose waiting threads leave the cores to each other.
BOTH_CORES := OMP_WAIT_POLICY=passive
# In the order of collection, which spreads the long files; by their number of tests, those would come last.
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder

# The run on .venv comes last, so that its summary is the last thing printed.
test: .venv/.ready .venv-older/.ready
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-beside
	$(MAKE) --no-print-directory test-main

test-main: .venv/.ready
	$(BOTH_CORES) $(BIN)/pytest $(IN_TWO)

# One process each, so two of them at a time; each prints when it has ended.
test-beside: test-older test-python-reader test-sanitize

# The same wheel, unchanged, on another torch: what depends on torch and doesn't need the programs
# of .venv (torchvision, Lightning, ...).
ANY_TORCH := tests/core tests/distributed tests/packaging -m "not one_torch"

test-older: .venv-older/.ready
	$(BOTH_CORES) $(OLD)/pytest -q $(ANY_TORCH)

# The slower way to read tensors, that of a torch without DLPack's C exchange API.
test-python-reader: .venv/.ready
	$(BOTH_CORES) RESNET_REG_EXT_TEST_NO_EXCHANGE_API=1 \
		$(BIN)/pytest -q tests/core -m reads_tensors

# The CPU core built with AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED := build/sanitized
test-sanitize: $(SANITIZED)/.done .venv/.ready
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		PYTHONPATH=$(SANITIZED) PYTHONMALLOC=malloc $(BOTH_CORES) \
		$(BIN)/pytest -q -p no:cacheprovider tests/core -m "sanitized and not new_process"

# After the wheel: both are built in build/.
$(SANITIZED)/.done: $(WHEEL)
	rm -rf $(SANITIZED)
	RESNET_REG_EXT_SANITIZE=address,undefined RESNET_REG_EXT_CUDA=0 \
		$(BIN)/pip install $(PIP_FLAGS) --no-deps --target $(SANITIZED) .
	touch $@

# One wheel on every torch that is supported, from the oldest to the newest; downloads some 15 GB.
test-matrix: $(WHEEL)
	$(PYTHON) tests/packaging/matrix.py build/wheel/*.whl

# The portable CPU kernel on aarch64, under emulation, against the AVX2 kernel here: needs
# g++-aarch64-linux-gnu and qemu-user.
AARCH64_SOURCES := tests/core/aarch64_bits.cpp $(addprefix csrc/cpu/,elements.cpp plan.cpp launch.cpp rows.cpp row_launch.cpp)
AARCH64_FLAGS := -std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fopenmp
test-aarch64:
	mkdir -p build/aarch64
	aarch64-linux-gnu-g++ $(AARCH64_FLAGS) -static $(AARCH64_SOURCES) -o build/aarch64/bits
	c++ $(AARCH64_FLAGS) -mavx2 -mfma -mf16c $(AARCH64_SOURCES) -o build/aarch64/bits-here
	build/aarch64/bits-here > build/aarch64/here
	qemu-aarch64 build/aarch64/bits > build/aarch64/there
	cmp build/aarch64/here build/aarch64/there
	@echo "the CPU kernel gives the same bits on aarch64 as here"

# The source distribution and a manylinux wheel for each Python here, each tried out beside a torch
# of its own without a compiler: downloads some 3 GB a Python.
dist: .venv/.ready-dist
	RESNET_REG_EXT_CUDA=$(CUDA) $(BIN)/python tests/packaging/make_dist.py --torch "$(firstword $(TORCH))"

# On a machine with an NVIDIA GPU: its tests, compute-sanitizer and timings, in one report. Takes the
# Python that is there, with its torch, and no network: see the script.
gpu-check:
	$(PYTHON) tests/cuda/gpu_check.py

# The documentation site, into build/docs.
docs: .venv/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Opens the report of a small run in a headless Chromium, and takes pictures of it; needs chromium.
report-check: .venv/.ready
	rm -rf out/report-check
	$(BIN)/resnet-reg compare --out out/report-check/compare --image-size 16 --train-size 60 \
		--test-size 60 --epochs 4 --evaluate-every 1
	$(BIN)/resnet-reg evaluate out/report-check/compare/seed0/L1/last.ckpt --out out/report-check/evaluate
	$(BIN)/python tests/recipe/browser_check.py out/report-check/*/report.html --out out/report-check

bench: .venv/.ready-bench
	$(BIN)/python -m bench

bench-quick: .venv/.ready-bench
	$(BIN)/python -m bench --quick

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(BIN)/mypy

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

clean:
	rm -rf .venv .venv-older build dist *.egg-info out resnet_reg_ext/_C*.so

.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_FLAGS) $(TORCH)
	touch $@

$(WHEEL): $(SOURCES) | .venv/.torch
	rm -rf build/wheel build/lib*
	RESNET_REG_EXT_CUDA=$(CUDA) $(BIN)/pip wheel $(PIP_FLAGS) --no-deps -w build/wheel .
	touch $@

.venv/.ready-demo: $(WHEEL)
	$(BIN)/pip install $(PIP_FLAGS) "$$(echo build/wheel/*.whl)[train]"
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --force-reinstall build/wheel/*.whl
	touch $@

.venv/.ready: $(WHEEL)
	$(BIN)/pip install $(PIP_FLAGS) "$$(echo build/wheel/*.whl)[train,compact,test,integration,lint]"
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --force-reinstall build/wheel/*.whl
	touch $@

.venv/.ready-bench: .venv/.ready
	$(BIN)/pip install $(PIP_FLAGS) "$$(echo build/wheel/*.whl)[bench]"
	touch $@

.venv/.ready-docs: .venv/.ready
	$(BIN)/pip install $(PIP_FLAGS) "$$(echo build/wheel/*.whl)[docs]"
	touch $@

.venv/.ready-dist: $(WHEEL)
	$(BIN)/pip install $(PIP_FLAGS) "$$(echo build/wheel/*.whl)[dist]"
	touch $@

.venv-older/.torch:
	$(PYTHON) -m venv .venv-older
	$(OLD)/pip install $(PIP_FLAGS) $(OLDER_TORCH) numpy scipy scikit-learn safetensors pytest pytest-xdist hypothesis
	touch $@

.venv-older/.ready: $(WHEEL) | .venv-older/.torch
	$(OLD)/pip install $(PIP_FLAGS) --no-deps --force-reinstall build/wheel/*.whl
	touch $@
