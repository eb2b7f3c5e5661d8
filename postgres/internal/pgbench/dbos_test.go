package pgbench

import (
	"context"
	"testing"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
	"github.com/jackc/pgx/v5/pgxpool"
)

const dbosModule = "github.com/dbos-inc/dbos-transact-golang"

// durable is the request as a DBOS workflow, in what we found to be its best configuration that loses no promise: the business
// writes go into the system database, by the system's own pool, so that DBOS writes its record of a step in the business transaction
// itself; the key is the workflow's ID; nothing is logged; no queue, no conductor, no other serializer than its own.
type durable struct {
	pool     *pgxpool.Pool
	dbos     dbos.Context
	workflow dbos.Workflow[order, order]
}

func openDBOS(tb testing.TB, dsn string, connections int) station {
	tb.Helper()
	pool := openPool(tb, dsn, connections)
	d, err := dbos.NewContext(context.Background(), dbos.Config{AppName: "pgbench", SystemDBPool: pool, Logger: quiet})
	if err != nil {
		tb.Fatal(err)
	}
	source, err := dbos.NewDataSource(d, pool)
	if err != nil {
		tb.Fatal(err)
	}
	business := func(name string) dbos.Txn[bool] {
		return func(ctx context.Context, tx dbos.Tx) (bool, error) {
			_, err := tx.Exec(ctx, insertOrder, name, businessRow)
			return true, err
		}
	}
	workflow := func(c dbos.Context, o order) (order, error) {
		if _, err := dbos.RunAsTransaction(c, source, business(o.Account+"/reserved"), dbos.WithStepName("reserve")); err != nil {
			return o, err
		}
		payout, err := dbos.RunAsStep(c, func(context.Context) (string, error) { return payOut(o.Account), nil }, dbos.WithStepName("charge"))
		if err != nil {
			return o, err
		}
		o.Payout, o.Receipt = payout, receipt
		_, err = dbos.RunAsTransaction(c, source, business(o.Account+"/settled"), dbos.WithStepName("book"))
		return o, err
	}
	dbos.RegisterWorkflow(d, workflow, dbos.WithWorkflowName("order"))
	if err := dbos.Launch(d); err != nil {
		tb.Fatal(err)
	}
	return &durable{pool, d, workflow}
}

func (w *durable) request(_ context.Context, id string) (order, error) {
	h, err := dbos.RunWorkflow(w.dbos, w.workflow, order{Account: id, Cents: 500}, dbos.WithWorkflowID(id))
	if err != nil {
		return order{}, err
	}
	return h.GetResult()
}

func (w *durable) close() {
	dbos.Shutdown(w.dbos, 5*time.Second)
	w.pool.Close()
}
