# Other platforms and processors than this machine's. Each target says what it needs and cannot have;
# that is no failure.
.PHONY: ptx neon processors check-macos check-windows wheel-aarch64 test-aarch64

PTX ?= 90
ptx: $(VENV)/dev  ## the tests of the Triton kernels on what is compiled for a GPU, without one (PTX=80: for another)
	@TRUENORM_TESTS_PTX=$(PTX) $(PYTEST) tests/test_triton_*.py tests/test_rounding.py

# the kernels alone: no torch is needed for that, and none for aarch64 is at hand
DIGEST_FLAGS := -std=c++20 -O3 -DNDEBUG -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-psabi -Werror
DIGEST_SOURCES := $(wildcard csrc/kernels*.cpp) csrc/dispatch.cpp tools/kernel_digest.cpp
NEON_CXX ?= aarch64-linux-gnu-g++
NEON_RUN ?= qemu-aarch64

neon:  ## the kernels on an emulated aarch64: the bits of this machine (needs g++, its cross form, qemu-user)
	@mkdir -p build/neon
	@$(NEON_CXX) $(DIGEST_FLAGS) -Icsrc -static -DTRUENORM_ISA=neon -DTRUENORM_HAS_neon $(DIGEST_SOURCES) -o build/neon/neon
	@$(CXX) $(DIGEST_FLAGS) -Icsrc -DTRUENORM_ISA=baseline -DTRUENORM_HAS_baseline $(DIGEST_SOURCES) -o build/neon/here
	@build/neon/here | tee build/neon/here.txt
	@$(NEON_RUN) build/neon/neon | tee build/neon/neon.txt
	@test "$$(cut -d' ' -f1 build/neon/here.txt)" = "$$(cut -d' ' -f1 build/neon/neon.txt)"

# emulated x86-64 processors, and the instruction set that has to be chosen on each
PROCESSORS := Nehalem=baseline SandyBridge=baseline Haswell=avx2 EPYC=avx2 Haswell,-avx2=baseline \
	Haswell,-fma=baseline Haswell,-f16c=baseline Haswell,-xsave=baseline

processors: build/digest/kernel_digest  ## what is chosen on other x86-64 processors, with the same bits (needs qemu-user)
	@command -v qemu-x86_64 > /dev/null || { echo "not tried: there is no qemu-x86_64 (apt install qemu-user)"; exit 0; }; \
	here=$$($<) && echo "$$here (this machine)" && failed=0; \
	for each in $(PROCESSORS); do \
		seen=$$(qemu-x86_64 -cpu "$${each%=*}" $< 2> /dev/null); echo "$$seen ($${each%=*})"; \
		[ "$$seen" = "$${here%% *} $${each##*=}" ] || { echo "expected: $${here%% *} $${each##*=}"; failed=1; }; \
	done; exit $$failed

build/digest/kernel_digest: $(VENV)/tools $(CPP) CMakeLists.txt
	@$(BIN)/cmake -S . -B build/digest -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DCMAKE_BUILD_TYPE=Release \
		-DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DTRUENORM_REQUIRE_NATIVE=ON --log-level=WARNING
	@$(BIN)/cmake --build build/digest --target kernel_digest
	@touch $@

check-macos:  ## does csrc compile for macOS, and link to torch's library? (by zig, against torch's wheel)
check-windows:  ## the same for Windows; under wine the kernels' bits too
check-macos check-windows: $(VENV)/wheel
	@$(BIN)/python tools/cross.py $(@:check-%=%)

wheel-aarch64: $(VENV)/wheel  ## build dist/*aarch64.whl by g++'s cross form
	@$(BIN)/python tools/cross.py aarch64
	@! compgen -G 'build/cross/aarch64/wheel/*.whl' > /dev/null || \
		{ rm -f dist/*aarch64.whl; $(call REPAIR,aarch64,build/cross/aarch64/wheel/*.whl); ls dist/*aarch64.whl; }

# what to run: make test-aarch64 EMULATED="tests/test_layer.py"
EMULATED ?=

test-aarch64: $(VENV)/wheel  ## a part of the suite on an emulated aarch64, by the wheel in dist (qemu-user, debootstrap, 4 GB)
	@$(BIN)/python tools/emulate.py $(EMULATED)
