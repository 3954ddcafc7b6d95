module certctl-agent

go 1.26
