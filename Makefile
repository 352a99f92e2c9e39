# make profile   create the environment, install, and profile the bundled checkpoint
# make test      create the environment, install, and run the tests (PYTEST: options for pytest)

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

profile: $(VENV)/installed
	$(VENV)/bin/sedetect profile tests/data/tiny-moe -o out/tiny-moe

# A process for each core, with one thread.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical --maxprocesses 8 $(PYTEST)

# Without build isolation: the extension must be built against the torch it will run with.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools pybind11 ninja
	$(PIP) --no-build-isolation --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info sedetect/_C*.so sedetect/_cuda*.so

.PHONY: profile test clean
