# Two commands matter: `make run` and `make test`. Each installs what it needs into .venv.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
PIP     = .venv/bin/python -m pip --disable-pip-version-check
export PYTHONUNBUFFERED = 1

.PHONY: run test check drift docs bench toy claims rehearse clean

.venv/run: setup.py settings.ini
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	test -f README.md
	$(PIP) install -q "$(TORCH)"
	$(PIP) install -q -e ".[notebooks]" "$(TORCH)"
	touch $@

.venv/dev: .venv/run
	$(PIP) install -q -e ".[dev]" "$(TORCH)"
	touch $@

run: .venv/run ## post-train the toy with VA-π
	.venv/bin/papermill nbs/run_vapi.ipynb runs/vapi_toy.ipynb -k python3 </dev/null
	@echo "Done. Look at runs/vapi_toy.ipynb (a notebook with pictures) and at runs/vapi_toy/ (metrics, figures, checkpoint)."

drift: .venv/dev
	rm -rf build/drift && mkdir -p build/drift && cp -r nbs settings.ini arpo_nb build/drift/
	cd build/drift && find arpo_nb -name '*.py' -delete && ../../.venv/bin/nbdev_export
	diff -r -x assets -x __pycache__ arpo_nb build/drift/arpo_nb
	rm -rf build/drift

PAGES = OMP_NUM_THREADS=1 .venv/bin/nbdev_test --skip_file_re '^(\.|_|run_)' --n_workers 2 --timing
TESTS = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist worksteal

test: drift ## everything that proves it
	$(PAGES)
	$(TESTS) tests

check: drift ## the same for the impatient: export, form of the notebooks, derivations, rules of the house
	$(PAGES) --file_re '^(0[036]|1[0-7]|2[01])_'
	$(TESTS) $(addprefix tests/test_,$(addsuffix .py,structure book maths moments contract trl))

docs: .venv/dev ## the site, needs quarto
	.venv/bin/nbdev_docs
	.venv/bin/python scripts/readme.py

bench: .venv/run ## speed, side by side
	.venv/bin/papermill nbs/run_bench.ipynb runs/bench.ipynb -k python3 </dev/null
	@echo "Done. Look at runs/bench.ipynb."

ONLY ?= claims
SEEDS ?= 0:5
SIZE ?= reduced
MINUTES ?= 60

claims: .venv/run ## the ledger: run what is missing of its miniatures, two at a time, and print it
	.venv/bin/python -W ignore -m arpo_nb.training.claims --only "$(ONLY)" --seeds "$(SEEDS)" --size "$(SIZE)" --minutes "$(MINUTES)" --workers 2
	.venv/bin/python scripts/tables.py && .venv/bin/python scripts/readme.py
	@echo "Done. The results are in results/$(SIZE)/; the pages and the README show them, and nbs/62_claims.ipynb judges them."

rehearse: .venv/run ## every model and method at full size, on tensors without content; goes on where it stopped
	.venv/bin/python -W ignore scripts/rehearse.py --minutes "$(MINUTES)" --workers 2
	@echo "Done. The table is in results/rehearsal.json."

toy: .venv/run ## make the embedded toy again from the full Fashion-MNIST in DATA
	.venv/bin/papermill nbs/run_pretrain.ipynb runs/pretrain.ipynb -k python3 -p data "$(DATA)" -p out_dir runs/toy_base \
	    -p a_epochs 2 -p b_epochs 3 -p vq_epochs 1 -p policy_epochs 5 </dev/null
	@echo "Done. Copy runs/toy_base/*.safetensors and *.npz to arpo_nb/assets/ to make it the toy."

clean: ## remove what the commands above made
	rm -rf .venv build runs/* _docs _proc *.egg-info
