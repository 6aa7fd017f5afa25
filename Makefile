# Everything happens in .venv, made from the exact pins in requirements.lock. `make help` lists the targets.
PYTHON ?= python3
SCALE  ?=
PORT   ?= 8000

BIN   := .venv/bin
# One stamp per content of the lock: the second call installs nothing, a changed lock installs again.
STAMP := .venv/.installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d ' ' -f 1)
# `make lock` holds these: the newest torch that also comes as a CPU build, and what still works on Python 3.11.0.
HOLD  ?= torch==2.13.0 torchvision==0.28.0 'soupsieve<3'

.DEFAULT_GOAL := help
.PHONY: help book notebooks tables slides headline labs student test lint format serve reproduce plan models export \
  bench gpu linkcheck lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

book: notebooks ## Run the notebooks, render the book to _build/html (SCALE=photo; FRESH=1 measures everything again)
	$(BIN)/jupyter-book build -q -W -n --keep-going --all --path-output . _build/executed
	@echo "The book is at _build/html/index.html"

notebooks: $(STAMP) ## Run every notebook that changed, to _build/executed
	$(BIN)/python tools/execute.py $(if $(FRESH),--fresh) $(if $(SCALE),-p scale $(SCALE))

tables: $(STAMP) ## The tables of the book that was made last, as PDF, a file per part, to _build/html/tables
	$(BIN)/python tools/tables.py

slides: $(STAMP) ## The figures of the book that was made last as slides, a file per part, to _build/html/slides
	$(BIN)/python tools/slides.py

headline: $(STAMP) ## Write what holds, from the shipped results, to the README and to the picture that links show
	$(BIN)/python tools/headline.py

labs: $(STAMP) ## The labs for students and for instructors, to _build/labs
	$(BIN)/python tools/labs.py

student: $(STAMP) ## The chapters without solutions and the labs as handed out, to _build/student
	$(BIN)/python tools/student.py

test: $(STAMP) ## Lint, unit tests, every notebook, a book without warnings (ALL=1 leaves no test out, COV=1 measures coverage)
	@$(MAKE) --no-print-directory lint || { echo "0 passed, 1 failed (lint)"; exit 1; }
	$(if $(ALL),,ROBUSTCLIP_TESTS=few) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 10 $(if $(COV),--cov --cov-report term)

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP) ## Repair style and formatting, clear the outputs of notebooks
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python tools/clear_notebooks.py

serve: ## Show the built book at http://localhost:8000 (PORT=...)
	$(PYTHON) -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

reproduce: $(STAMP) ## Measure the cells of the shipped results again; SCALE=paper (ROLE=...): what papers print of CLIP
	$(BIN)/robustclip reproduce $(if $(SCALE),--scale $(SCALE)) $(addprefix --role ,$(ROLE))

plan: $(STAMP) ## Say what the pages would cost at scale paper, in hours and gigabytes (SCALE=...)
	$(BIN)/python tools/plan_pages.py $(if $(SCALE),--scale $(SCALE))

models: $(STAMP) ## Train the embedded models again, two at a time; those of photographs need ROBUSTCLIP_DATA
	OMP_NUM_THREADS=1 $(BIN)/python tools/pretrain.py tinyworld-clip tinyworld-mlm & drawn=$$!; \
	  OMP_NUM_THREADS=1 $(BIN)/python tools/pretrain.py photo-clip photo-mlm || failed=1; \
	  wait $$drawn && test -z "$$failed"

export: $(STAMP) ## Write what was measured to results, from where it is shipped (SCALE=quick|full|photo|paper)
	$(BIN)/robustclip export $(if $(SCALE),--scale $(SCALE))

bench: $(STAMP) ## Time our attacks and their rivals side by side, to benchmarks/results (ONLY=image|text|attacks|defenses)
	$(BIN)/python benchmarks/run.py $(if $(ONLY),--only $(ONLY))

gpu: $(STAMP) ## On a GPU: parity with the CPU, throughput, memory, to benchmarks/results/gpu.json; about 8 minutes at most
	@$(BIN)/python benchmarks/gpu.py

linkcheck: notebooks ## Check every link in the book (needs the network)
	$(BIN)/jupyter-book build -q --builder linkcheck --path-output . _build/executed

lock: ## Resolve pyproject.toml anew and write requirements.lock and environment.yml
	rm -rf _build/lock
	$(PYTHON) -m venv _build/lock
	_build/lock/bin/python -m pip install -qq $(HOLD) ".[hub,slurm,book,dev]"
	$(PYTHON) tools/lock.py _build/lock/bin/python
	rm -rf _build/lock

clean: ## Remove what was built; .venv and measured results (runs/) stay
	rm -rf _build build dist .coverage .pytest_cache .ruff_cache .hypothesis

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	@echo "Installing the pinned packages into .venv, about 60 seconds ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -W ignore -m compileall -q -j 0 -x '/tests/|/transformers/models/' .venv/lib >/dev/null 2>&1 || true  # pip would use one core
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@rm -f .venv/.installed-* && touch $@
