# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# A CPU build of torch where the index has one under this version; a machine with its own torch sets VENV to it.
TORCH  ?= torch==2.13.0
# What goes with it: torch 2.11 needs triton==3.6.0, whose interpreter needs numpy<2.4.
TRITON ?= triton>=3.7,<3.8
NUMPY  ?= numpy

.PHONY: setup demo demo-ep test check bench gpu gpu-tests gpu-kernels gpu-slices gpu-tune gpu-summary tune cross-compile coverage test-4x clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install -q "$(TORCH)" "$(TRITON)" "$(NUMPY)"
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	touch $@

demo: setup          ## train two unmodified models with and without moe_ep; report in moe_compile_demo/index.html
	$(BIN)/moe-compile demo $(ARGS)

demo-ep: setup       ## train a Mixtral whose experts are split over 4 processes on this machine
	$(BIN)/torchrun --nproc-per-node 4 examples/train_ep.py

test: setup          ## everything CI runs: style, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

check: test

bench: setup         ## step times, CPU kernels and first calls beside the peers, on this machine
	$(BIN)/python -m benchmarks.step --out benchmarks/results
	$(BIN)/python -m benchmarks.kernels_cpu --out benchmarks/results
	$(BIN)/python -m benchmarks.experts_cpu --out benchmarks/results
	$(BIN)/python -m benchmarks.first_call --out benchmarks/results

cross-compile: setup $(VENV)/triton-3.6  ## every kernel and setting for sm_80, sm_90, sm_100 and gfx942, without a GPU, by two Tritons
	PYTHONPATH=. $(BIN)/python -m benchmarks.cross_compile $(ARGS)
	PYTHONPATH=$(VENV)/triton-3.6:. $(BIN)/python -m benchmarks.cross_compile --triton 3.6.0 $(ARGS)

$(VENV)/triton-3.6: $(VENV)/.ready
	$(BIN)/pip install -q --no-deps --upgrade --target $@ triton==3.6.0
	touch $@

coverage: setup      ## docs/coverage.md: run the experts of every family of the installed transformers
	$(BIN)/python -m tests.coverage_table

test-4x: setup       ## whole models of transformers 4.57, installed beside the first in $(VENV)/transformers-4
	$(BIN)/pip install -q --no-deps --target $(VENV)/transformers-4 transformers==4.57.6 "huggingface_hub<1.0" \
	    "tokenizers>=0.22,<=0.23.0" requests urllib3 charset_normalizer idna certifi
	PYTHONPATH=$(VENV)/transformers-4:. $(BIN)/python -m pytest tests/test_families_4x.py $(ARGS)

# On a machine with CUDA and its own torch, from a plain checkout, without `setup`. Each part takes under ten minutes;
# results go into benchmarks/results/<machine>.json. SINCE="2026-11-22 10:00:00": leave out what is there from then on.
PART   ?= 1
MODEL  ?= mixtral
TESTS_PARTS   ?= 3
KERNELS_PARTS ?= 14
ON_GPU := PYTHONPATH=. $(PYTHON) -m

gpu:                 ## all of the following, part by part; status 1 at the end if anything was red
	$(ON_GPU) benchmarks.gpu all $(ARGS)

gpu-tests:           ## the kernels' tests, files of one part of three: make gpu-tests PART=2
	$(ON_GPU) benchmarks.gpu tests --part $(PART)/$(TESTS_PARTS) $(ARGS)

gpu-kernels:         ## kernels and layers beside their peers, one part of fourteen: make gpu-kernels PART=5
	$(ON_GPU) benchmarks.kernels_gpu --part $(PART)/$(KERNELS_PARTS) $(if $(SINCE),--since "$(SINCE)") $(ARGS)

gpu-slices:          ## steps of some layers of a model: make gpu-slices MODEL=qwen3_moe
	$(ON_GPU) benchmarks.slices --model $(MODEL) $(if $(SINCE),--since "$(SINCE)") $(ARGS)

gpu-tune tune:       ## the fastest launch settings on this GPU, into kernels/settings.jsonl; run it again until it is done
	$(ON_GPU) benchmarks.tune $(ARGS)

gpu-summary:         ## what is red in the results of this machine, and their tables in docs/performance.md
	$(ON_GPU) benchmarks.gpu summary --page docs/performance.md $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info moe_compile_demo
