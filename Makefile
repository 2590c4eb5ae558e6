# Everything here needs Python 3.11 to 3.14 with its venv, make and git; the rest is installed into .venv.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
  "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && { command -v "$$python"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
LOCKED := $(VENV)/.locked
READY := $(VENV)/.ready
# Two processes work side by side, so each computes with one thread; the environment may say otherwise.
export OMP_NUM_THREADS ?= 1
FUZZ_SECONDS ?= 600

.PHONY: help demo test long fuzz any-cpu count lab export notebooks docs dicom-check ray tables benchmark browser lock record ship
help:            ## say what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 22

# Each is made when it is missing or older than what it installs, and not otherwise.
$(LOCKED): requirements.lock
	@.ci/set-up "$(PYTHON)" $(VENV)
	@touch $@
$(READY): $(LOCKED) settings.ini setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)   ## train, evaluate and show both methods on a synthetic data set, and fuse two scans of a synthetic head
	$(BIN)/python .ci/demo.py fill
	$(BIN)/medfusion train wavelet --run demo -p replace=true
	$(BIN)/medfusion train resnet --run demo -p replace=true -p backbone_weights=medfusion -p epochs=3
	$(BIN)/python .ci/demo.py scans
	$(BIN)/medfusion scan results/demo_scans/ct results/demo_scans/mri --truth results/demo_scans/truth.tfm -o results/scan_fusion/demo --replace
	$(BIN)/python .ci/demo.py report

test: $(READY)   ## pass every check
	.ci/leaves-nothing $(BIN)/python .ci/nbdev_test.py --n_workers 2
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not long'

long: $(READY)   ## the checks that take long, and all faults, with their table
	$(BIN)/python -m pytest -q -m 'long or fault'

fuzz: $(READY)   ## search for inputs that break a promise, for FUZZ_SECONDS=600
	.ci/fuzz $(BIN)/python $(FUZZ_SECONDS)

any-cpu: $(READY)    ## pass every check as if on other CPUs, one change at a time
	.ci/any-cpu

count: $(READY)  ## the length of the exported cells, and which cells break the rule
	@$(BIN)/python tests/notebook_rule.py

lab: $(READY)    ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir nbs

export: $(READY) ## clean the notebooks and write the package from them
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

notebooks: $(READY)  ## execute all notebooks on the phantom for the outputs that are committed
	$(BIN)/python .ci/execute_notebooks.py

docs: $(READY)   ## build the site of the notebooks, _docs/html/docs/index.html (fetches Sphinx the first time)
	@$(BIN)/python -c 'import myst_nb, latex2mathml' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . _docs/html

dicom-check: $(READY)  ## check derived DICOM series by dciodvfy (apt-get install dicom3tools) and highdicom (fetched the first time)
	@$(BIN)/python -c 'import highdicom' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check highdicom
	$(BIN)/python .ci/dicom_check.py

ray: $(READY)    ## fuse on a Ray cluster of this machine, whose workers are killed, too (fetches Ray the first time)
	@$(BIN)/python -c 'import ray.data, pyarrow' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[ray]'
	MEDFUSION_REQUIRE_RAY=1 $(BIN)/python -m pytest -q tests/test_engines.py

tables: $(READY) ## write the tables of README.md and MODEL_CARD.md from recorded results
	$(BIN)/python .ci/tables.py

ship: $(READY)   ## put the network of a finished run into the package: METHOD=wavelet RUN=NAME
	$(BIN)/python .ci/ship.py "$(METHOD)" "$(RUN)"

record: $(READY) ## make the records of results/recorded anew at this commit, and the tables; HARVARD=folder spares the download
	.ci/record $(BIN)/python $(if $(HARVARD),"$(HARVARD)")

benchmark: $(READY)  ## compare all methods on the phantom's test cases
	$(BIN)/medfusion benchmark

browser: $(READY)    ## drive the notebooks in JupyterLab with a real browser
	MEDFUSION_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -q -s tests/test_browser.py

lock:            ## resolve the requirements of settings.ini anew, for every platform
	.ci/lock "$(PYTHON)"
