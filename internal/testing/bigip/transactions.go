package bigip

import (
	"net/http"
	"strconv"
	"strings"
	"time"
)

// lifetime is the idle timeout of a transaction.
const lifetime = 120 * time.Second

// transaction collects commands, which are carried out at its end, all or none
// (https://community.f5.com/kb/technicalarticles/demystifying-icontrol-rest-part-7---understanding-transactions/290328).
type transaction struct {
	commands []command
	last     time.Time
}

type command struct {
	method, path string
	sent         object
}

func (d *Device) transact(method, id string, sent object) (object, error) {
	if id == "" {
		if method != http.MethodPost || len(sent) > 0 {
			return nil, refuse(400, "a transaction is made by a POST of {}")
		}
		d.count++
		n := 1_700_000_000_000_000 + d.count
		d.transactions[n] = &transaction{last: time.Now()}
		return d.showTransaction(n, "STARTED"), nil
	}
	n, t := d.find(id)
	if t == nil {
		return nil, refuse(404, "Transaction does not exist: %s", id)
	}
	switch method {
	case http.MethodGet:
		return d.showTransaction(n, "STARTED"), nil
	case http.MethodDelete:
		delete(d.transactions, n)
		return object{}, nil
	case http.MethodPatch:
		if err := known(sent, "state", "validateOnly"); err != nil || sent["state"] != "VALIDATING" {
			return nil, refuse(400, "a transaction is ended by the state VALIDATING")
		}
		delete(d.transactions, n)
		return d.commit(n, t, sent["validateOnly"] == true)
	}
	return nil, refuse(405, "method %s is not supported", method)
}

func (d *Device) find(id string) (int64, *transaction) {
	n, err := strconv.ParseInt(id, 10, 64)
	t := d.transactions[n]
	if err != nil || t == nil || time.Since(t.last) > lifetime {
		return 0, nil
	}
	return n, t
}

func (d *Device) showTransaction(n int64, state string) object {
	return object{"transId": n, "state": state, "timeoutSeconds": lifetime.Seconds(), "asyncExecution": false, "validateOnly": false, "executionTimeout": 300,
		"executionTime": 0, "failureReason": "", "kind": "tm:transactionstate", "selfLink": d.link("/mgmt/tm/transaction/" + strconv.FormatInt(n, 10))}
}

// queue adds a command.
func (d *Device) queue(id, method, path string, sent object) (object, error) {
	n, t := d.find(id)
	switch {
	case t == nil:
		return nil, refuse(404, "Transaction does not exist: %s", id)
	case method == http.MethodGet:
		return nil, refuse(400, "GET is not a command of a transaction")
	case strings.HasPrefix(path, "/mgmt/tm/util/"), path == "/mgmt/tm/sys/config", path == "/mgmt/tm/cm":
		return nil, refuse(400, "%s is not a command of a transaction", path)
	}
	t.commands, t.last = append(t.commands, command{method, path, sent}), time.Now()
	order := len(t.commands)
	return object{"method": method, "uri": "https://localhost" + path, "body": sent, "evalOrder": order, "commandId": order, "kind": "tm:transaction:commandsstate",
		"selfLink": d.link("/mgmt/tm/transaction/" + strconv.FormatInt(n, 10) + "/commands/" + strconv.Itoa(order))}, nil
}

func (d *Device) commit(n int64, t *transaction, dry bool) (object, error) {
	next := d.running.clone()
	var err error
	for _, c := range t.commands {
		if _, err = d.carryOut(next, c.method, c.path, "", c.sent); err != nil {
			break
		}
	}
	if err == nil {
		err = next.check(d)
	}
	if err != nil {
		return nil, refuse(400, "transaction failed:%s", err.Error())
	}
	if !dry {
		d.running = next
	}
	return d.showTransaction(n, "COMPLETED"), nil
}
