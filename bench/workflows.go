package main

import (
	"context"
	"database/sql"
	"errors"
	"path/filepath"
	"time"

	"github.com/cschleiden/go-workflows/backend"
	"github.com/cschleiden/go-workflows/backend/sqlite"
	"github.com/cschleiden/go-workflows/client"
	"github.com/cschleiden/go-workflows/worker"
	"github.com/cschleiden/go-workflows/workflow"
	"github.com/dbos-inc/dbos-transact-golang/dbos"
	_ "github.com/dbos-inc/dbos-transact-golang/dbos/driver/sqlite" // modernc.org/sqlite
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/vmihailenco/msgpack/v5"
)

// Libraries for durable execution. Looked at and left out: those that need a server of their own (Temporal, Restate, Inngest, Hatchet,
// Resonate), job queues that give no answer (River, gue, goqite), and keepers of HTTP answers that commit nothing with them
// (the middlewares for idempotency keys).

var workflowContenders = []contender{
	{name: "DBOS on SQLite", label: "DBOS/SQLite", on: onSQLite, open: openDBOSOnSQLite},
	{name: "go-workflows on SQLite", label: "go-workflows/SQLite", on: onSQLite, hold: backend.DefaultOptions.ActivityLockTimeout, open: openGoWorkflows},
	{name: "DBOS on PostgreSQL", label: "DBOS/PostgreSQL", on: onPostgres, open: openDBOSOnPostgres},
}

const (
	dbosModule        = "github.com/dbos-inc/dbos-transact-golang"
	goWorkflowsModule = "github.com/cschleiden/go-workflows"

	pureDriver     = "sqlite"
	pureModule     = "modernc.org/sqlite"
	pureParameters = "?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=busy_timeout(5000)&_pragma=foreign_keys(ON)&_txlock=immediate"
	ordersTable    = `CREATE TABLE IF NOT EXISTS orders (name TEXT PRIMARY KEY, payload BLOB NOT NULL) WITHOUT ROWID`
)

// durable is the request as a DBOS workflow, in what we found to be its best configuration that loses no promise: the business
// writes go into the system database, by the system's own pool, so that DBOS writes its record of a step in the business transaction
// itself; the key is the workflow's ID; nothing is logged; no queue, no conductor, no other serializer than its own. On SQLite, DBOS by itself would choose
// synchronous=NORMAL, with which a power cut takes back what was committed: here it gets FULL, as all others have.
type durable struct {
	dbos     dbos.Context
	workflow dbos.Workflow[order, order]
	find     func(ctx context.Context, name string) ([]byte, error)
	count    func(ctx context.Context) (int, error)
	shut     func() error
}

func openDBOSOnSQLite(p place) (station, error) {
	db, err := sql.Open(pureDriver, "file:"+filepath.Join(p.dir, "dbos.sqlite")+pureParameters)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(dbosConnections)
	db.SetMaxIdleConns(dbosConnections)
	if _, err := db.Exec(ordersTable); err != nil {
		return nil, err
	}
	d, err := dbos.NewContext(context.Background(), dbos.Config{AppName: "bench", SQLiteSystemDB: db, Logger: quiet})
	if err != nil {
		return nil, err
	}
	source, err := dbos.NewDataSource(d, db)
	if err != nil {
		return nil, err
	}
	w := &durable{dbos: d, shut: db.Close,
		find:  func(ctx context.Context, name string) ([]byte, error) { return sqlBusiness(ctx, db, name) },
		count: func(ctx context.Context) (int, error) { return sqlRows(ctx, db) }}
	return w, w.launch(source, `INSERT INTO orders (name, payload) VALUES (?, ?)`)
}

// dbosConnections is how many DBOS opens by itself.
const dbosConnections = 8

func openDBOSOnPostgres(p place) (station, error) {
	pool, err := openPool(p)
	if err != nil {
		return nil, err
	}
	d, err := dbos.NewContext(context.Background(), dbos.Config{AppName: "bench", SystemDBPool: pool, Logger: quiet})
	if err != nil {
		return nil, err
	}
	source, err := dbos.NewDataSource[*pgxpool.Pool](d, pool)
	if err != nil {
		return nil, err
	}
	inPool := pgRows{pool}
	w := &durable{dbos: d, find: inPool.business, count: inPool.rows, shut: func() error { pool.Close(); return nil }}
	return w, w.launch(source, insertOrder)
}

func (w *durable) launch(source *dbos.DataSource, insert string) error {
	business := func(name string) dbos.Txn[bool] {
		return func(ctx context.Context, tx dbos.Tx) (bool, error) {
			_, err := tx.Exec(ctx, insert, name, businessRow)
			return true, err
		}
	}
	w.workflow = func(c dbos.Context, o order) (order, error) {
		if _, err := dbos.RunAsTransaction(c, source, business(reservedRow(o.Account)), dbos.WithStepName("reserve")); err != nil {
			return o, err
		}
		payout, err := dbos.RunAsStep(c, func(context.Context) (string, error) { return payOut(o.Account), nil }, dbos.WithStepName("charge"))
		if err != nil {
			return o, err
		}
		o.Payout, o.Receipt = payout, receipt
		_, err = dbos.RunAsTransaction(c, source, business(settledRow(o.Account)), dbos.WithStepName("book"))
		return o, err
	}
	dbos.RegisterWorkflow(w.dbos, w.workflow, dbos.WithWorkflowName("order"))
	return dbos.Launch(w.dbos)
}

func (w *durable) request(_ context.Context, id string) (order, error) {
	h, err := dbos.RunWorkflow(w.dbos, w.workflow, asked(id), dbos.WithWorkflowID(id))
	if err != nil {
		return order{}, err
	}
	return h.GetResult()
}

func (w *durable) business(ctx context.Context, name string) ([]byte, error) {
	return w.find(ctx, name)
}
func (w *durable) rows(ctx context.Context) (int, error) { return w.count(ctx) }

func (w *durable) close() error {
	dbos.Shutdown(w.dbos, 5*time.Second)
	return w.shut()
}

// workflows is the request as a workflow of cschleiden/go-workflows. It opens its database itself (write-ahead log, and synchronous=FULL,
// which is SQLite's default), on one connection, and lets nobody write there: the business writes go to a database beside it, each in an
// activity, which may run twice. It forgets that an ID was used as soon as its workflow is finished, so the last activity keeps the answer, with the
// business write. Pollers look for work every millisecond instead of every 200.
type workflows struct {
	backend backend.Backend
	client  *client.Client
	worker  *worker.Worker
	cancel  context.CancelFunc
	orders  *sql.DB
}

const answersTable = `CREATE TABLE IF NOT EXISTS answers (id TEXT PRIMARY KEY, answer BLOB NOT NULL) WITHOUT ROWID`

func openGoWorkflows(p place) (station, error) {
	orders, err := sql.Open(sqliteDriver, "file:"+filepath.Join(p.dir, "orders.sqlite")+sqliteParameters)
	if err != nil {
		return nil, err
	}
	orders.SetMaxOpenConns(1)
	if _, err := orders.Exec(ordersTable + ";" + answersTable); err != nil {
		return nil, err
	}
	w := &workflows{orders: orders, backend: sqlite.NewSqliteBackend(filepath.Join(p.dir, "workflows.sqlite"),
		sqlite.WithBackendOptions(backend.WithLogger(quiet)))}
	options := worker.DefaultOptions
	options.WorkflowPollingInterval, options.ActivityPollingInterval = time.Millisecond, time.Millisecond
	options.WorkflowExecutorCacheSize = 1024
	w.worker = worker.New(w.backend, &options)
	w.client = client.New(w.backend)
	err = errors.Join(
		w.worker.RegisterWorkflow(w.flow),
		w.worker.RegisterActivity(w.reserve),
		w.worker.RegisterActivity(w.send),
		w.worker.RegisterActivity(w.settle))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel = cancel
	return w, w.worker.Start(ctx)
}

func (w *workflows) flow(ctx workflow.Context, o order) (order, error) {
	once := workflow.ActivityOptions{RetryOptions: workflow.RetryOptions{MaxAttempts: 1}}
	if _, err := workflow.ExecuteActivity[any](ctx, once, w.reserve, o).Get(ctx); err != nil {
		return o, err
	}
	payout, err := workflow.ExecuteActivity[string](ctx, once, w.send, o.Account).Get(ctx)
	if err != nil {
		return o, err
	}
	o.Payout, o.Receipt = payout, receipt
	_, err = workflow.ExecuteActivity[any](ctx, once, w.settle, o).Get(ctx)
	return o, err
}

const insertOnce = `INSERT INTO orders (name, payload) VALUES (?, ?) ON CONFLICT DO NOTHING`

func (w *workflows) reserve(ctx context.Context, o order) error {
	_, err := w.orders.ExecContext(ctx, insertOnce, reservedRow(o.Account), businessRow)
	return err
}

func (w *workflows) send(_ context.Context, token string) (string, error) { return payOut(token), nil }

func (w *workflows) settle(ctx context.Context, o order) error {
	answer, err := msgpack.Marshal(o)
	if err != nil {
		return err
	}
	tx, err := w.orders.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx, insertOnce, settledRow(o.Account), businessRow); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO answers (id, answer) VALUES (?, ?) ON CONFLICT DO NOTHING`, o.Account, answer); err != nil {
		return err
	}
	return tx.Commit()
}

func (w *workflows) request(ctx context.Context, id string) (order, error) {
	for {
		answer, err := w.answer(ctx, id)
		if !errors.Is(err, sql.ErrNoRows) {
			return answer, err
		}
		instance, err := w.client.CreateWorkflowInstance(ctx, client.WorkflowInstanceOptions{InstanceID: id}, w.flow, asked(id))
		if errors.Is(err, backend.ErrInstanceAlreadyExists) { // under way: it cannot be waited for
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			return answer, err
		}
		return client.GetWorkflowResult[order](ctx, w.client, instance, time.Minute)
	}
}

func (w *workflows) answer(ctx context.Context, id string) (answer order, err error) {
	var b []byte
	if err := w.orders.QueryRowContext(ctx, `SELECT answer FROM answers WHERE id = ?`, id).Scan(&b); err != nil {
		return answer, err
	}
	return answer, msgpack.Unmarshal(b, &answer)
}

func (w *workflows) business(ctx context.Context, name string) ([]byte, error) {
	return sqlBusiness(ctx, w.orders, name)
}

func (w *workflows) rows(ctx context.Context) (int, error) { return sqlRows(ctx, w.orders) }

func (w *workflows) close() error {
	w.cancel()
	return errors.Join(w.worker.WaitForCompletion(), w.backend.Close(), w.orders.Close())
}
