# Every target sets up .venv by itself. `make` alone lists them.
PYTHON ?= python3
UV ?= $(shell command -v uv 2>/dev/null)
RUN := .venv/bin/python
DEMO := demo
.DEFAULT_GOAL := help
.PHONY: help setup demo report test lint doctor train bench gpu mutants clean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

setup: .venv/.done  ## create .venv and install the requirements (about 5 GB, one to five minutes), with uv if it is installed, else with pip; UV= forces pip

.venv/.done: requirements.txt requirements-dev.txt $(if $(UV),uv.lock)
ifneq ($(UV),)
	@echo "== setting up .venv with the releases of uv.lock (torch and its CUDA libraries are about 5 GB)"
	$(UV) sync --frozen --inexact $(if $(filter file,$(origin PYTHON)),,--python "$(PYTHON)") || { echo "== uv failed: pip instead"; make setup UV=; }
else
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"error: Python 3.10 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.12")'
	@echo "== setting up .venv (torch and its CUDA libraries are about 5 GB)"
	@$(PYTHON) -m venv .venv || { echo "error: python's venv module is missing (Debian: apt install python3-venv)" >&2; exit 2; }
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --progress-bar on -r requirements.txt -r requirements-dev.txt
endif
	@touch $@

demo: setup  ## all three problems with the shipped weights, scores and one web page (no data, no GPU)
	@$(RUN) report.py --quick --output "$(DEMO)"

report: setup  ## every figure and table on one web page: make report [DATA=hw2_data] [UNET=UNet.pt] [MODEL=sd-v1-4.ckpt] [CLASSIFIER=Classifier.pth]
	@$(if $(JUDGE),$(error JUDGE is now CLASSIFIER))
	@$(RUN) report.py $(if $(OUTPUT),--output "$(OUTPUT)") $(if $(DATA),--data "$(DATA)") $(if $(MODEL),--model "$(MODEL)") \
		$(if $(UNET),--unet "$(UNET)") $(if $(CLASSIFIER),--mnistm-classifier "$(CLASSIFIER)") $(if $(DIGITS),--digits "$(DIGITS)") $(if $(CLIP),--clip "$(CLIP)")

# One thread per process: on two cores, two processes of two threads each take 50 times as long as one after the other.
test: setup  ## all tests (minutes; a process per core, four at most)
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

lint: setup  ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy .

doctor: setup  ## what this machine has and how long sampling and training take
	@$(RUN) doctor.py

train: setup  ## train the digit model on hw2_data/digits (resumes)
	$(RUN) P1_training.py

bench: setup  ## run all benchmarks, write one table, also into docs/results.md (hours on two cores; continues); QUICK=1: short runs, not into docs
	@$(RUN) benchmarks/table.py $(if $(QUICK),--quick,--results docs/results.md)

gpu: setup  ## run the benchmarks for a GPU in at most eight minutes, write one table (no network); MINUTES=N: another limit
	@$(RUN) benchmarks/table.py --gpu $(if $(MINUTES),--minutes $(MINUTES))

mutants: setup  ## mutation testing: the share of 200 seeded faults in the code that the tests notice (two hours on two cores; continues)
	@$(RUN) benchmarks/mutants.py $(if $(ONLY),--only $(ONLY))

clean:  ## remove .venv, runs, the demo's and the report's output
	rm -rf .venv runs report "$(DEMO)"
