# What certctl-agent runs on a Windows host, always this very text: certificates in a store, and the
# bindings of IIS. Windows PowerShell 5.1.
#
# It is told what to do by one line of JSON on standard input, and answers with one line of JSON.
# Neither is ever evaluated, nor a part of a script block: what script block logging, transcripts and
# command lines show is this text. Cmdlets are given no secret either, since module logging writes down
# what they are given; the request is taken apart, and the key imported, by methods of .NET.
#
# Both documents have all of their members, always. Thumbprints are SHA-1, in upper-case hex.
#
# request: {
#   "contract": 1,
#   "operation": "read",        read, write, restore, finish, selftest
#   "target": "t-web1",         whose certificates these are: what the mark says
#   "location": "LocalMachine", or CurrentUser
#   "store": "My",
#   "thumbprint": "",           of the certificate to install
#   "chain": [],                its intermediate certificates, DER in base64
#   "friendly_name": "",        "": as it is
#   "key_readers": [],          accounts, or SIDs, that get read access to the private key
#   "site": "",                 "": no binding
#   "binding": "*:443:",        as IIS writes it: address:port:host
#   "ssl_flags": 0,             of a binding that is made: 1 is SNI
#   "expected": "",             write: the thumbprint that the binding has; "": none
#   "pfx": "",                  write: base64
#   "password": "",             write: of pfx
#   "exportable": false,        write
#   "was": null,                restore: what read answered before the first write
#   "keep": 0,                  finish: how many of our older certificates stay
#   "remove_expired": false     finish, without a site: remove ours of the same subject that expired
# }
#
# answer: {
#   "contract": 1,
#   "code": "",                 "": it was done; else what is wrong, see Fail below
#   "detail": "",               what that is about
#   "message": "",              of Windows, in its language
#   "hresult": 0,
#   "line": 0,                  of this text
#   "state": null,              the state, afterwards
#   "host": null                selftest: what the host is like
# }
#
# state: {
#   "thumbprint": "",           of the request: what the following is about
#   "present": true,            the certificate is in the store
#   "has_key": true,            with its private key
#   "sha256": "",               of its DER, in upper-case hex
#   "friendly_name": "",
#   "unread": [],               those of key_readers that cannot read the key
#   "chain_missing": [],        thumbprints of the chain that are not in the store CA
#   "ours": [],                 thumbprints in the store that carry the target's mark
#   "binding": "",              https when the site has the binding
#   "bound": "",                the thumbprint that it has
#   "bound_store": "",
#   "bound_flags": 0,
#   "sharing": []               other bindings that take the same certificate from http.sys
# }
#
# host: {
#   "powershell": "5.1",
#   "language_mode": "FullLanguage",
#   "dotnet": 461808,           the Release that .NET Framework notes in the registry
#   "windows": "10.0.17763.0",
#   "user": "",
#   "administrator": true,
#   "store": "",                "": the store can be written; else the code why not
#   "iis": "",                  "": IIS can be managed; else the code why not
#   "sites": []
# }
