package bigip

import (
	"fmt"
	"strings"
)

// save implements POST /mgmt/tm/sys/config.
func (d *Device) save(sent object) (object, error) {
	if err := known(sent, "command"); err != nil || sent["command"] != "save" {
		return nil, refuse(400, "the command %v is not supported", sent["command"])
	}
	if d.saveFails != "" {
		return nil, refuse(400, "%s", d.saveFails)
	}
	d.saved = d.running.clone()
	return object{"kind": "tm:sys:config:savestate", "command": "save"}, nil
}

// bash supports only the command with which Ansible saves the configuration.
func (d *Device) bash(sent object) (object, error) {
	if text(sent["command"]) != "run" || text(sent["utilCmdArgs"]) != `-c "tmsh save sys config"` {
		return nil, refuse(400, "this shell has no other command")
	}
	if _, err := d.save(object{"command": "save"}); err != nil {
		return nil, err
	}
	return object{"kind": "tm:util:bash:runstate", "command": "run", "utilCmdArgs": sent["utilCmdArgs"], "commandResult": "Saving running configuration...\n  /config/bigip.conf\n"}, nil
}

// sync copies the running configuration to the other unit, which saves it.
func (d *Device) sync(sent object) (object, error) {
	words := strings.Fields(text(sent["utilCmdArgs"]))
	if err := known(sent, "command", "utilCmdArgs"); err != nil || sent["command"] != "run" || len(words) != 3 || words[0] != "config-sync" || words[1] != "to-group" {
		return nil, refuse(400, "bad command")
	}
	if words[2] != Group && words[2] != "/Common/"+Group {
		return nil, notFound("device group", "/Common/"+words[2])
	}
	if d.pending = d.syncDelay; !d.peerDown {
		d.peer = d.running.clone()
	}
	return object{"kind": "tm:cm:runstate", "command": "run", "utilCmdArgs": sent["utilCmdArgs"]}, nil
}

func (d *Device) syncStatus() object {
	status, color := "In Sync", "green"
	switch {
	case d.peerDown:
		status, color = "Disconnected", "red"
	case d.pending > 0:
		d.pending--
		status, color = "Not All Devices Synced", "yellow"
	case !d.running.equal(d.peer):
		status, color = "Changes Pending", "yellow"
	}
	described := func(s string) object { return object{"description": s} }
	details := []string{"bigip2.example.org: connected", Group + " (" + status + "): what that means"}
	if status == "Changes Pending" {
		details = append(details, "Recommended action: Synchronize bigip1.example.org to group "+Group)
	}
	if d.otherPending {
		status = "Changes Pending"
		details = append(details, "other ("+status+"): what that means")
	}
	list := make(object)
	for i, text := range details {
		list[fmt.Sprintf("https://localhost/mgmt/tm/cm/syncStatus/0/details/%d", i)] = object{"nestedStats": object{"entries": object{"details": described(text)}}}
	}
	return object{"kind": "tm:cm:sync-status:sync-statusstats", "selfLink": d.link("/mgmt/tm/cm/sync-status"), "entries": object{
		"https://localhost/mgmt/tm/cm/sync-status/0": object{"nestedStats": object{"entries": object{
			"color": described(color), "mode": described("high-availability"), "status": described(status), "summary": described(""),
			"https://localhost/mgmt/tm/cm/syncStatus/0/details": object{"nestedStats": object{"entries": list}},
		}}},
	}}
}
