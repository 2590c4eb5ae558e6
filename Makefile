# Everything here needs Python 3.11 or newer, make and git; the rest is installed into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test lab export notebooks benchmark browser lock
help:            ## say what there is
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):[^#]*## */  make \1\t/' | expand -t 22

# Made when it is missing or older than the lock, and not otherwise.
$(READY): requirements.lock
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "medfusion needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import cv2' 2>/dev/null \
	  || { echo "OpenCV lacks a system library ($$($(BIN)/python -c 'import cv2' 2>&1 | tail -n 1)); on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0" >&2; exit 1; }
	@touch $@

demo: $(READY)   ## train, evaluate and show both methods on a synthetic data set
	$(BIN)/python .ci/demo.py fill
	$(BIN)/medfusion train wavelet --run demo -p checkpoint_dir=results/trainable_wavelet_fusion/demo/checkpoints
	$(BIN)/medfusion train resnet --run demo -p checkpoint_dir=results/resnet_fusion/demo/checkpoints \
	  -p backbone_weights=medfusion -p epochs=3
	$(BIN)/python .ci/demo.py report

test: $(READY)   ## pass every check
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --pause 0.5
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests

lab: $(READY)    ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir nbs

export: $(READY) ## clean the notebooks and write the package from them
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

notebooks: $(READY)  ## execute all notebooks on the phantom for the outputs that are committed
	$(BIN)/python .ci/execute_notebooks.py

benchmark: $(READY)  ## compare all methods on the phantom's test cases
	$(BIN)/medfusion benchmark

browser: $(READY)    ## drive the notebooks in JupyterLab with a real browser
	MEDFUSION_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -q -s tests/test_browser.py

lock: $(READY)   ## freeze what is installed
	.ci/lock $(BIN)/pip > requirements.lock.tmp && mv requirements.lock.tmp requirements.lock
	touch $(READY)
