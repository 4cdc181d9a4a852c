# make demo    environment, data, training, tables, animated samples: 6 minutes on 2 CPU cores, no GPU
# make paper   are BlockGen's claims true at this scale? 24 small networks, docs/paper.md: 36 minutes on the same machine
# make test    what CI runs, 5 to 6 minutes
# make faults  runs killed at random moments, full disks, malformed input: 10 minutes
# make lint

PY := .venv/bin/python
PYTHON ?= python3
SECOND := $(addprefix tests/,test_samplers.py test_eval.py test_corpus.py test_gsm8k.py test_published.py test_attention.py test_distill.py test_recorded.py)

.PHONY: demo paper test faults lint
.DELETE_ON_ERROR:

demo: .venv/done
	$(PY) data/sudoku/prepare.py
	$(PY) train.py config/sudoku.toml
	$(PY) train.py config/sudoku_uniform.toml
	$(PY) eval.py --samples --ckpt out/sudoku
	$(PY) eval.py --samples --ckpt out/sudoku_uniform
	$(PY) eval.py --samples --ckpt out/sudoku --clues false
	$(PY) sample.py --ckpt out/sudoku --animate --prompt_file data/sudoku/puzzles.txt --steps 8
	@echo
	@echo "What you saw: block size 1 (AR) takes 16 passes a grid. One parallel pass makes mistakes, more passes repair them,"
	@echo "and ARPC repairs most: the AR mode of the same network marks the worst tokens."
	@echo "Only 288 grids exist: this shows whether the tokens of a block fit each other, not generalisation."
	@echo "Try next: $(PY) sample.py --ckpt out/sudoku --animate --prompt_file data/sudoku/puzzles.txt --sampler arpc --steps 8"

paper: .venv/done
	$(PY) data/digits/prepare.py
	$(PY) -m lab.paper
	$(PY) -m lab.plots --film out/paper/masked_mixture/0,out/paper/uniform_mixture/0

test: .venv/done
	$(PY) -m ruff check .
	@$(PY) -m pytest -p no:cacheprovider $(SECOND) > .second_half.txt 2>&1 & second=$$!; \
	trap "kill $$second; exit 130" INT TERM; \
	$(PY) -m pytest $(SECOND:%=--ignore=%); first=$$?; \
	wait $$second; second=$$?; cat .second_half.txt; exit $$((first + second))

faults: .venv/done
	$(PY) -m tests.faults

lint: .venv/done
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@
