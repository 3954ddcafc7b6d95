# certctl-agent. `make help` lists the targets; CI calls the same ones.

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
COMMIT   ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null)
PKG      := certctl-agent
LDFLAGS  := -s -w -buildid= -X $(PKG)/internal/buildinfo.version=$(VERSION) -X $(PKG)/internal/buildinfo.commit=$(COMMIT)
# Same bytes whatever the folder: no paths, no build id, no stamp of the clone.
BUILD    := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)'
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@2026.2.2

# The race detector needs a C compiler.
RACE := $(shell command -v gcc >/dev/null 2>&1 || command -v clang >/dev/null 2>&1 && echo -race)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: build
build: ## build bin/certctl-agent: static, stripped, reproducible
	@mkdir -p bin
	$(BUILD) -o bin/certctl-agent ./cmd/certctl-agent

.PHONY: demo
demo: build ## show the main job end to end (TARGET=nginx|apache|haproxy|caddy|postfix|dovecot)
	$(GO) run ./cmd/certctl-demo -agent bin/certctl-agent $(if $(TARGET),-target $(TARGET))

.PHONY: test
test: ## run all tests, with the race detector where there is a C compiler
	@$(if $(RACE),:,echo "no C compiler: running without the race detector")
	$(GO) test $(RACE) -timeout 18m ./...

.PHONY: lint
lint: ## gofmt, vet, go fix, staticcheck, the architecture test
	@out=$$(gofmt -l .); test -z "$$out" || { echo "gofmt would change: $$out"; exit 1; }
	$(GO) vet ./...
	GOOS=darwin $(GO) vet ./...
	@out=$$($(GO) fix -diff ./... 2>&1); test -z "$$out" || { echo "$$out"; exit 1; }
	$(GO) run $(STATICCHECK) ./...
	$(GO) test ./internal/architecture

.PHONY: cover
cover: ## test coverage of internal/
	$(GO) test -coverpkg=./internal/... -coverprofile=cover.out ./...
	@$(GO) tool cover -func=cover.out | tail -1

.PHONY: clean
clean: ## remove what make made
	rm -rf bin dist cover.out
