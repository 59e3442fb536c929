# make demo    build everything into .venv and run a fork-join on the default model
# make test    the same, with the test dependencies; then lint and the whole test suite
# make lint    ruff, clang-format, mypy, import-linter, codespell; and whether generated pages are what they should be
# make fix     what ruff, clang-format and cog can put right by themselves
# make docs    write docs/cli.md again, and build the site into build/site with all links checked
# make exact   the comparison with the oracle alone; writes docs/exactness.md and docs/exactness.csv
# make mutants breaks the implementation on purpose, line by line, and sees whether the tests notice
# make asan    the kernels' check program under AddressSanitizer and UndefinedBehaviorSanitizer
# make arm     the same program for 64-bit ARM, under an emulator (g++-aarch64-linux-gnu and qemu-user)
# make old-cpu the same program for x86-64 of any age, under an emulator: with AVX2, and without (qemu-user)
# make soak    a thousand forks, joins and generations in one process: memory must stay where it is
# make bench   time to first token, cache against text, and what bounds it (pyps bench)
# make bench-slots   what it saves to join branches from a file
# make bench-server  the whole job against llama.cpp's own server, which it builds first (four minutes on two cores)
# make bench-compare REF=COMMIT   the same of an earlier commit and of this one, in turn
# make adapter trains the adapter that comes with pyps (models/): three hours on two cores, resumable
# make clean   remove .venv and build
#
# The first build compiles llama-cpp-python (three to ten minutes); its wheel is kept in WHEELS for the next clone.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# the pinned version, from the one place that names it
LLAMA := $(shell sed -n '/^dependencies/,/^]/s/^  "llama-cpp-python==\([0-9.]*\)",$$/\1/p' pyproject.toml)

# GCC 12 drops half of the configuration that llama.cpp loads into the AMX tile unit (its _tile_loadconfig is said to
# read 8 of the 64 bytes), and on a CPU with AMX the first prefill dies of SIGILL. Leave AMX out wherever the compiler
# knows it; the other kernels are used instead.
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
AMX    := $(shell echo | $(CC) $(NO_AMX) -E - >/dev/null 2>&1 && echo "$(NO_AMX)")

# for a GPU: make demo CMAKE_ARGS=-DGGML_CUDA=on
CMAKE_ARGS ?=
BUILD := CFLAGS="$(CFLAGS) $(AMX)" CXXFLAGS="$(CXXFLAGS) $(AMX)" CMAKE_ARGS="-DLLAVA_BUILD=OFF $(CMAKE_ARGS)"

# One folder for each way of building it: pip's own cache of built wheels does not know the flags of a wheel, and
# llama.cpp compiles for the very CPU it is built on.
KEY    := $(shell (grep -m1 ^flags /proc/cpuinfo; uname -sm; $(CC) --version; echo '$(BUILD)') 2>/dev/null | cksum | cut -d' ' -f1)
WHEELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/pyps/wheels/$(LLAMA)-$(KEY)

# of the extensions
SOURCES := $(wildcard native/*.cpp native/*.h native/*/*.cpp native/*/*.h)

PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS="$(WHEELS) $(PIP_FIND_LINKS)" $(BIN)/python -m pip

.PHONY: demo test lint fix docs exact mutants asan arm old-cpu soak bench bench-slots bench-server bench-compare adapter clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/pyps run "How can I sleep better?" --branch "Talk about food and drink." \
	  --branch "Talk about light and screens." --branch "Talk about exercise." --compare --temperature 0.3 --seed 1

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell $$(git ls-files)
	$(BIN)/cog --check -I tools docs/cli.md

fix: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)
	$(BIN)/cog -r -I tools docs/cli.md

docs: $(VENV)/installed-test
	$(BIN)/cog -r -I tools docs/cli.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

exact: $(VENV)/installed-test
	$(BIN)/python -m pytest tests/test_oracle.py -m "exact or not exact" --write-exactness

mutants: $(VENV)/installed-test
	PIP_FIND_LINKS="$(WHEELS) $(PIP_FIND_LINKS)" $(BIN)/python tests/support/mutants.py

# the headers that CMakeLists.txt has fetched, and the libraries that llama_cpp loads
HEADERS   = $(firstword $(wildcard build/*/llama_cpp_python-$(LLAMA)/vendor/llama.cpp))
LIBRARIES = $(firstword $(wildcard $(VENV)/lib/python*/site-packages/llama_cpp/lib))

asan: $(VENV)/installed | tool-cmake
	cmake -S native/check -B build/asan -DCMAKE_BUILD_TYPE=Debug -DLLAMA_CPP_DIR="$(abspath $(HEADERS))" \
	  -DLLAMA_CPP_LIB="$(abspath $(LIBRARIES))" \
	  -DCMAKE_CXX_FLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
	cmake --build build/asan --parallel 2
	build/asan/check

# for another CPU than this one, ggml is compiled as well
GGML  := build/llama.cpp-$(LLAMA)
CHECK := -S native/check -DCMAKE_BUILD_TYPE=Release -DLLAMA_CPP_DIR="$(abspath $(GGML))"

arm: | tool-cmake tool-aarch64-linux-gnu-g++ tool-qemu-aarch64 $(GGML)
	cmake $(CHECK) -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	cmake --build build/arm --parallel 2
	qemu-aarch64 build/arm/check none

old-cpu: | tool-cmake tool-qemu-x86_64 $(GGML)
	cmake $(CHECK) -B build/old-cpu
	cmake --build build/old-cpu --parallel 2
	qemu-x86_64 -cpu Nehalem build/old-cpu/check none
	qemu-x86_64 -cpu Haswell build/old-cpu/check avx2

$(GGML): | $(VENV)/pip
	rm -rf build/sdist
	$(PIP) download --quiet --no-deps --no-binary llama-cpp-python --dest build/sdist llama-cpp-python==$(LLAMA)
	tar -xzf build/sdist/*.tar.gz -C build/sdist
	mv build/sdist/llama_cpp_python-$(LLAMA)/vendor/llama.cpp $@
	rm -rf build/sdist

tool-%:
	@command -v $* >/dev/null || { echo "$* is missing: Debian has cmake, g++-aarch64-linux-gnu and qemu-user"; exit 2; }

soak: $(VENV)/installed-test
	$(BIN)/python benchmarks/soak.py

bench: $(VENV)/installed-test
	mkdir -p build
	$(BIN)/pyps bench --plot build/bench.png

bench-slots: $(VENV)/installed-test
	$(BIN)/python benchmarks/slots.py

SERVER := build/server-$(LLAMA)

bench-server: $(VENV)/installed-test | $(SERVER)/bin/llama-server
	$(BIN)/python benchmarks/server.py $(SERVER)/bin/llama-server

# compiled as the wheel is; without its web pages, which it would fetch, and without TLS
$(SERVER)/bin/llama-server: | tool-cmake $(GGML)
	$(BUILD) cmake -S $(GGML) -B $(SERVER) -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_TESTS=OFF \
	  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
	  -DLLAMA_OPENSSL=OFF $(CMAKE_ARGS)
	cmake --build $(SERVER) --target llama-server --parallel $$(getconf _NPROCESSORS_ONLN)

bench-compare: $(VENV)/installed-test
	@test -n "$(REF)" || { echo "say what to compare with: make bench-compare REF=COMMIT"; exit 2; }
	rm -rf build/compare
	git clone --quiet . build/compare
	git -C build/compare checkout --quiet $(REF)
	$(MAKE) -C build/compare VENV=.venv .venv/installed
	$(BIN)/python benchmarks/compare.py build/compare/.venv/bin/pyps $(BIN)/pyps --tokens 256

# held-out entities and phrasings stay out of the examples; the suite of `pyps eval` has others of those
adapter: $(VENV)/installed-test
	mkdir -p build/adapter
	cp models/smollm2-135m-instruct-1.yaml models/smollm2-135m-instruct-2.yaml build/adapter
	$(BIN)/pyps data families build/adapter/examples-1 --train 6000 --held-out 104
	$(BIN)/pyps train build/adapter/smollm2-135m-instruct-1.yaml
	$(BIN)/pyps data families build/adapter/examples-2 --train 2400 --held-out 104 --targets 1 --seed 1
	$(BIN)/pyps train build/adapter/smollm2-135m-instruct-2.yaml
	cp build/adapter/second/adapter.gguf models/smollm2-135m-instruct.gguf
	cp build/adapter/first/report.png models/training-1.png
	cp build/adapter/second/report.png models/training-2.png

clean:
	rm -rf $(VENV) build

$(VENV)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	touch $@

$(WHEELS)/built: | $(VENV)/pip
	@echo "Building llama-cpp-python $(LLAMA): three to ten minutes, once for this machine"
	mkdir -p $(WHEELS)
	$(BUILD) $(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --no-cache-dir \
	  --no-binary llama-cpp-python --wheel-dir $(WHEELS)/new llama-cpp-python==$(LLAMA)
	mv $(WHEELS)/new/*.whl $(WHEELS)/
	rmdir $(WHEELS)/new
	touch $@

$(VENV)/installed: pyproject.toml CMakeLists.txt native/kernels/kernels.cmake $(filter-out native/check/%,$(SOURCES)) \
  | $(WHEELS)/built
	$(PIP) install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install --quiet --editable ".[test,train,data]"
	touch $@
