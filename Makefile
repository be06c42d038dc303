.PHONY: run demo test bench build release clean

PLATFORMS = linux/amd64 linux/arm64 darwin/amd64 darwin/arm64 windows/amd64 windows/arm64

# The program reads the environment alone. A .env beside this file goes into it, as a shell reads it.
run:
	@if [ -f .env ]; then set -a; . ./.env; set +a; fi; echo 'go run .' && go run .

# Ctrl-C is how the demo ends, and no error.
demo:
	@echo 'go run ./demo     (builds first, which takes up to half a minute once)'
	@trap 'exit 0' INT; go run ./demo

# The race detector needs a C compiler.
test:
	go vet ./...
	@if command -v $$(go env CC) >/dev/null; then \
		echo 'go test -race ./...' && CGO_ENABLED=1 go test -race ./...; \
	else \
		echo 'go test ./... (without -race, as there is no C compiler)' && go test ./...; \
	fi

bench:
	go run ./bench

build:
	CGO_ENABLED=0 go build -trimpath -o aoai-proxy .

# The same commit gives the same bytes in any folder and on any machine: all else that they depend on
# is set here, and Go fetches the toolchain named if it is another. A clone without tags differs.
release: export GOTOOLCHAIN = go1.27.4
release: export GOFLAGS = -trimpath -buildvcs=true
release: export CGO_ENABLED = 0
release: export GOAMD64 = v1
release: export GOARM64 = v8.0
release: export GOFIPS140 = off
release:
	@test -z "$$(git status --porcelain)" || { echo 'a release is of a commit: commit first' >&2; exit 1; }
	rm -rf dist
	for p in $(PLATFORMS); do \
		GOOS=$${p%/*} GOARCH=$${p#*/} && export GOOS GOARCH && \
		go build -ldflags='-s -w' -o dist/aoai-proxy-$$GOOS-$$GOARCH$$(go env GOEXE) . || exit; \
	done
	cd dist && sha256sum aoai-proxy-* >SHA256SUMS

clean:
	rm -rf aoai-proxy dist
