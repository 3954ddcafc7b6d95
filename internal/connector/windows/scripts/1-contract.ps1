# certctl-agent runs exactly this script on a Windows host, to manage certificates in a store and the
# bindings of IIS. It needs Windows PowerShell 5.1.
#
# Its input is one line of JSON on standard input, its output one line of JSON. Neither is ever
# evaluated or part of a script block, so script block logging, transcripts and command lines show only
# this text. Cmdlets get no secrets either, since module logging records their arguments: methods of
# .NET parse the request and import the key.
#
# Both documents always have all members. Thumbprints are SHA-1, in upper-case hex.
#
# request: {
#   "contract": 1,
#   "operation": "read",        read, write, restore, finish, selftest
#   "target": "t-web1",         the target that owns the certificates, as in their marks
#   "location": "LocalMachine", or CurrentUser
#   "store": "My",
#   "thumbprint": "",           of the certificate to install
#   "chain": [],                its intermediate certificates, DER in base64
#   "friendly_name": "",        "": unchanged
#   "key_readers": [],          accounts, or SIDs, that get read access to the private key
#   "site": "",                 "": no binding
#   "binding": "*:443:",        in the format of IIS: address:port:host
#   "ssl_flags": 0,             of a new binding: 1 is SNI
#   "expected": "",             write: the current thumbprint of the binding; "": none
#   "pfx": "",                  write: base64
#   "password": "",             write: of pfx
#   "exportable": false,        write
#   "was": null,                restore: the state that read returned before the first write
#   "keep": 0,                  finish: how many of the target's older certificates to keep
#   "remove_expired": false     finish, without a site: remove expired ones of the same subject
# }
#
# answer: {
#   "contract": 1,
#   "code": "",                 "": success; else the problem, see Fail below
#   "detail": "",               subject of the problem
#   "message": "",              of Windows, in its language
#   "hresult": 0,
#   "line": 0,                  in this script
#   "state": null,              the state after the operation
#   "host": null                selftest: the state of the host
# }
#
# state: {
#   "thumbprint": "",           of the certificate in the request
#   "present": true,            the certificate is in the store
#   "has_key": true,            with its private key
#   "sha256": "",               of its DER, in upper-case hex
#   "friendly_name": "",
#   "unread": [],               accounts in key_readers that cannot read the key
#   "chain_missing": [],        thumbprints of the chain that are not in the store CA
#   "ours": [],                 thumbprints in the store with the target's mark
#   "binding": "",              https if the site has the binding
#   "bound": "",                thumbprint of the binding
#   "bound_store": "",
#   "bound_flags": 0,
#   "sharing": []               other bindings with the same entry in http.sys
# }
#
# host: {
#   "powershell": "5.1",
#   "language_mode": "FullLanguage",
#   "dotnet": 461808,           Release of .NET Framework in the registry
#   "windows": "10.0.17763.0",
#   "user": "",
#   "administrator": true,
#   "store": "",                "": the store can be written; else the code of the problem
#   "iis": "",                  "": IIS can be managed; else the code of the problem
#   "sites": []
# }
