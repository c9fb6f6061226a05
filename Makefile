# make demo    all set-up, demo images, one build, and proof that its boot.iso boots
# make test    all set-up, lint, and every test for which a slow machine has the time:
#              GUEST_MINUTES=N, KOJI_MINUTES=N
# make test-koji  those of Koji, on a real one too: KOJI_TEST_ROOT names an unpacked one, or it is
#              installed; make test has a stand-in for it
# make check   the checks that need no VM: lint and the unit tests
# make lint    ruff and mypy
# make fuzz    many random inputs for all that reads what others wrote: SEED=N, EXAMPLES=N
# make soak    many builds with random faults, and what is left: BUILDS=N, JOBS=N, SEED=N
# make clean   remove everything that make has made here

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
IMAGES := .cache/images
DEMO := demo
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

# What a builder needs; then what the example images and their proof need; then what tests need.
BUILDER_PACKAGES := python3 python3-venv python3-libvirt python3-guestfs \
	libvirt-daemon libvirt-daemon-driver-qemu libvirt-daemon-system \
	qemu-system-x86 qemu-utils e2fsprogs xfsprogs libguestfs-xfs linux-image-cloud-amd64
EXAMPLE_PACKAGES := mmdebstrap debian-archive-keyring ca-certificates fdisk uuid-runtime \
	grub-common grub-pc-bin mtools dosfstools busybox-static kmod cpio ovmf
# qemu-system-arm: a guest of another arch is booted, too.
# dnsmasq-base: the networks of libvirt.
# dnf to createrepo-c: what an RPM guest installs packages with, and packages for it.
# python3-gssapi: the koji library from PyPI wants one, which cannot be compiled everywhere.
TEST_PACKAGES := qemu-system-arm qemu-efi-aarch64 strace xz-utils gzip zstd git xorriso procps \
	dpkg-dev dnsmasq-base dnf zypper rpm createrepo-c python3-gssapi
# What the hub, its database and kojid import and run; Koji itself is brought along.
KOJI_PACKAGES := postgresql python3-psycopg2 python3-gssapi python3-rpm python3-dnf \
	python3-libcomps python3-librepo python3-cheetah util-linux mount
PACKAGES := $(BUILDER_PACKAGES) $(EXAMPLE_PACKAGES) $(TEST_PACKAGES)

# Python that ruff does not find by its name.
SCRIPTS := examples/boot-iso

# What tests/guest/images/make-image makes: utility images, each special in one thing.
SPECIAL_IMAGES := sysvinit openrc uefi sata ide aarch64

RECIPES := $(wildcard examples/debian-utility/*)

# Of `make test`, which takes 46 minutes in all on a usual machine, and must not take 90 in CI. Where
# one of these is over, the tests that are left are skipped, and say so.
GUEST_MINUTES ?= 34
KOJI_MINUTES ?= 18

# Of `make soak` and `make fuzz`.
BUILDS ?= 100
JOBS ?= 1,4
SEED := $(or $(SEED),$(shell date +%s))
EXAMPLES ?= 5000

.PHONY: demo test test-koji fuzz soak check lint setup packages images clean

demo: setup $(IMAGES)/utility.qcow2 $(IMAGES)/input.qcow2
	PATH="$(abspath $(BIN)):$$PATH" examples/demo $(IMAGES) $(DEMO)

test: lint
	$(MAKE) --jobs=2 images
	$(BIN)/pytest tests/unit -n 2
	$(BIN)/pytest tests/guest -n 2 --minutes $(GUEST_MINUTES)
	$(BIN)/pytest tests/koji -m 'not real_koji' -n 2 --dist loadfile --minutes $(KOJI_MINUTES)
	$(BIN)/python -m tests.soak --builds 6 --jobs 2

test-koji: PACKAGES += $(KOJI_PACKAGES)
test-koji: setup $(VENV)/koji-ready images
	$(BIN)/pytest tests/koji

fuzz: setup
	@echo "seed $(SEED)"
	KOJI_INDIRECTION_FUZZ_EXAMPLES=$(EXAMPLES) \
		$(BIN)/pytest tests/unit/test_fuzz.py --hypothesis-seed=$(SEED)

soak: setup $(IMAGES)/tiny.qcow2
	$(BIN)/python -m tests.soak --builds $(BUILDS) --jobs $(JOBS) --seed $(SEED)

check: lint
	$(BIN)/pytest tests/unit -n 2

lint: setup
	$(BIN)/ruff check . $(SCRIPTS)
	$(BIN)/ruff format --check . $(SCRIPTS)
	$(BIN)/mypy

images: setup $(addprefix $(IMAGES)/,$(addsuffix .qcow2,utility input tiny bare $(SPECIAL_IMAGES)))

setup: packages $(VENV)/ready

packages:
	@if ! dpkg-query --show --showformat='$${db:Status-Status}\n' $(PACKAGES) 2>&1 \
			| awk '$$0 != "installed" { missing = 1 } END { exit missing }'; then \
		$(SUDO) apt-get update && \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive \
			apt-get install --yes --no-install-recommends $(PACKAGES); \
	fi

# The distribution's guestfs and libvirt bindings are seen through --system-site-packages.
$(VENV)/ready: setup.py pyproject.toml
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/pip install --quiet --editable '.[zstd,test]'
	touch $@

$(VENV)/koji-ready: $(VENV)/ready | packages
	$(BIN)/pip install --quiet --editable '.[koji-test]'
	touch $@

$(IMAGES)/utility.qcow2: examples/debian-utility/make-image $(RECIPES) | packages
	mkdir -p $(IMAGES)
	examples/debian-utility/make-image $@

$(IMAGES)/bare.qcow2: examples/debian-utility/make-image $(RECIPES) | packages
	mkdir -p $(IMAGES)
	examples/debian-utility/make-image --bare $@

$(IMAGES)/input.qcow2: $(wildcard examples/debian-input/*) $(RECIPES) | packages
	mkdir -p $(IMAGES)
	examples/debian-input/make-image $@

$(IMAGES)/tiny.qcow2: $(wildcard examples/tiny-guest/*) $(RECIPES) | packages
	mkdir -p $(IMAGES)
	examples/tiny-guest/make-image $@

$(SPECIAL_IMAGES:%=$(IMAGES)/%.qcow2): $(IMAGES)/%.qcow2: tests/guest/images/make-image \
		$(wildcard examples/tiny-guest/*) $(RECIPES) | packages
	mkdir -p $(IMAGES)
	$< $* $@

clean:
	rm -rf $(VENV) .cache $(DEMO) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
