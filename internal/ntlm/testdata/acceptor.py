# Accepts NTLM logons with gss-ntlmssp. Each line is a message in hex. After the logon it opens
# each message and seals it again. The optional argument is the application data of the channel
# bindings in hex.
import sys

import gssapi
from gssapi.raw import ChannelBindings

NTLM = gssapi.OID.from_int_seq("1.3.6.1.4.1.311.2.2.10")


def receive():
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    return bytes.fromhex(line)


def send(data):
    print(data.hex(), flush=True)


bindings = None
if len(sys.argv) > 1:
    bindings = ChannelBindings(application_data=bytes.fromhex(sys.argv[1]))
context = gssapi.SecurityContext(
    creds=gssapi.Credentials(usage="accept", mechs=[NTLM]), usage="accept", channel_bindings=bindings)
send(context.step(receive()))
context.step(receive())
if not context.complete:
    sys.exit("the logon is not complete")
send(str(context.initiator_name).rstrip("\0").encode())
while True:
    message = context.unwrap(receive())
    if not message.encrypted:
        sys.exit("a message is not sealed")
    send(context.wrap(message.message, True).message)
