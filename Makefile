# `make demo` and `make test` work on a machine with Python 3.11 or newer and nothing else.

PYTHON ?= python3
PROCESSES ?= 4
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEMO   := $(VENV)/.demo
PEERS  := $(VENV)/.peers
TOOLS  := $(VENV)/.tools

NEEDS_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "streamworker needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }

# Images of containers often set it. The tests and the demo start Python many times: without bytecode, each start compiles anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-long coverage chaos bench soak fuzz lint format docs chart-docs lock audit-deps clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): requirements/dev.txt requirements/uv.txt pyproject.toml
	@$(NEEDS_PYTHON)
	@echo "creating the environment of the developers in $(VENV) (once)"
	@$(PYTHON) -m venv --clear $(VENV)
	@tools/environment.sh $(VENV) requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@ $(DEMO)

# Only what the demo needs; the developers' environment has it too. Three processes would compile all modules at once, again in each
# run where PYTHONDONTWRITEBYTECODE is set.
$(DEMO): requirements/demo.txt requirements/uv.txt
	@$(NEEDS_PYTHON)
	@echo "creating the environment of the demo in $(VENV) (once; about 60 MB)"
	@[ -e $(READY) ] || $(PYTHON) -m venv --clear $(VENV)
	@UV_COMPILE_BYTECODE=1 tools/environment.sh $(VENV) requirements/demo.txt
	@$(BIN)/python -m compileall -q -j 0 streamworker
	@touch $@

$(TOOLS): $(READY) requirements/tools.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/tools.txt
	@touch $@

demo: $(DEMO) ## broker, upstream, two workers and several jobs side by side, on this machine; one worker is killed
	@exec $(BIN)/python -m streamworker demo $(ARGS)

# Half of the tests' time is spent waiting, so twice as many processes as cores run whole files; files that wait alternate with
# files that compute (tests/conftest.py). Each process has brokers of its own. One process, for a debugger: make test ARGS="-n 0".
test: $(READY) ## all but the long tests, on Apache Kafka (where it cannot run: on the embedded broker, with what needs Kafka skipped)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder -m "not long" $(ARGS)

test-long: $(READY) ## rollouts, upgrades, backlogs, clusters, slow variants, and five times as many random examples
	$(BIN)/python -m pytest -m long $(ARGS) # in one process: they measure time
	STREAMWORKER_TEST_EXAMPLES=500 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile tests/properties

# The embedded broker starts in 50 ms, so these run the shell as well as the core. ARGS="tests/integration" adds those on Kafka.
coverage: $(READY) ## statements and branches that tests run, per module, and the lines that no test runs
	@$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n 2 --dist loadfile -m "not long" tests/unit tests/properties tests/upstream $(ARGS)
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	@echo "modules that are covered completely are left out; $(BIN)/coverage html shows every line in htmlcov/"

chaos: $(READY) ## crash workers, brokers and upstreams at random, on Apache Kafka (ARGS="--seeds 20")
	$(BIN)/python -m tests.chaos --apache --seeds 20 $(ARGS)
	$(BIN)/python -m tests.chaos.moves --kills --job-s 4 --returns 3
	$(BIN)/python -m tests.chaos.holds
	$(BIN)/python -m tests.chaos.cluster
	$(BIN)/python -m tests.chaos.batch
	$(BIN)/python -m tests.chaos.gateway
	$(BIN)/python -m tests.chaos.demo --runs 20

$(PEERS): $(READY) requirements/bench.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bench.txt
	@touch $@

bench: $(PEERS) ## measure CPU per delta, latency and memory, beside other implementations (ARGS="--size quick")
	$(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python -m benchmarks.gateway
	$(BIN)/python -m benchmarks.gateway --face ws --clients 500 --rate 20

soak: $(READY) ## measure memory over many jobs, and the latency that exactly-once adds
	$(BIN)/python -m benchmarks.soak $(ARGS)
	$(BIN)/python -m benchmarks.latency

fuzz: $(TOOLS) ## fuzz the code that reads foreign input (ARGS="--seconds 300 job")
	$(BIN)/python -m fuzz $(ARGS)

lint: $(READY) ## style, types, import rules and banned phrases
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/banned_phrases.py

format: $(READY) ## format the code and apply ruff's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## write the pages, the dashboard and the schema that are generated from code
	$(BIN)/python -m tests.reference
	$(BIN)/python -m monitoring.dashboard
	$(BIN)/python tools/chart_schema.py

chart-docs: ## write the chart's README from its values (needs Go)
	go run github.com/norwoodj/helm-docs/cmd/helm-docs@v1.14.2 --chart-search-root helm --skip-version-footer --log-level warning

lock: $(READY) ## update the pins of all dependencies, with hashes
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
		--all-extras --group dev --custom-compile-command "make lock" $(ARGS) pyproject.toml -o requirements/dev.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
		--extra otel --extra gateway --extra objects --constraint requirements/dev.txt --custom-compile-command "make lock" $(ARGS) pyproject.toml -o requirements/runtime.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
		--extra demo --constraint requirements/dev.txt --custom-compile-command "make lock" $(ARGS) pyproject.toml -o requirements/demo.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
		--group pyproject.toml:bench --constraint requirements/dev.txt --custom-compile-command "make lock" $(ARGS) -o requirements/bench.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
		--constraint requirements/dev.txt --custom-compile-command "make lock" $(ARGS) --group tools -o requirements/tools.txt
	echo uv | $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
		--constraint requirements/dev.txt --custom-compile-command "make lock" $(ARGS) - -o requirements/uv.txt
	echo hatchling | $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
		--constraint requirements/dev.txt --custom-compile-command "make lock" $(ARGS) - -o requirements/build.txt

audit-deps: $(TOOLS) ## look up known vulnerabilities of all pins, and write an SBOM of the runtime ones to dist/
	@mkdir -p dist
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom.cdx.json requirements/runtime.txt
	$(BIN)/pip-audit --strict --disable-pip --require-hashes $(ARGS) -r requirements/runtime.txt -r requirements/dev.txt -r requirements/build.txt

clean: ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .cache .import_linter_cache .coverage htmlcov dist
