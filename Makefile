# Every target sets up .venv by itself. `make` alone lists them.
PYTHON ?= python3
RUN := .venv/bin/python
DEMO := demo
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint doctor train bench clean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

setup: .venv/.done  ## create .venv and install requirements.txt (about 5 GB, one to five minutes)

.venv/.done: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"error: Python 3.10 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.12")'
	@echo "== setting up .venv (torch and its CUDA libraries are about 5 GB)"
	@$(PYTHON) -m venv .venv || { echo "error: python's venv module is missing (Debian: apt install python3-venv)" >&2; exit 2; }
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --progress-bar on -r requirements.txt -r requirements-dev.txt
	@touch $@

demo: setup  ## draw and grade 1,000 digits with the shipped weights, draw the figures of P1 and P2 (4 minutes, no data, no GPU)
	@echo "== 1/4 drawing the 1,000 graded digits"
	@time -p bash hw2_1.sh $(DEMO)/digits
	@echo "== 2/4 grading them"
	@$(RUN) P1_classifier.py grade $(DEMO)/digits --record $(DEMO)/grades.json
	@echo "   (hw2_1.sh had these same judges show what to draw again; README.md has what the network does without: --retries 0)"
	@echo "== 3/4 figures of P1: a grid of each domain, the reverse process"
	@$(RUN) P1_report.py --figures grid reverse --output $(DEMO)/p1
	@echo "== 4/4 figures of P2 with the digits model: what eta does, slerp against linear interpolation"
	@$(RUN) P2_report.py --digit 3 --domain mnistm --output $(DEMO)/p2
	@echo "== done: digits in $(DEMO)/digits, scores in $(DEMO)/grades.json, figures in $(DEMO)/p1 and $(DEMO)/p2"

test: setup  ## all tests (a few minutes)
	$(RUN) -m pytest

lint: setup  ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy .

doctor: setup  ## what this machine has and how long each command would take
	@$(RUN) doctor.py

train: setup  ## train the digit model on hw2_data/digits (resumes)
	$(RUN) P1_training.py

bench: setup  ## side-by-side measurements of training and sampling
	$(RUN) benchmarks/p1_training.py
	$(RUN) benchmarks/p1_sampling.py
	$(RUN) benchmarks/p2_ddim.py
	$(RUN) benchmarks/p3_clip.py
	$(RUN) benchmarks/p3_textual_inversion.py speed
	$(RUN) benchmarks/p3_textual_inversion.py concepts
	$(RUN) benchmarks/p3_composition.py

clean:  ## remove .venv, runs and the demo's output
	rm -rf .venv runs $(DEMO)
