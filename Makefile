SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build test lint format bench

build:
	pip install -e '.[test,lint]'

test:
	pytest -n auto

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(SOURCES)
	mypy

format:
	clang-format -i $(SOURCES)
	ruff format .
	ruff check --fix .

bench:
	python -m bench.kernel
	python -m bench.checkpoint
