# kmorph. `make demo` shows it, `make test` checks it; the rest is for development.

CARGO ?= cargo
BACKEND ?= embedded
# What carries vsock to kernels in QEMU: virtio or kerf.
TRANSPORT ?= virtio
# How long `make fuzz` runs each target.
SECONDS ?= 10

# Where libkerf's Python package is built; it is no part of the workspace.
PYTHON_BUILD = $(or $(CARGO_TARGET_DIR),target)/python/build

DEMO_PACKAGES = -p kmorphd -p kmorphctl -p kmp-transport -p kmorph-agent -p kmorph-workload -p kmorph-tests -p kmorph-emulated-kernel -p kmorph-demo
# Not through `cargo run`: for one package alone it would choose other features and build it all again.
DEMO = $(or $(CARGO_TARGET_DIR),target)/release/kmorph-demo

# Who runs this; tests say who else.
USER_ID = $(shell id -u)

.PHONY: build check sanitize test test-api test-kills test-runs test-flips test-crash test-drgn test-tasks demo demo-build demo-embedded demo-qemu demo-multikernel bench lint doc fuzz setup clean kmod kmod-test kmod-style kmod-test-24 kmod-debug-kernel test-vsock new-kernel wheel deb

build:
	$(CARGO) build --release --workspace

# Everything, on a machine where nothing was installed by hand. What fails keeps nothing else from running; the end
# says what it was.
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

# The tests of the code that handles memory itself, under AddressSanitizer and ThreadSanitizer. Builds into target/sanitize.
sanitize:
	scripts/sanitize

# Schemathesis asks the control API what its description allows, and what it does not. It comes from PyPI, into target/api.
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

# Runs the real actors over a simulated machine, once for each of SEEDS seeds, and says what the runs came by. What they
# run is optimised in the dev profile too (Cargo.toml).
SEEDS ?= 10000
test-runs:
	KMORPH_RUN_SEEDS=$(SEEDS) $(CARGO) test --package kmorph-actors --test runs whatever -- --nocapture

# Changes FLIPS bits, one at a time, of each file that makedumpfile and QEMU write.
FLIPS ?= 200
test-flips: setup
	$(CARGO) build --package kmorph-tests
	KMORPH_TEST_FLIPS=$(FLIPS) $(CARGO) test --package kmorph-tests --test vmcores_of_others

# Has drgn read what is written from real kernels' memory. drgn comes from PyPI, into target/drgn.
test-drgn: setup
	$(CARGO) build --package kmorph-tests --package kmorphctl
	test -x target/drgn/bin/drgn || { python3 -m venv target/drgn && target/drgn/bin/pip install --quiet drgn; }
	KMORPH_DRGN_PYTHON=$(CURDIR)/target/drgn/bin/python $(CARGO) test --package kmorph-tests --test vmcore drgn -- --ignored

# Has drgn tell tasks and stacks, for `kmorphctl vmcore analyze --vmlinux`. The same download as for test-crash.
test-tasks: setup
	scripts/fetch-debug-symbols
	$(CARGO) build --package kmorph-tests --package kmorphctl
	test -x target/drgn/bin/drgn || { python3 -m venv target/drgn && target/drgn/bin/pip install --quiet drgn; }
	PATH=$(CURDIR)/target/drgn/bin:$$PATH $(CARGO) test --package kmorph-tests --test vmcore tasks -- --ignored

# Has crash read what is written from real kernels' memory, with Debian's debug symbols: a download of 600 MB.
test-crash: setup
	scripts/fetch-debug-symbols
	command -v crash >/dev/null || apt-get install --yes --quiet --no-install-recommends crash
	$(CARGO) build --package kmorph-tests
	$(CARGO) test --package kmorph-tests --test vmcore crash -- --ignored --nocapture

# Tells and shows the story of the README. `make demo BACKEND=qemu` tells it with real kernels; those and
# the vsock device are fetched into the cache, QEMU must be installed (scripts/setup, as root). With
# TRANSPORT=kerf as well, over kerf-vsock.ko. `make demo BACKEND=multikernel` tells it beside an emulated
# multikernel kernel, as root.
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

# What the demo would refuse is refused before the build, whose minutes would be for nothing.
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

# All that tests do with a kernel, with the newest that SUITE of Debian has (or the newest of SERIES), and a table of what was
# found: some ten minutes, and 0.6 GB in the cache.
SUITE ?= sid
new-kernel: setup
	scripts/new-kernel $(SUITE) $(SERIES)

doc:
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --workspace --no-deps --document-private-items --quiet

clean:
	$(CARGO) clean
