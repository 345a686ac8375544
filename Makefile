# `make demo` and `make test` set themselves up: a virtual environment unless one is active, the package with its C++
# kernels. FASTPT_MODEL=DIR makes the demo use a model of your own.
SHELL := bash
.DEFAULT_GOAL := help

VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.fastpt-installed
MODEL := .cache/smollm2
SOURCES := $(shell find csrc -type f)

.PHONY: help setup demo test sanitize cuda-check cuda-build check lint format types gpu-evidence bench gpu doctor clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 15

setup: $(STAMP) ## virtual environment, dependencies, native kernels

$(VENV)/bin/python:
	python3 -m venv $(VENV)

# torch first: the C++ kernels are built against it (--no-build-isolation). Without a GPU the CPU build is enough, where
# the index in use offers one under the plain name.
$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES) | $(VENV)/bin/python
	$(PIP) torch setuptools wheel ninja pybind11
	$(PIP) --no-build-isolation -e '.[dev,gguf]'
	@touch $@

$(MODEL)/config.json: | $(STAMP)
	$(PYTHON) examples/get_smollm2.py $(MODEL)

demo: $(STAMP) $(if $(FASTPT_MODEL),,$(MODEL)/config.json) ## fine-tune a real model on the bundled task (5 minutes on 2 cores, all included)
	$(PYTHON) examples/support_tickets/demo.py --model $(or $(FASTPT_MODEL),$(MODEL))

test: $(STAMP) ## all tests
	$(PYTHON) -m pytest -q

sanitize: $(STAMP) ## the C++ kernels' tests under AddressSanitizer and UBSan, at every instruction set
	$(PYTHON) -m tests.sanitize

cuda-check: $(STAMP) ## the CUDA kernels compiled for six architectures and their machine code read, without a GPU
	$(PYTHON) -m tests.cuda_check

cuda-build: ## the extension with its CUDA part built, imported and its ops listed, without a GPU: PYTHON=... has a CUDA torch
	$(PYTHON) -m tests.cuda_build

check: lint types test ## everything that must hold before a commit

lint: $(STAMP) ## ruff, clang-format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	find csrc tests/cuda \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' \) -print0 | xargs -0 $(VENV)/bin/clang-format --dry-run --Werror

format: $(STAMP) ## rewrite in the house style
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	find csrc tests/cuda \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' \) -print0 | xargs -0 $(VENV)/bin/clang-format -i

types: $(STAMP) ## mypy
	$(PYTHON) -m mypy

bench: $(STAMP) $(MODEL)/config.json ## the training step against TRL and plain loops
	$(PYTHON) -m benchmarks.train_step --model $(MODEL) --work packed --mode lora --peers fastpt,trl,trl+fuse,hf

gpu-evidence: $(STAMP) ## the GPU kernels' numbers, machine code and traffic without a GPU, against their bars
	$(PYTHON) -m benchmarks.gpu_evidence --check

gpu: $(STAMP) $(MODEL)/config.json ## on a machine with a GPU: its tests, then kernels and training step against the peers, into benchmarks/results
	$(PYTHON) -m pytest -q -m gpu
	$(PYTHON) -m benchmarks.kernels --dtype bfloat16 --peers eager,compile,liger,unsloth,fla,cce,flash --json benchmarks/results/gpu_kernels.jsonl
	$(PYTHON) -m benchmarks.train_step --model $(MODEL) --work packed --mode lora --peers fastpt,trl,trl+fuse,hf-compile --json benchmarks/results/gpu_lora_packed.jsonl

doctor: $(STAMP) ## which kernels serve which op here, and what is missing
	$(PYTHON) -m fastpt doctor

clean: ## remove what was built, not the environment
	rm -rf build dist *.egg-info fastpt/_C*.so .pytest_cache .mypy_cache .ruff_cache
