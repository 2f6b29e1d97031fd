# Everything a user or a developer does here, with nothing installed beforehand but a C/C++ compiler, make,
# Python 3.11 and Rust. The work is in scripts/ and CMakeLists.txt; see `make help`.

BUILD ?= build
PREFIX ?= /usr/local
PYTHON ?= python3
CONFIG ?=
JOBS ?= $(shell nproc)
DEMO_RANKS ?= 2
DEMO_OUT ?= $(BUILD)/demo
DEMO_ARGS ?=
QUICK ?=
ONLY ?=
WORKLOADS ?=
# A Python with PyTorch, installed by the targets that need one unless it is given.
TORCH_PYTHON ?= $(BUILD)/pytorch/bin/python
export BUILD PYTHON JOBS

# The folders of this Makefile's own tools come first, the user's next. cargo's outputs are shared with CMake's.
export PATH := $(abspath $(BUILD))/venv/bin:$(PATH)
export CARGO_TARGET_DIR = $(abspath $(BUILD))/cargo

.PHONY: build setup configure demo test gpu-test gpu-bench bench bench-plan check header format scenario-data install clean help
.DEFAULT_GOAL := build

build: configure ## Build the library, the tool, the bindings' tests and the examples (default)
	@cmake --build $(BUILD) -j $(JOBS)

setup: ## Install what is missing (cmake, ninja, LibTorch, the demo's text) under $(BUILD)
	@scripts/setup.sh

# CMake notices by itself what changed; another LibTorch needs telling.
configure: setup
	@cmake -S . -B $(BUILD) -G Ninja --log-level=NOTICE -DFSDP_WITH_TORCH=ON \
		-DTORCH_DIR="$$(cat $(BUILD)/torch.dir)" \
		-DFSDP_THIRD_PARTY_ROOT="$(abspath $(BUILD))/debian/root" \
		-DPython3_EXECUTABLE="$(abspath $(BUILD))/venv/bin/python3" $(CONFIG) >$(BUILD)/logs/configure.log 2>&1 || \
		{ tail -n 30 $(BUILD)/logs/configure.log >&2; \
		  echo "make: configuring failed (full output: $(BUILD)/logs/configure.log)" >&2; exit 1; }

demo: configure ## Train a small GPT on real text, sharded over 2 ranks, a few minutes (DEMO_RANKS, DEMO_OUT, DEMO_ARGS)
	@cmake --build $(BUILD) -j $(JOBS) --target train_gpt
	@BUILD=$(BUILD) OUT=$(DEMO_OUT) RANKS=$(DEMO_RANKS) examples/train_gpt/demo.sh $(DEMO_ARGS)

test: build ## Run every check and every test
	@scripts/test.sh

bench: configure $(if $(filter $(BUILD)/%,$(TORCH_PYTHON)),$(BUILD)/pytorch/installed) ## Measure beside PyTorch's FSDP (QUICK=1: a short form; ONLY=steps,... WORKLOADS=...; downloads 2.5 GB once)
	@scripts/fetch_debian.sh $(BUILD)/debian libopenmpi-dev || echo "make: going on without Open MPI's headers" >&2
	@cmake $(BUILD) >>$(BUILD)/logs/configure.log 2>&1
	@cmake --build $(BUILD) -j $(JOBS) --target fsdp_bench
	@$(BUILD)/venv/bin/python -B bench/run.py --build $(BUILD) --torch-python $(TORCH_PYTHON) \
		$(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY)) $(if $(WORKLOADS),--workloads $(WORKLOADS))

gpu-test: ## Run what needs a GPU, CUDA's compiler or NCCL; skips what this machine lacks, and says so
	@TORCH_PYTHON=$(TORCH_PYTHON) scripts/gpu_test.sh

gpu-bench: ## Measure on a GPU beside PyTorch's FSDP2 and plain LibTorch; skips where there is none (QUICK=1)
	@TORCH_PYTHON=$(TORCH_PYTHON) scripts/gpu_bench.sh $(if $(QUICK),--quick)

bench-plan: build ## Time planning a 405-billion-parameter model for 16,384 ranks
	@$(PYTHON) -B bench/plan.py "$(BUILD)/bin/fsdp" bench/out/plan.json

check: setup ## Run the checks only: formatting, clippy, header and symbol drift, headers alone and twice
	@status=0; for check in rust abi headers; do scripts/check_$$check.sh || status=1; done; exit $$status

header: ## Regenerate include/fsdp.h and the list of exported symbols
	@scripts/check_abi.sh --update

format: ## Format the Rust sources
	@cargo fmt

scenario-data: $(BUILD)/pytorch/installed ## Regenerate the scenario tests' numbers with PyTorch (downloads 2.5 GB)
	@$(BUILD)/pytorch/bin/python scripts/make_scenario_data.py capi_tests/scenario_data

$(BUILD)/pytorch/installed: scripts/requirements/pytorch.txt
	@rm -rf $(BUILD)/pytorch
	@$(PYTHON) -m venv $(BUILD)/pytorch
	@$(BUILD)/pytorch/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

install: build ## Install library, headers, tool, CMake package and pkg-config file (PREFIX=/usr/local)
	@cmake --install $(BUILD) --prefix $(abspath $(PREFIX))

clean: ## Remove what was built; what setup installed stays (make clean-all removes it too)
	@if [ -d $(BUILD) ]; then find $(BUILD) -mindepth 1 -maxdepth 1 \
		! -name venv ! -name libtorch ! -name nvrtc ! -name debian ! -name text ! -name pytorch ! -name '*.stamp' -exec rm -rf {} +; fi

clean-all: ## Remove the build folder
	@rm -rf $(BUILD)
.PHONY: clean-all

help: ## Show this list
	@echo "make TARGET [VARIABLE=value]; variables: BUILD=$(BUILD) PREFIX=$(PREFIX) PYTHON=$(PYTHON) JOBS=$(JOBS)"
	@echo "TORCH_DIR=... a LibTorch of your own  CONFIG=... more arguments for cmake, e.g. -DFSDP_SANITIZE=address"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16
