SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp')

.PHONY: build test lint format bench

build:
	pip install -e '.[test,lint]'

test:
	pytest

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
