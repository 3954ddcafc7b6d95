# certctl-agent. `make help` lists the targets; CI uses the same ones.

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
COMMIT   ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null)
PKG      := certctl-agent
BIN      ?= bin/certctl-agent
DIST     ?= dist
# For deb and docker: the platform is linux/$(ARCH).
ARCH     ?= $(shell $(GO) env GOARCH)
PLATFORMS ?= linux/amd64 linux/arm64 darwin/amd64 darwin/arm64
# Files in packages and images have the commit's time, not the clock's.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
LDFLAGS  := -s -w -buildid= -X $(PKG)/internal/buildinfo.version=$(VERSION) -X $(PKG)/internal/buildinfo.commit=$(COMMIT)
# The same bytes in any folder: no paths, no build id, no VCS stamp.
BUILD    := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)'
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# Debian has no package of Kubernetes' API server: CI builds it once per version.
KUBE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/certctl-agent/kube-apiserver-$(shell awk '$$1 == "k8s.io/kubernetes" { print $$2 }' .ci/kube-apiserver/go.mod)
export PATH := $(PATH):$(KUBE)

# RACE=-race runs all tests with the race detector, as CI does. The default is only the packages
# whose goroutines share most. The race detector needs a C compiler.
RACE ?=
RACED := agent app controlplane keystore ledger namelock transaction
CC_FOUND := $(shell command -v gcc || command -v clang)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' Makefile

.PHONY: build
build: ## build bin/certctl-agent: static, stripped, reproducible
	@mkdir -p $(dir $(BIN))
	$(BUILD) -o $(BIN) ./cmd/certctl-agent

.PHONY: demo
demo: build ## run the agent through its main job on this machine (TARGET=nginx|apache|haproxy|caddy|postfix|dovecot|javakeystore|kubernetes|ssh)
	$(GO) run ./cmd/certctl-demo -agent bin/certctl-agent $(if $(TARGET),-target $(TARGET))

.PHONY: plane
plane: ## run the demo's control plane on 127.0.0.1:8443 (TYPE=NGINX CONFIG=target.json: with a certificate for each new agent)
	$(GO) run ./cmd/certctl-demo -serve 127.0.0.1:8443 $(if $(TYPE),-type $(TYPE) -config $(CONFIG))

.PHONY: kube-apiserver
kube-apiserver: $(KUBE)/kube-apiserver ## build the API server for the tests of KubernetesSecrets (some minutes, 1 GB of modules)

# 1,800 packages, and tests do not need a fast binary: without inlining and debug information, and
# with a lazy garbage collector in the compiler, the build takes a third of the time.
$(KUBE)/kube-apiserver:
	@mkdir -p $(KUBE)
	cd .ci/kube-apiserver && GOGC=400 CGO_ENABLED=0 $(GO) build -trimpath -gcflags=all='-l -dwarf=false' -ldflags '-s -w' -o $@.new .
	mv $@.new $@

.PHONY: test
test: ## run all tests, and those of some packages with the race detector (RACE=-race: all)
	$(GO) test $(RACE) -timeout 18m ./...
ifneq ($(RACE),)
	$(GO) test ./internal/reliability -run TestVirtualNetwork -runs 1000
else ifneq ($(CC_FOUND),)
	$(GO) test -race -vet=off -timeout 18m $(RACED:%=./internal/%)
	$(GO) test -race -vet=off -timeout 18m ./internal/reliability -run TestVirtualNetwork -runs 50
else
	@echo "no C compiler: nothing ran with the race detector"
endif

# Iterations, not seconds, so that a slow machine does the same work.
FUZZ ?= 2000x

.PHONY: fuzz
fuzz: ## run each fuzz target briefly (FUZZ=30s for longer)
	@grep -rHo '^func Fuzz[A-Za-z0-9]*' --include='*_test.go' internal cmd | sort | \
	while IFS=: read -r file name; do \
		$(GO) test -vet=off -run '^$$' -fuzz "^$${name#func }$$" -fuzztime $(FUZZ) -fuzzminimizetime 100x "./$$(dirname "$$file")" </dev/null || exit 1; \
	done

FOR ?= 60m

.PHONY: hunt
hunt: ## look for faults with fresh seeds: network, crashes, power cuts, fuzzing (FOR=60m)
	$(GO) test $(RACE) -count=1 -timeout 0 ./internal/reliability -run '^TestHunt$$' -hunt $(FOR) -v

.PHONY: soak
soak: ## run for 24 hours of virtual time: memory, goroutines, descriptors and disk must stay flat
	$(GO) test -timeout 10m -count=1 ./internal/reliability -run TestSoak -soak -v

N    ?= 20
SEED ?= 1

.PHONY: mutants
mutants: ## break the code in one place at a time and see whether a test notices (N=mutants per package, SEED=, PACKAGES=ledger,agent, ONLY=survivors)
	$(GO) run ./internal/testing/mutants -n $(N) -seed $(SEED) $(if $(PACKAGES),-packages $(PACKAGES)) $(if $(ONLY),-only '$(ONLY)')

.PHONY: lint
lint: ## run gofmt, vet, go fix, staticcheck and the architecture tests
	@out=$$(gofmt -l .); test -z "$$out" || { echo "gofmt would change: $$out"; exit 1; }
	$(GO) vet ./...
	GOOS=darwin $(GO) vet ./...
	@out=$$($(GO) fix -diff ./... 2>&1); test -z "$$out" || { echo "$$out"; exit 1; }
	$(GO) run $(STATICCHECK) ./...
	$(GO) test ./internal/architecture

.PHONY: bench
bench: build ## measure size, start, memory, renewals, fleet pacing, discovery (against rg and find; beside nginx)
	@printf 'size of the binary: %s bytes\n' "$$(wc -c < bin/certctl-agent)"
	$(GO) test -run '^$$' -bench 'FirstLogLine' -benchtime 50x ./cmd/certctl-agent
	$(GO) test -run '^$$' -bench 'IdleMemory' -benchtime 1x ./cmd/certctl-agent
	$(GO) test -run '^$$' -bench 'Renewals' -benchtime 1x -timeout 20m ./cmd/certctl-agent
	$(GO) test -count 1 -timeout 20m -run Fleet -v ./internal/budget -fleet 100000
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 60m ./internal/discovery

.PHONY: cover
cover: ## measure the test coverage of internal/
	$(GO) test -coverpkg=./internal/... -coverprofile=cover.out ./...
	@$(GO) tool cover -func=cover.out | tail -1

.PHONY: linux
linux:
	GOOS=linux GOARCH=$(ARCH) $(MAKE) -s build BIN=$(DIST)/linux-$(ARCH)/certctl-agent

.PHONY: deb
deb: linux ## build the Debian package in dist/ (ARCH=amd64|arm64)
	deploy/deb/build.sh $(DIST)/linux-$(ARCH)/certctl-agent $(ARCH) '$(VERSION)' $(DIST)

.PHONY: docker
docker: linux ## build the image certctl-agent:VERSION (BASE=image; an ARCH other than the engine's needs BuildKit)
	deploy/docker/context.sh $(DIST)/linux-$(ARCH)/certctl-agent $(ARCH) $(DIST)/docker
	docker build --platform linux/$(ARCH) --build-arg TARGETARCH=$(ARCH) --build-arg VERSION=$(VERSION) \
		$(if $(BASE),--build-arg BASE=$(BASE)) -t certctl-agent:$(VERSION) $(DIST)/docker

.PHONY: release
release: ## build tarballs, SBOMs and SHA256SUMS in dist/release; builds every binary twice and compares
	GO='$(GO)' deploy/release.sh '$(VERSION)' '$(COMMIT)' $(DIST)/release $(PLATFORMS)

.PHONY: clean
clean: ## remove everything that make built
	rm -rf bin dist cover.out
