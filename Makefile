# kmorph. `make demo` shows it, `make test` checks it; the rest is for development.

CARGO ?= cargo
BACKEND ?= embedded
# The vsock transport to kernels in QEMU: virtio or kerf.
TRANSPORT ?= virtio
# How long `make fuzz` runs each target.
SECONDS ?= 10

# Build directory of libkerf's Python package, which is not part of the workspace.
PYTHON_BUILD = $(or $(CARGO_TARGET_DIR),target)/python/build

DEMO_PACKAGES = -p kmorphd -p kmorphctl -p kmp-transport -p kmorph-agent -p kmorph-workload -p kmorph-tests -p kmorph-emulated-kernel -p kmorph-demo
# Not through `cargo run`: for a single package cargo would choose other features and rebuild everything.
DEMO = $(or $(CARGO_TARGET_DIR),target)/release/kmorph-demo

# The user that runs make; tests override it.
USER_ID = $(shell id -u)

.PHONY: build check sanitize test test-api test-kills test-runs model test-flips test-crash test-drgn test-tasks test-failures demo demo-build demo-embedded demo-qemu demo-multikernel bench lint doc fuzz setup clean kmod kmod-test kmod-style kmod-test-24 kmod-debug-kernel test-vsock new-kernel wheel deb

build:
	$(CARGO) build --release --workspace

# Runs all tests, on a freshly installed machine. A failed step does not stop the others; the summary lists the failed
# steps.
test:
	scripts/setup
	+CARGO="$(CARGO)" MAKE="$(MAKE)" scripts/test

# Crates whose integration tests need neither root nor QEMU, and are quick.
CHECKED_CRATES = kmp-proto kmp-transport kmorph-kerf-ring kmorph-files kmorph-launch kmorph-workload kmorphctl

# What a change must pass before it is sent: format, clippy, documentation, unit tests, the integration tests of
# CHECKED_CRATES, a tenth of `make test-runs`, licences and versions of dependencies. Needs no root, no QEMU and no network once
# the crates are fetched. `make test` does all of this too.
check: lint doc
	KMORPH_RUN_SEEDS=1000 $(CARGO) test --quiet --workspace --lib --bins --test runs
	$(CARGO) test --quiet $(addprefix --package=,$(CHECKED_CRATES)) --test '*'
	scripts/check-dependencies

# The tests of the crates that manage memory, under AddressSanitizer and ThreadSanitizer. Builds into target/sanitize.
sanitize:
	scripts/sanitize

# Schemathesis sends the control API valid and invalid requests. It is installed from PyPI into target/api.
test-api:
	$(CARGO) build --package kmorphd --package kmorph-agent --package kmorph-workload
	scripts/test-api

# libkerf for Python: target/python/wheels/libkerf-*.whl.
wheel:
	scripts/build-python

# The Debian package: target/deb/kmorph-runtime_*.deb. Needs dpkg-dev and binutils.
deb: demo-build
	scripts/build-deb

# Kills daemon, source and target, alone and in pairs, at MOMENTS moments spread over morphs and recoveries.
MOMENTS ?= 1000
test-kills: setup
	$(CARGO) build --workspace --all-targets
	KMORPH_KILL_MOMENTS=$(MOMENTS) $(CARGO) test --package kmorph-tests --test kill_moments

# Runs the real actors over a simulated machine, once for each of SEEDS seeds, and prints the coverage of the runs. The
# dev profile optimises this code too (Cargo.toml).
SEEDS ?= 10000
test-runs:
	KMORPH_RUN_SEEDS=$(SEEDS) $(CARGO) test --package kmorph-actors --test runs whatever -- --nocapture

# Explores every interleaving of a morph, its recovery and FAULTS faults with the real engines, and of two morphs with one
# fault fewer (docs/reliability.md). Each further fault takes about fifteen times as long.
FAULTS ?= 3
model:
	KMP_MODEL_FAULTS=$(FAULTS) $(CARGO) test --package kmp-proto --test model as_far -- --ignored --nocapture
	KMP_MODEL_FAULTS=$$(($(FAULTS) - 1)) KMP_MODEL_MORPHS=2 $(CARGO) test --package kmp-proto --test model as_far -- --ignored --nocapture

# Changes FLIPS bits, one at a time, of each file that makedumpfile and QEMU write.
FLIPS ?= 200
test-flips: setup
	$(CARGO) build --package kmorph-tests
	KMORPH_TEST_FLIPS=$(FLIPS) $(CARGO) test --package kmorph-tests --test vmcores_of_others

# drgn reads vmcores of real kernels. It is installed from PyPI into target/drgn.
test-drgn: setup
	$(CARGO) build --package kmorph-tests --package kmorphctl
	test -x target/drgn/bin/drgn || { python3 -m venv target/drgn && target/drgn/bin/pip install --quiet drgn; }
	KMORPH_DRGN_PYTHON=$(CURDIR)/target/drgn/bin/python $(CARGO) test --package kmorph-tests --test vmcore drgn -- --ignored

# drgn prints tasks and stacks, for `kmorphctl vmcore analyze --vmlinux`. The same download as for test-crash.
test-tasks: setup
	scripts/fetch-debug-symbols
	$(CARGO) build --package kmorph-tests --package kmorphctl
	test -x target/drgn/bin/drgn || { python3 -m venv target/drgn && target/drgn/bin/pip install --quiet drgn; }
	PATH=$(CURDIR)/target/drgn/bin:$$PATH $(CARGO) test --package kmorph-tests --test vmcore tasks -- --ignored

# crash reads vmcores of real kernels, with Debian's debug symbols: a download of 600 MB.
test-crash: setup
	scripts/fetch-debug-symbols
	command -v crash >/dev/null || apt-get install --yes --quiet --no-install-recommends crash
	$(CARGO) build --package kmorph-tests
	$(CARGO) test --package kmorph-tests --test vmcore crash -- --ignored --nocapture

# Makes kernels fail in many ways, compares what analyze, drgn and crash report, and writes the table in docs/vmcore.md.
# KMORPH_TEST_FAILURES=NULL runs only the kinds whose name contains NULL, and writes no table. Downloads the same symbols as
# test-crash.
test-failures: setup
	scripts/fetch-debug-symbols
	command -v crash >/dev/null || apt-get install --yes --quiet --no-install-recommends crash
	$(CARGO) build --package kmorph-tests --package kmorphctl
	test -x target/drgn/bin/drgn || { python3 -m venv target/drgn && target/drgn/bin/pip install --quiet drgn; }
	KMORPH_DRGN_PYTHON=$(CURDIR)/target/drgn/bin/python $(CARGO) test --package kmorph-tests --test failures -- --ignored --nocapture

# Runs the demo of the README. `make demo BACKEND=qemu` uses real kernels: it fetches the kernels and the vsock
# device into the cache, and needs QEMU (scripts/setup, as root). With TRANSPORT=kerf as well, the demo uses
# kerf-vsock.ko. `make demo BACKEND=multikernel`, as root, uses an emulated multikernel kernel.
demo: demo-$(BACKEND)

demo-embedded: demo-build
	@$(DEMO) --backend=embedded

demo-qemu: demo-build
	@scripts/setup --check || { echo "install it with: sudo scripts/setup" >&2; exit 1; }
	@echo "Fetching Debian's kernels 6.1, 6.12 and 7.3 and vhost-device-vsock, unless they are there"
	@scripts/fetch-kernels >/dev/null
	@scripts/fetch-vhost-vsock >/dev/null
	@[ $(TRANSPORT) != kerf ] || scripts/build-kmod >/dev/null
	@$(DEMO) --backend=qemu --transport=$(TRANSPORT)

# Check the demo's requirements before the build, which takes minutes.
demo-multikernel:
	@[ $(USER_ID) = 0 ] || { \
	  echo "a multikernel kernel cannot be emulated here: its files are mounted, which takes root; as root, or after" >&2; \
	  echo "  make demo-build: sudo $(DEMO) --backend=multikernel" >&2; exit 9; }
	@[ -e /dev/fuse ] || { \
	  echo "a multikernel kernel cannot be emulated here: there is no /dev/fuse (modprobe fuse)" >&2; exit 9; }
	@$(MAKE) --no-print-directory demo-build
	@$(DEMO) --backend=multikernel

demo-build:
	@echo "Building kmorphd, kmorphctl, kmorph-agent, kmorph-kv and the demo (release; the first time takes minutes)"
	@$(CARGO) build --release --quiet $(DEMO_PACKAGES)

# In release, on a quiet machine. `make bench ONLY=morph` measures one group.
bench: build
	scripts/build-python >/dev/null
	target/release/kmorph-bench $(addprefix --only ,$(ONLY)) $(BENCH_ARGS)

setup:
	scripts/setup-tests

lint:
	$(CARGO) fmt --all --check
	cd fuzz && $(CARGO) fmt --check
	cd libkerf-python && $(CARGO) fmt --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	scripts/fuzz --lint
	$(CARGO) clippy --locked --quiet --manifest-path libkerf-python/Cargo.toml --target-dir $(PYTHON_BUILD) -- -D warnings

fuzz: setup
	scripts/fuzz $(SECONDS)

# The kernel module, for the kernels that tests boot; needs no running kernel's headers.
kmod:
	scripts/build-kmod

# The module's source against the kernel's own checkpatch.pl and coccinelle: a download of 150 MB, once. Needs the package
# coccinelle.
kmod-style:
	scripts/check-kmod

# The module in guests of both kernels, as in `make test`: some minutes.
kmod-test: setup
	scripts/test-kmod --skip twenty_four

kmod-test-24: setup
	scripts/test-kmod twenty_four

# The module among hostile peers in a kernel with lockdep and KASAN, which is built first: half an hour, and 2 GB in the
# cache. Needs the packages flex, bison, bc and libelf-dev.
kmod-debug-kernel: setup
	scripts/test-kmod-debug

# The kernel's own vsock_test over the module, between all pairs of kernels; writes the table in docs/kerf-vsock.md. A download of
# 450 MB, once, and some minutes.
test-vsock: setup
	scripts/test-vsock

# Runs all tests that use a kernel on the newest kernel of Debian's SUITE (or the newest of SERIES), and prints a table of
# results: about ten minutes, and 0.6 GB in the cache.
SUITE ?= sid
new-kernel: setup
	scripts/new-kernel $(SUITE) $(SERIES)

doc:
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --workspace --no-deps --document-private-items --quiet

clean:
	$(CARGO) clean
