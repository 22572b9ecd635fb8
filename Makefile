# What a contributor runs; `make` alone lists it. Needs make, git and Python 3.11 or later with venv.
#
#   PYTHON=python3.12    which Python makes the environments (default: the first found that can)
#   TORCH=yes|no|auto    auto runs the training and export tests where torch and what teachers and
#                        shards need can be installed, yes fails where they cannot, no leaves
#                        them out
#   PYTEST_ARGS="-k x"   more arguments for pytest; "-n 0" runs all in one process
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu   takes the CPU builds of torch:
#                        1 GB of disk instead of 6
#   BENCHMARKS="start"   which of benchmarks/*.py `make bench` runs; memory alone takes half an hour
#   MOVING_CLIPS="a.mp4 b.mp4"   `make bench` scores every frame of these side by side, too
#   FAIL_WITHOUT_SERVERS=1, DGIQA_ODD_MEDIA=DIR   are passed on to the tests

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?=
TORCH ?= auto
PYTEST_ARGS ?=
VENV ?= .venv
DEMO_VENV ?= .venv-demo
BIN := $(abspath $(VENV))/bin
CONSTRAINTS := .ci/constraints.txt
MOVING_CLIPS ?=
BENCHMARKS ?= score_every_frame start streams peers pooling memory
EXTRAS_WITH_TORCH := report,prometheus,train,quant,teacher,shards

# The tests run elsewhere, so a relative folder would be lost on the way.
ifneq ($(strip $(DGIQA_ODD_MEDIA)),)
export DGIQA_ODD_MEDIA := $(abspath $(DGIQA_ODD_MEDIA))
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tools and tests see what is installed, not what a shell profile adds.
unexport PYTHONPATH
unexport PYTHONHOME

# $(call make_venv,FOLDER): an environment, or one line that says what to install.
define make_venv
for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do
  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
  then break; else python=; fi
done
if [ -z "$$python" ]; then
  echo "No Python 3.11 or later that can make virtual environments" \
    "$(if $(PYTHON),(PYTHON=$(PYTHON)) ,)was found." >&2
  echo "On Debian or Ubuntu: sudo apt-get install python3 python3-venv" >&2
  echo "Or name one: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12" >&2
  exit 1
fi
"$$python" -m venv --clear $(1)
$(1)/bin/python -m pip install --quiet --upgrade "pip>=25.1"   # 25.1: dependency groups
endef

# $(call say,TEXT): a headline, so that a long log can be read.
say = printf '\n== %s\n' "$(1)"

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

.PHONY: test
test: lint types wheel ## lint, types, and the whole suite against the built wheel
	@$(call say,tests against the wheel)
	stage=$$(mktemp -d)
	trap 'rm -rf "$$stage"' EXIT
	# Only what tests read: a module missing in the wheel cannot be found in the checkout.
	cp -R tests configs docs README.md CHANGELOG.md CONTRIBUTING.md pyproject.toml "$$stage"
	find "$$stage" -name __pycache__ -prune -exec rm -rf {} +
	without=()
	if [ "$(TORCH)" = no ] || ! $(BIN)/python -c 'import torch' 2>/dev/null; then
	  echo "without torch: tests/distill and tests/quant are left out"
	  without=(--ignore=tests/distill --ignore=tests/quant)
	fi
	if [ "$(TORCH)" = yes ]; then export FAIL_WITHOUT_PACKAGES=1; fi
	cd "$$stage"
	DGIQA_CHECKOUT="$(CURDIR)" PATH="$(BIN):$$PATH" \
	  $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup "$${without[@]}" $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/tools ## ruff, formatting, import contracts, spelling, test docstrings
	@$(call say,lint)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/interrogate --quiet tests || $(BIN)/interrogate -vv tests   # which one

.PHONY: types
types: wheel ## mypy, strict on dgiqa_stream and plugins
	@$(call say,types)
	$(BIN)/mypy

.PHONY: wheel
wheel: $(VENV)/tools ## build the wheel and install it into .venv
	@$(call say,wheel)
	rm -rf $(VENV)/wheel
	$(BIN)/python -m hatchling build -t wheel -d $(VENV)/wheel
	wheel=$$(echo $(VENV)/wheel/*.whl)
	# pip keeps an installed wheel of the same version, whatever is in it
	$(BIN)/pip uninstall --quiet --yes dgiqa-stream 2>/dev/null
	plain=("$$wheel[report,prometheus]")
	with_torch=("$$wheel[$(EXTRAS_WITH_TORCH)]" --group test-torch)
	install=($(BIN)/pip install --quiet -c $(CONSTRAINTS))
	case "$(TORCH)" in
	  no) "$${install[@]}" "$${plain[@]}" ;;
	  yes) "$${install[@]}" "$${with_torch[@]}" ;;
	  auto)
	    if ! "$${install[@]}" "$${with_torch[@]}"; then
	      echo "torch cannot be installed here; TORCH=no does not try, TORCH=yes insists" >&2
	      "$${install[@]}" "$${plain[@]}"
	    fi ;;
	  *) echo "TORCH=$(TORCH) is not one of yes, no, auto" >&2; exit 2 ;;
	esac
	$(BIN)/pip check

.PHONY: demo
demo: $(DEMO_VENV)/ready ## install the runtime alone and run the demo
	@$(DEMO_VENV)/bin/python demo/demo.py

.PHONY: bench
bench: wheel ## measure speed, lag, memory and peers (an hour); README's tables follow
	@clips=$$(mktemp -d)
	trap 'rm -rf "$$clips"' EXIT
	make_clip=($(BIN)/python benchmarks/make_clip.py demo/room.mp4)
	"$${make_clip[@]}" -o "$$clips/reference_1080p30.mp4" --seconds 9
	"$${make_clip[@]}" -o "$$clips/live_1080p30.mp4" --seconds 6 --keyframe-seconds 2
	for name in $(BENCHMARKS); do
	  $(call say,$$name)
	  case $$name in
	    streams | memory) clip=(--clip "$$clips/live_1080p30.mp4") ;;
	    pooling) clip=() ;;
	    *) clip=(--clip "$$clips/reference_1080p30.mp4") ;;
	  esac
	  $(BIN)/python "benchmarks/$$name.py" "$${clip[@]}"
	done
	if [ -n "$(MOVING_CLIPS)" ]; then
	  $(call say,score_every_frame of what moves)
	  $(BIN)/python benchmarks/make_clip.py $(MOVING_CLIPS) -o "$$clips/moving_1080p30.mp4" \
	    --seconds 9 --megabits-per-second 6 --keyframe-seconds 2
	  $(BIN)/python benchmarks/score_every_frame.py --clip "$$clips/moving_1080p30.mp4" \
	    -o benchmarks/results/score_every_frame_moving.json
	fi
	$(BIN)/python benchmarks/tables.py

.PHONY: gpu-check
gpu-check: ## GPU tests and measurements in under ten minutes; installs nothing
	@$(or $(PYTHON),python3) benchmarks/gpu_check.py

.PHONY: clean
clean: ## remove the environments, caches and what the demo wrote
	rm -rf $(VENV) $(DEMO_VENV) .nox dist demo-output .pytest_cache .mypy_cache .ruff_cache \
	  .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/tools: pyproject.toml $(CONSTRAINTS)
	@$(call say,environment $(VENV))
	$(call make_venv,$(VENV))
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) --group build --group test --group lint
	touch $@

# Installed again when a file of the packages is newer: that is what the demo should show.
$(DEMO_VENV)/ready: pyproject.toml $(shell find dgiqa_stream plugins -type f ! -name '*.pyc' 2>/dev/null)
	@$(call say,environment $(DEMO_VENV))
	if [ ! -x $(DEMO_VENV)/bin/python ]; then
	$(call make_venv,$(DEMO_VENV))
	fi
	$(DEMO_VENV)/bin/pip install --quiet --force-reinstall --no-deps .
	$(DEMO_VENV)/bin/pip install --quiet ".[report]"
	touch $@
