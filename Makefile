# make demo    set up, train OrdinalCLIP and its simplest rivals on generated gauges, print the table, predict ten images
# make test    set up, run the tests that take less than ten minutes on two cores
# make lint    ruff and mypy
# make bench   the measurements behind the README's numbers that need no data of yours
# make invariance   method x processes x micro-batch: the largest difference in losses and weights
# make chaos   runs killed at random and resumed: kills, resumes, differences
# make stops   Ctrl-C, SIGKILL and full disks at random moments of training and comparing, then on to the end
# make notebooks   all notebooks from top to bottom, in place, with what they print and draw
# make mutants  faults planted one at a time: which test notices each
# make clean   remove environment, caches and demo runs

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE  # without bytecode the libraries take twice as long to import

.PHONY: demo test slow-test lint bench invariance chaos stops notebooks mutants clean
.DELETE_ON_ERROR:

# One installation, repeated only when pyproject.toml changes; uv when it is there, pip when not.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if command -v uv >/dev/null; then uv pip install -q --python $(BIN)/python -e '.[dev,bench,pretrained]'; \
	else $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev,bench,pretrained]'; fi
	touch $@

demo: $(VENV)/.installed
	$(BIN)/ordinalclip compare demo
	$(BIN)/ordinalclip make-gauges runs/demo-images --kind thermometer --num 10 --overwrite --quiet
	$(BIN)/ordinalclip predict runs/demo-images --model runs/compare/demo --quiet

test: $(VENV)/.installed
	$(BIN)/python -m pytest

slow-test: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/text_tower.py
	$(BIN)/python benchmarks/tiny_clip.py --evaluate

invariance: $(VENV)/.installed
	$(BIN)/python benchmarks/invariance.py

chaos: $(VENV)/.installed
	$(BIN)/python benchmarks/chaos.py

stops: $(VENV)/.installed
	$(BIN)/python benchmarks/stops.py

notebooks: $(VENV)/.installed
	$(BIN)/python notebooks/execute.py

mutants: $(VENV)/.installed
	$(BIN)/python benchmarks/mutants.py --jobs 2

clean:
	rm -rf $(VENV) build dist *.egg-info runs/compare/demo runs/demo-images .pytest_cache .ruff_cache .mypy_cache
