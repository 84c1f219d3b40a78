# The few things a contributor repeats. `make demo` and `make test` set up .venv by themselves.
#
#   make demo | demo-train | test | test-all | lint | format | cubins | wheel | clean
#   make test ARGS="-k preprocess"        arguments for pytest: files, -k, -x; for -m call .venv/bin/pytest
#   make test PROCESSES=8                 more of them at the same time (2; 0 where a debugger is wanted)
#   make test-all                         what `make test` leaves out: kernels on the CPU, what is slow, simulators
#   make demo-train SEED=1                train the demo's policy from another seed, into demo-train/seed-1
#   make test PYTHON=python3.12           another interpreter (after `make clean`)
#   make test TORCH=torch==2.10.0         another torch, or the path of a wheel
#   make wheel CUDA=ON PTXAS=ON           every architecture, with the compiler's report on registers and spills
#   make asan                             fuzz dit4dit._C, built with AddressSanitizer and UBSan into build/asan
#   make cubins                           Triton's kernels for every architecture, into build/cubins (no GPU needed)
#   make wheel CUDA=ON CUBINS=build/cubins        the release wheel
#   make gpu-bundle                       dist/gpu-bundle: what a Hopper machine without network lacks, for benchmarks/gpu_suite.sh
#   make gpu-rehearsal                    that suite here, without GPU and network, on such a machine's versions (6 GB)

PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA ?= AUTO
PTXAS ?= OFF
CUBINS ?= OFF
ARGS ?=
PROCESSES ?= 2
SEED ?= 0

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CMAKE_ARGS := --config-settings=cmake.define.DIT4DIT_CUDA=$(CUDA) --config-settings=cmake.define.DIT4DIT_PTXAS_REPORT=$(PTXAS) \
	--config-settings=cmake.define.DIT4DIT_CUBINS=$(if $(filter OFF,$(CUBINS)),OFF,$(abspath $(CUBINS))) \
	--config-settings=cmake.define.DIT4DIT_WARNINGS_AS_ERRORS=ON
SOURCES := $(shell find dit4dit csrc kernels benchmarks -type f -not -name '*.pyc') \
	CMakeLists.txt pyproject.toml README.md LICENSE

.PHONY: demo demo-train test test-all lint format asan cubins wheel gpu-bundle gpu-rehearsal clean
.SUFFIXES:

demo: .venv/.installed
	@$(BIN)/dit4dit demo --out demo

demo-train: .venv/.installed
	@$(BIN)/dit4dit demo-train --out demo-train/seed-$(SEED) --seed $(SEED) $(ARGS)

# By what a test costs (markers in pyproject.toml). Every test is in one of the two, or marked long; tests/house/test_marks.py sees to it.
QUICK := not (kernels or slow or sim or long or gpu)
REST := (kernels or slow or sim or gpu) and not long

# the files that have such tests, so that not all are read to find them
SERIAL = $(shell grep -rl --include='test_*.py' 'mark\.serial' tests)

# Those marked serial by themselves, then the others side by side. Exit code 5: none of them was chosen, as with a -k in ARGS.
# What takes longest is listed: above 5 s on a quiet core it belongs to `make test-all`.
# The pytest command, not `python -m pytest`, which would put the source tree before the installed package.
define run_tests
	$(if $(filter -m%,$(ARGS)),$(error ARGS: -m is set here; call .venv/bin/pytest with it))
	@$(BIN)/pytest -m "serial and ($(1))" $(or $(ARGS),$(SERIAL)); first=$$?; \
	$(BIN)/pytest -n $(PROCESSES) --dist worksteal --durations=10 --durations-min=5 -m "not serial and ($(1))" $(ARGS); second=$$?; \
	case "$$first $$second" in "0 0" | "0 5" | "5 0") ;; *) exit 1 ;; esac
endef

test: .venv/.installed
	$(call run_tests,$(QUICK))

test-all: .venv/.installed
	$(call run_tests,$(REST))

lint: .venv/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/.installed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

asan: .venv/.installed
	@$(BIN)/pytest -m long tests/aot/test_native_fuzz.py

# Without CUDA: nvcc's host code is the same checks. tests/aot/test_native_fuzz.py makes this.
SANITIZERS := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer
build/asan/.built: $(wildcard csrc/*) CMakeLists.txt pyproject.toml
	@echo "-- dit4dit._C with sanitizers"
	@rm -rf build/asan && mkdir -p build/asan
	@$(PIP) wheel -qq --no-deps --wheel-dir build/asan --config-settings=cmake.define.DIT4DIT_CUDA=OFF \
		--config-settings=cmake.define.DIT4DIT_WARNINGS_AS_ERRORS=ON --config-settings=cmake.build-type=RelWithDebInfo \
		--config-settings=install.strip=false "--config-settings=cmake.define.CMAKE_CXX_FLAGS=$(SANITIZERS)" .
	@$(PIP) install -q --no-deps --no-index --target build/asan/site build/asan/*.whl
	@touch $@

# From another folder, where the source tree is not taken for the package.
cubins: .venv/.installed
	@rm -rf build/cubins && mkdir -p build
	@cd build && ../$(BIN)/python -m dit4dit.aot_build --out cubins

wheel: .venv/.torch
	@echo "-- wheel (CUDA=$(CUDA))"
	@$(PIP) wheel $(if $(filter ON,$(PTXAS)),-v,-qq) --no-deps --wheel-dir dist $(CMAKE_ARGS) .
	@ls -l dist

# What a plain PyTorch image (Python 3.12, torch, transformers, matplotlib, pytest with xdist and timeout) lacks. It is installed
# with --no-deps: av and websockets are not there, and nothing in the suite imports them.
GPU_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python) python3.12)
BUNDLED := diffusers==0.42.1 lazy-importer importlib-metadata tyro==1.0.17 docstring-parser typeguard omegaconf==2.4.0

gpu-bundle: .venv/.installed
	@rm -rf build/cubins-90 dist/gpu-bundle && mkdir -p build
	@cd build && ../$(BIN)/python -m dit4dit.aot_build --capability 90 --out cubins-90
	@test -x build/gpu-python/bin/python || $(GPU_PYTHON) -m venv build/gpu-python
	@build/gpu-python/bin/python -m pip wheel -qq --no-deps --wheel-dir dist/gpu-bundle . \
		--config-settings=cmake.define.DIT4DIT_CUDA=90a --config-settings=cmake.define.DIT4DIT_CUBINS=$(abspath build/cubins-90)
	@build/gpu-python/bin/python -m pip wheel -qq --no-deps --wheel-dir dist/gpu-bundle $(BUNDLED)
	@du -sh dist/gpu-bundle
	@test "$$(du -sk dist/gpu-bundle | cut -f1)" -lt 20480 || { echo "error: dist/gpu-bundle: 20 MiB at most"; exit 1; }

# As root: `unshare -n` takes the network away.
gpu-rehearsal: gpu-bundle
	@test -x build/rehearsal/bin/python || $(GPU_PYTHON) -m venv build/rehearsal
	@build/rehearsal/bin/python -m pip install -qq torch==2.11.0 triton==3.6.0 transformers==5.17.0 numpy==2.5.2 \
		matplotlib pytest pytest-xdist pytest-timeout scipy requests pyyaml pillow tqdm packaging zipp
	@rm -rf build/rehearsed
	@DEVICE=cpu PRESETS=tiny LIMIT=450 PYTHON=$(abspath build/rehearsal/bin/python) unshare -n benchmarks/gpu_suite.sh build/rehearsed
	@rm -rf build/rehearsal-site && build/rehearsal/bin/python -m pip install -q --no-deps --no-index --target build/rehearsal-site \
		dist/gpu-bundle/*.whl
	@PYTHONPATH=$(abspath build/rehearsal-site) unshare -n build/rehearsal/bin/pytest -q -p no:cacheprovider \
		-m "kernels and not slow" -k interpreted tests/ops

clean:
	rm -rf .venv build dist

# Its own step and first, so that nothing that depends on torch brings another build of it.
.venv/.torch:
	@echo "-- .venv ($(PYTHON)) and $(TORCH)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install -qq "$(TORCH)"
	@touch $@

# A real install, not an editable one: what is tested is what a wheel holds.
.venv/.installed: .venv/.torch constraints.txt $(SOURCES)
	@echo "-- dit4dit and what it needs (CUDA=$(CUDA))"
	@rm -rf .venv/wheel
	@$(PIP) wheel -qq --no-deps --wheel-dir .venv/wheel $(CMAKE_ARGS) .
	@$(PIP) install -qq --no-deps --force-reinstall .venv/wheel/*.whl
	@$(PIP) install -qq -c constraints.txt "$$(echo .venv/wheel/*.whl)[dev]"
	@touch $@
