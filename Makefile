# The commands of this project. Each sets up .venv first where it has to (a moment when all is there).

PYTHON_OF_VENV = .venv/bin/python

# Threads that fight for cores cost more than they bring, on the few cores a test machine has most of all.
test test-fast: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL = help
.PHONY: help setup demo demo-trend demo-real pickcube test test-fast lint format bench

help:  ## this list
	@awk -F ":.*## " "/^[a-z-]+:.*## / { printf \"make %-10s %s\\n\", \$$1, \$$2 }" $(MAKEFILE_LIST)

setup:  ## .venv, and what the machine lacks to render (PYTHON=python3.12 chooses another Python)
	@./setup.sh

demo: setup  ## collect, train an image reward, RL on that reward alone; report in logs/demo (SEED=1: another seed)
	$(PYTHON_OF_VENV) benchmarks/demo.py $(if $(SEED),--seed $(SEED))

demo-trend: setup  ## collect, train a tiny Qwen3-VL to judge the trend, RL on that alone; report in logs/demo_trend (SEED=1)
	$(PYTHON_OF_VENV) benchmarks/demo_trend.py $(if $(SEED),--seed $(SEED))

demo-real: setup  ## a simulated Franka: label frames, train, judge live teleoperation; report in logs/demo_real (SEED=1)
	$(PYTHON_OF_VENV) benchmarks/demo_real.py $(if $(SEED),--seed $(SEED))

pickcube: setup  ## PickCube by a reward that sees two cameras and nothing else; report in logs/pickcube (SEED=1)
	$(PYTHON_OF_VENV) benchmarks/pickcube.py $(if $(SEED),--seed $(SEED))

test: setup  ## all tests, on the CPU
	$(PYTHON_OF_VENV) -m pytest

test-fast: setup  ## the tests without learning runs and whole workflows
	$(PYTHON_OF_VENV) -m pytest -m "not slow"

lint: setup  ## check the style
	$(PYTHON_OF_VENV) -m ruff check .
	$(PYTHON_OF_VENV) -m ruff format --check .

format: setup  ## mend the style
	$(PYTHON_OF_VENV) -m ruff check --fix .
	$(PYTHON_OF_VENV) -m ruff format .

bench: setup  ## measure the speed ratios of benchmarks/run.py
	$(PYTHON_OF_VENV) benchmarks/run.py
