# kmorph. `make demo` shows it, `make test` checks it; the rest is for development.

CARGO ?= cargo
BACKEND ?= embedded

.PHONY: build test demo bench lint doc fuzz setup clean

build:
	$(CARGO) build --release --workspace

# Everything, on a machine where nothing was installed by hand.
test: setup lint doc
	$(CARGO) build --workspace --all-targets
	$(CARGO) test --workspace --quiet

setup:
	scripts/setup-tests

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --workspace --no-deps --document-private-items --quiet

clean:
	$(CARGO) clean
