# Both targets create .venv and install what they need; nothing else has to be there but Python and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

demo: .venv/run
	$(BIN)/ntk-awt run

# Nearly all of the time is compilation; without XLA's optimisations a quarter less of it in all.
# A worker that crashes ends the tests: with one in its place pytest-xdist may wait for ever.
test: lint
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 --durations=10

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf .venv

# neural-tangents asks for TensorFlow (1.9 GB), which nothing here uses: it is installed without its
# needs, and pyproject.toml lists those that it really has.
define REQUIREMENTS
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extra = project["optional-dependencies"]["dev"]
for name, needs in (("run", project["dependencies"]), ("dev", extra)):
    kept = [need for need in needs if not need.startswith("neural-tangents")]
    open(f".venv/{name}.txt", "w").write("\n".join(kept) + "\n")
pinned, = [need for need in project["dependencies"] if need.startswith("neural-tangents")]
open(".venv/bare.txt", "w").write(pinned + "\n")
endef
export REQUIREMENTS

.venv/run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "$$REQUIREMENTS"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .venv/run.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r .venv/bare.txt -e .
	touch $@

.venv/dev: .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .venv/dev.txt
	touch $@
