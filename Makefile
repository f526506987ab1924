# make help lists the targets. VENV=… and PYTHON=… choose another virtual environment and interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What serving the starter needs, and all that working on the project needs besides.
BASICS := $(VENV)/.basics
INSTALLED := $(VENV)/.installed
# And the stores of others, which the long tests use.
STORES := $(VENV)/.stores
# STARTER=free: demo, serve and wheels take the starter of freely licensed parts, which has a store of its own.
NAME := starter$(addprefix -,$(STARTER))
BUNDLE := build/$(NAME)/manifest.json

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-all check docs settings openapi bench bench-gpu bench-store chaos consistency crash field \
	first-run fuzz hostile protocols rolling starter wheels audit sbom redis tools clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(BUNDLE) ## set up, index sample media, search and classify them; ends by itself
	$(BIN)/python -m examples.demo --bundle build/$(NAME)

serve: $(BUNDLE) ## serve the starter on http://127.0.0.1:8000 (or ISTHMUS_PORT); items and previews are kept in var/store
	$(BIN)/python -m service serve --bundle build/$(NAME) --store var/$(subst starter,store,$(NAME))

# Three on two cores: a test often waits for the server that it started.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(or $(JOBS),3) --dist worksteal

test: build/starter/manifest.json $(INSTALLED) redis tools ## run all but the long tests, about 5 minutes on 2 cores; JOBS=n for another number of processes
	$(PYTEST) -m 'not full'

test-all: build/starter/manifest.json $(STORES) redis tools ## run every test, also the long ones that CI runs each night
	$(PYTEST)

check: $(INSTALLED) ## lint, format, types, imports; openapi.yaml and docs/configuration.md up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m service openapi | diff -u openapi.yaml - || { echo "openapi.yaml is stale: make openapi"; exit 1; }
	$(BIN)/python -m service settings | diff -u docs/configuration.md - \
		|| { echo "docs/configuration.md is stale: make settings"; exit 1; }

settings: $(INSTALLED) ## write docs/configuration.md
	$(BIN)/python -m service settings > docs/configuration.md

docs: $(INSTALLED) ## build the documentation into build/site; SERVE=1 serves it while it is written
	$(BIN)/python docs/api_pages.py
	$(BIN)/zensical $(if $(SERVE),serve,build --strict)

openapi: $(INSTALLED) ## write openapi.yaml
	$(BIN)/python -m service openapi > openapi.yaml

# int8 is accepted on real pairs only, which a clone does not hold: DATA=folder, where the recipe's data/ is.
BENCHED := $(if $(DATA),build/bench/starter-int8,build/starter)

bench: $(BENCHED)/manifest.json $(INSTALLED) ## measure the speed figures, about 20 minutes; ONLY=name one part, DATA=folder int8 too
	$(BIN)/python -m benchmarks --bundle $(BENCHED) $(if $(ONLY),--only $(ONLY))

build/bench/starter-int8/manifest.json: build/starter/manifest.json $(INSTALLED)
	$(BIN)/python -m training export training/recipes/starter.yaml --projectors starter/projectors.safetensors \
		--set data.root=$(abspath $(DATA)) --set 'export.precisions=[fp32,int8]' --out $(@D)

bench-store: build/starter/manifest.json $(INSTALLED) ## measure the store with 1,000,000 vectors; VECTORS=n for fewer, WORK=folder keeps it
	$(BIN)/python -m benchmarks.store $(if $(VECTORS),--vectors $(VECTORS)) $(if $(WORK),--work $(WORK))

crash: build/starter/manifest.json $(INSTALLED) ## kill the server 50 times while it is written to, and look whether anything is lost
	$(BIN)/python -m benchmarks.crash

consistency: build/starter/manifest.json $(INSTALLED) ## search 20,000 times in each way while items are written, and look whether any is missed
	$(BIN)/python -m benchmarks.consistency

hostile: build/starter/manifest.json $(INSTALLED) ## send the server what is made to hurt, and look at each answer, its time, and the memory it took
	$(BIN)/python -m benchmarks.hostile

first-run: $(INSTALLED) tools ## from a clone to one's own photograph, timed step by step; then 1,000 photographs, and the page
	$(BIN)/python -m benchmarks.first_run

field: build/starter/manifest.json $(INSTALLED) ## send files as people have them through every door, and look whether each is read as what it is
	$(BIN)/python -m benchmarks.field

protocols: $(INSTALLED) ## speak to the server with the real clients of other servers; the table of docs/integrations
	$(BIN)/python -m benchmarks.protocols

fuzz: build/starter/manifest.json $(INSTALLED) ## ask the server all that openapi.yaml allows and forbids; give the decoders damaged files
	$(BIN)/python -m benchmarks.fuzz

chaos: build/starter/manifest.json $(INSTALLED) redis tools ## break what the server stands on, under load, and look at what its clients see
	$(BIN)/python -m benchmarks.chaos

rolling: build/starter/manifest.json $(INSTALLED) tools ## restart two replicas behind nginx 20 times under load; RESTARTS=n for another number
	$(BIN)/python -m benchmarks.rolling $(if $(RESTARTS),--restarts $(RESTARTS))

bench-gpu: $(INSTALLED) ## measure what only a GPU can show; says so where there is none
	$(BIN)/python -m benchmarks.gpu

audit: $(INSTALLED) ## ask the advisory service about every pinned version; says so where it cannot be reached
	$(BIN)/python .ci/audit.py

sbom: $(INSTALLED) ## write build/sbom.json: what the serving image holds (CycloneDX); EXTRA=gpu for the other one
	$(BIN)/python .ci/sbom.py build/sbom.json $(EXTRA)

screenshots: build/starter/manifest.json $(INSTALLED) tools ## try the playground in Chromium, and take the pictures of docs/playground anew
	$(BIN)/python -m pytest -q tests/playground
	$(BIN)/python -m tests.playground.pictures

starter: $(BUNDLE) ## build the bundle that demo and serve use

wheels: build/starter/manifest.json $(BUNDLE) $(INSTALLED) ## build isthmus, isthmus-client and isthmus-starter into dist; STARTER=free one more
	$(BIN)/python deploy/wheels.py dist build/starter $(if $(STARTER),build/$(NAME))

redis: # the tests use a real Redis; without it those that need it are skipped, which CI does not allow
	@command -v redis-server >/dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
			&& DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends redis-server >/dev/null; } \
		|| { echo "redis-server is not installed: the tests that need it are skipped"; [ -z "$$CI" ]; }

tools: # nginx (rolling restarts), promtool (alert rules), libfaketime (clocks), Chromium (the playground), Java's client, shells, as above
	@{ [ -x /usr/sbin/nginx ] || command -v nginx >/dev/null; } && command -v promtool >/dev/null \
		&& ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1 \
		&& { command -v chromium || command -v google-chrome; } >/dev/null && command -v java >/dev/null \
		&& command -v zsh >/dev/null && command -v fish >/dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
			&& DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
				nginx-light prometheus faketime chromium default-jdk-headless zsh fish >/dev/null; } \
		|| { echo "nginx, promtool, libfaketime, Chromium, Java, zsh or fish is not installed: the tests that need them are skipped"; [ -z "$$CI" ]; }

clean: ## remove what was built (not the virtual environment, not var/store)
	rm -rf build dist *.egg-info isthmus_client/build isthmus_client/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Until 1.14 the distribution isthmus owned the command, and would take it along when the newer one replaces it.
$(BASICS): pyproject.toml isthmus_client/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip uninstall --quiet --yes --disable-pip-version-check isthmus 2>/dev/null || true
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ./isthmus_client -e '.[cpu,train,demo]'
	@touch $@

$(INSTALLED): $(BASICS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ./isthmus_client -e '.[cpu,train,demo,dev,docs,integrations]'
	@touch $@

$(STORES): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[stores]'
	@touch $@

# Real photographs and sounds, on which the starter's exported graphs are checked.
build/media/.made: $(BASICS) examples/photos.py examples/sounds.py
	$(BIN)/python -m examples.photos build/media >/dev/null
	$(BIN)/python -m examples.sounds build/media >/dev/null
	@touch $@

SOURCES := $(shell find starter training service/contract -type f -not -name '*.pyc')
EXPORT = $(BIN)/python -m training export training/recipes/$(1).yaml \
	--projectors $(2)/projectors.safetensors --samples build/media --out build/$(1)

build/starter/manifest.json: build/media/.made $(SOURCES)
	$(call EXPORT,starter,starter)
	@touch $@

build/starter-%/manifest.json: build/media/.made $(SOURCES)
	$(call EXPORT,starter-$*,starter/$*)
	@touch $@
