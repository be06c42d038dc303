.PHONY: run demo test bench build clean

run:
	go run .

demo:
	go test -run '^TestDemo$$' -count=1 -timeout=0 -v . -args -demo

test:
	go vet ./...
	go test -race ./...

build:
	CGO_ENABLED=0 go build -trimpath -o aoai-proxy .

clean:
	rm -rf aoai-proxy dist
