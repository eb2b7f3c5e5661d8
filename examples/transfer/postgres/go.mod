module example.com/keystate/examples/transfer/postgres

go 1.26

replace (
	example.com/keystate => ../../..
	example.com/keystate/internal/pgtest => ../../../internal/pgtest
	example.com/keystate/postgres => ../../../postgres
)

require (
	example.com/keystate v0.0.0-00010101000000-000000000000
	example.com/keystate/internal/pgtest v0.0.0-00010101000000-000000000000
	example.com/keystate/postgres v0.0.0-00010101000000-000000000000
	github.com/jackc/pgx/v5 v5.12.0
)

require (
	github.com/cenkalti/backoff/v5 v5.0.3 // indirect
	github.com/google/uuid v1.6.0 // indirect
	github.com/jackc/pgpassfile v1.0.0 // indirect
	github.com/jackc/pgservicefile v0.0.0-20240606120523-5a60cdf6a761 // indirect
	github.com/jackc/puddle/v2 v2.2.3 // indirect
	github.com/vmihailenco/msgpack/v5 v5.4.1 // indirect
	github.com/vmihailenco/tagparser/v2 v2.0.0 // indirect
	go.etcd.io/bbolt v1.5.0 // indirect
	golang.org/x/sync v0.22.0 // indirect
	golang.org/x/sys v0.45.0 // indirect
	golang.org/x/text v0.41.0 // indirect
)
