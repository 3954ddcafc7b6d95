# Runs a command with pywinrm. It reads the command as JSON from standard input and prints the
# result as JSON.
import json
import sys

import winrm

how = json.load(sys.stdin)
protocol = winrm.Protocol(
    endpoint=how["endpoint"], transport=how["transport"], username=how["user"], password=how["password"],
    ca_trust_path=how["ca"] or None, cert_pem=how["cert"] or None, cert_key_pem=how["key"] or None)
result = {}
try:
    shell = protocol.open_shell(codepage=65001)
    for words in how["commands"]:
        command = protocol.run_command(shell, words[0], words[1:])
        out, err, code = protocol.get_command_output(shell, command)
        protocol.cleanup_command(shell, command)
        result.setdefault("answers", []).append([out.decode(), err.decode(), code])
    protocol.close_shell(shell)
except winrm.exceptions.WinRMError as e:
    result["error"] = str(e)
print(json.dumps(result))
