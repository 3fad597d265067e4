# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
CIFAR10 = $(if $(DATA),data=folder data.root=$(DATA),data=cifar10)
export MLFLOW_DISABLE_TELEMETRY := true
unexport PYTHONDONTWRITEBYTECODE  # the tests start Python hundreds of times: 2.5 instead of 6 seconds each with compiled files

.DEFAULT_GOAL := help
.PHONY: help setup train suggestions test test-hydra14 test-slurm bench bench-gpu gpu-check lint types docs docs-check lock mlflow mlflow-address tracking-server clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/dev  ## make .venv with everything pinned, tests and tools included

.venv/bin/uv: requirements/uv.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "error: Python %d.%d is not supported; use 3.11 to 3.13, for example make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@touch $@

.venv/train: .venv/bin/uv requirements/train.txt pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/train.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

.venv/dev: .venv/train requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/dev.txt
	@touch $@

# Variables on the command line that are not make's own: keys of train.py, which would not get them.
SPACE := $(subst ,, )
KEYS := $(filter-out ARGS PYTHON BIN DATA,$(foreach word,$(subst \$(SPACE),_,$(MAKEOVERRIDES)),$(firstword $(subst =, ,$(word)))))

train: .venv/train  ## train: make train ARGS="method=simclr data=cifar10"; the default learns digits in some minutes
	@$(if $(KEYS),echo 'error: make takes no $(firstword $(KEYS))=; write make train ARGS="$(firstword $(KEYS))=…"' >&2; exit 2)
	$(BIN)/python train.py $(ARGS)
	@$(if $(ARGS),,$(MAKE) --no-print-directory suggestions)

suggestions:  # what `make train` ends with; tests/test_suggestions.py runs them
	@echo 'What to try next:'
	@echo '  $(BIN)/python evaluate.py run=latest protocol=map              # a picture of what the encoder takes for similar'
	@echo '  $(BIN)/python train.py method=simclr                           # another method'
	@echo '  $(BIN)/python train.py data=folder data.root=photos            # images of yours: photos/train/<class>, photos/test/<class>'
	@echo '  make mlflow                                                # all runs side by side, at http://127.0.0.1:5000'

# Four files at a time, each on one thread: a third of the time, tests wait for processes that they started. ARGS="-n 0"
# takes them one by one.
test: .venv/dev  ## all tests but those that need a SLURM cluster
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(ARGS)

HYDRA14_TESTS = tests/config tests/test_configs.py tests/test_bad_input.py tests/sweeps/test_composing.py tests/sweeps/test_search.py

.venv/hydra14: .venv/dev requirements/hydra14.txt
	rm -rf $@
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps --target $@ -r requirements/hydra14.txt
	@touch $@

test-hydra14: .venv/hydra14  ## tests of command lines with the newest candidate of Hydra 1.4
	PYTHONPATH=$(CURDIR)/.venv/hydra14 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(HYDRA14_TESTS) $(ARGS)

# Each on one thread, two at a time; what is timed by the clock, or has a thread of its own, alone.
bench: .venv/dev  ## benchmarks against other tools, with DATA=<folder of CIFAR-10> whole trainings, too
	@$(MAKE) --no-print-directory -k bench-startup bench-stalls; code=$$?; \
	$(MAKE) --no-print-directory -k -j 2 --output-sync $(if $(DATA),bench-pcl bench-loops bench-resnet18 bench-epoch) \
		bench-growth bench-views bench-decoding bench-knn bench-large_kmeans bench-probe || code=$$?; \
	$(BIN)/python benchmarks/table.py && exit $$code

MEASURE = OMP_NUM_THREADS=1 $(BIN)/python benchmarks
bench-startup bench-stalls: OPTIONS = --rounds 9
bench-epoch: OPTIONS = data.root=$(DATA) --rounds 3
bench-loops: OPTIONS = data.root=$(DATA) --rounds 30
bench-growth: OPTIONS = --rounds 3
bench-knn: OPTIONS = --queries 2000
bench-large_kmeans: OPTIONS = --rounds 1
bench-probe: OPTIONS = --epochs 1 --rounds 15

bench-%: .venv/dev
	$(MEASURE)/$*.py $(OPTIONS) --json benchmarks/results/$*.json

bench-resnet18: .venv/dev
	$(MEASURE)/loops.py data.root=$(DATA) backbone=resnet18_cifar batch_size=16 --rounds 9 \
		--json benchmarks/results/loops_resnet18.json

PCL = outputs/bench-pcl
bench-pcl: .venv/dev  # a training, from which the benchmarks of its k-means and of the linear probe take features and run
	rm -rf $(PCL)
	$(MEASURE)/kmeans.py --train $(PCL)/features data=folder data.root=$(DATA) epochs=3 protocol=[] tracking=files \
		augmentation.views.both.size=0.5 hydra.run.dir=$(PCL)/run
	for k in 250 500 1000; do \
		$(MEASURE)/kmeans.py --features $(PCL)/features/*.npy --k $$k --rounds 1 --json benchmarks/results/kmeans_$$k.json || exit; done
	$(MEASURE)/linear.py $(PCL)/run --rounds 1 --json benchmarks/results/linear.json

bench-gpu: .venv/dev  ## steps of five methods, views, kNN, k-means, batch norms and features on a GPU; DATA=<folder of CIFAR-10> or the download
	$(BIN)/python benchmarks/step.py $(CIFAR10) runtime.device=cuda --profile moco --json benchmarks/results/step.json
	$(BIN)/python benchmarks/views.py --device cuda --json benchmarks/results/views_gpu.json
	$(BIN)/python benchmarks/knn.py --device cuda --json benchmarks/results/knn_gpu.json
	$(BIN)/python benchmarks/kmeans.py --device cuda --json benchmarks/results/kmeans_gpu.json
	$(BIN)/python benchmarks/norms.py --json benchmarks/results/norms.json
	$(BIN)/python benchmarks/features.py --device cuda --json benchmarks/results/features_gpu.json
	$(BIN)/python benchmarks/table.py

# On machines without a package index, too: by .venv where there is one, else by the Python that has the packages.
MINUTES ?= 13
gpu-check:  ## everything that needs a GPU, within MINUTES=13, with DATA=<folder of CIFAR-10>; results in outputs/gpu_check
	PYTHONPATH=src $(if $(wildcard .venv/dev),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py \
		$(if $(DATA),--data $(DATA)) --minutes $(MINUTES) $(ARGS)

test-slurm: .venv/dev  ## tests of sweeps on a SLURM of virtual nodes on this machine (Debian, root)
	tests/slurm/cluster start
	eval "$$(tests/slurm/cluster env)" && OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm $(ARGS); \
		code=$$?; tests/slurm/cluster stop; exit $$code

lint: .venv/dev  ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev  ## static types
	$(BIN)/pyright

docs: .venv/dev  ## write the pages that are made from the code and from results of benchmarks
	$(BIN)/python docs/options.py
	$(BIN)/python benchmarks/table.py

docs-check: .venv/dev  ## run the commands of README and docs in a copy of the checkout; ARGS="sweeps" for one page
	OMP_NUM_THREADS=1 $(BIN)/python docs/check.py $(ARGS)

mlflow: .venv/train mlflow-address  ## MLflow's pages on all runs, at http://127.0.0.1:5000, or ARGS="--port 5001"
	$(BIN)/mlflow ui --workers 1 --backend-store-uri sqlite:///$(CURDIR)/mlflow.db $(ARGS)

mlflow-address:  # what `make mlflow` begins with, with the port of ARGS; tests/test_suggestions.py runs it
	@port=$$(echo ' $(ARGS)' | sed -nE 's/.* (--port|-p)[ =]*([0-9]+).*/\2/p'); \
	echo "http://127.0.0.1:$${port:-5000}/#/experiments?workflowType=machine_learning"

tracking-server: .venv/train  ## an MLflow server on PostgreSQL for many machines: make tracking-server ARGS="--host 0.0.0.0"
	$(BIN)/python -m twoviews.tracking serve $(ARGS)

COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url --upgrade
lock: .venv/bin/uv  ## pin the newest versions within the ranges of pyproject.toml that fit together
	$(COMPILE) --group uv -o requirements/uv.txt
	$(COMPILE) pyproject.toml --group build -o requirements/train.txt
	$(COMPILE) pyproject.toml --group build --group dev -c requirements/train.txt -o requirements/dev.txt
	$(COMPILE) --group hydra14 --prerelease allow --no-deps -o requirements/hydra14.txt

clean:  ## remove the environment; runs and data stay
	rm -rf .venv
