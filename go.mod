module aoai-proxy

go 1.22
