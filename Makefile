# make demo    run the main job on a drawn clip with the tiny model; results in demo-output/
# make test    lint, types and all tests, in WORKERS processes (2)
# make host    only the tests that boot a real ComfyUI
#
# A real ComfyUI is looked for at $COMFYUI_PATH, else ~/comfy/ComfyUI; ENGINE=pypi goes without.
PYTHON ?= python3
ENGINE ?= auto
WORKERS ?= 2

.PHONY: demo test lint host env clean

demo: env
	.venv/bin/python demo --engine $(ENGINE)

test: lint
	.venv/bin/pytest --engine $(ENGINE) -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: env
	.venv/bin/ruff check .
	.venv/bin/mypy

host: env
	.venv/bin/pytest -m host

env:
	@$(PYTHON) tools/setup_env.py --engine $(ENGINE)

clean:
	rm -rf .venv demo-output demo-training ablation-output recipes-output study-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
