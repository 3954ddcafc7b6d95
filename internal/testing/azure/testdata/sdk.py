"""Uses the fake with the Azure SDK for Python. Arguments: a credential, the
URL of a vault, a directory with www.pfx (password hunter2), www.pem and other.pem."""
import base64
import os
import sys

from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ResourceExistsError, ResourceNotFoundError
from azure.identity import (
    CertificateCredential,
    ClientAssertionCredential,
    ClientSecretCredential,
    ManagedIdentityCredential,
)
from azure.keyvault.certificates import (
    CertificateClient,
    CertificateContentType,
    CertificatePolicy,
    KeyType,
)
from azure.keyvault.secrets import SecretClient
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key, pkcs12

kind, vault, directory = sys.argv[1:4]
tenant, client = os.environ["AZURE_TENANT_ID"], os.environ["AZURE_CLIENT_ID"]
offline = {"disable_instance_discovery": True, "authority": os.environ["AZURE_AUTHORITY_HOST"]}


def read(name):
    with open(os.path.join(directory, name), "rb") as f:
        return f.read()


def credential(secret):
    if kind == "certificate":
        return CertificateCredential(tenant, client, os.path.join(directory, "app.pem"), **offline)
    if kind == "federated":
        return ClientAssertionCredential(tenant, client, lambda: read("token").decode())
    if kind == "managed":
        return ManagedIdentityCredential()
    return ClientSecretCredential(tenant, client, secret, **offline)


if kind == "secret":
    try:
        CertificateClient(vault, credential("wrong")).get_certificate("www")
        sys.exit("a wrong secret is accepted")
    except ClientAuthenticationError as e:
        assert "AADSTS7000215" in e.message, e.message

certificates = CertificateClient(vault, credential(os.environ.get("SECRET")), retry_backoff_factor=0.01)
secrets = SecretClient(vault, credential(os.environ.get("SECRET")))

try:
    certificates.get_certificate("www")
    sys.exit("there is a certificate")
except ResourceNotFoundError as e:
    assert e.error.code == "CertificateNotFound", e.error.code

key = load_pem_private_key(read("www.pem"), None)
leaf = x509.load_pem_x509_certificate(read("www.pem"))

# PKCS#12.
policy = CertificatePolicy("Unknown", exportable=True, key_type=KeyType.ec, key_curve_name="P-256", content_type=CertificateContentType.pkcs12)
first = certificates.import_certificate("www", read("www.pfx"), password="hunter2", policy=policy, tags={"team": "web"})
assert first.properties.enabled and first.properties.tags == {"team": "web"}, first.properties
assert x509.load_der_x509_certificate(bytes(first.cer)) == leaf
secret = secrets.get_secret("www")
assert secret.properties.content_type == "application/x-pkcs12"
read_key, read_leaf, chain = pkcs12.load_key_and_certificates(base64.b64decode(secret.value), None)
assert read_key.private_numbers() == key.private_numbers() and read_leaf == leaf and len(chain) == 1

# PEM, and a key that is not exportable.
pem = CertificatePolicy("Unknown", exportable=False, key_type=KeyType.ec, content_type=CertificateContentType.pem)
certificates.import_certificate("www", read("other.pem"), policy=pem)
secret = secrets.get_secret("www")
assert secret.properties.content_type == "application/x-pem-file" and "CERTIFICATE" in secret.value and "PRIVATE" not in secret.value
assert not certificates.get_certificate("www").policy.exportable
assert certificates.get_certificate_policy("www").content_type == "application/x-pem-file"
assert secrets.get_secret("www", first.properties.version).value

for wrong in (
    lambda: certificates.import_certificate("www", read("www.pfx"), password="hunter3"),
    lambda: certificates.import_certificate("www", read("www.pfx"), password="hunter2", policy=CertificatePolicy("Unknown", key_type=KeyType.rsa)),
    lambda: certificates.import_certificate("www", read("www.pem")),
    lambda: certificates.import_certificate("w_w", read("www.pfx"), password="hunter2"),
    lambda: certificates.import_certificate("www", read("www.pfx"), password="hunter2", tags={str(n): "" for n in range(16)}),
):
    try:
        wrong()
        sys.exit("something wrong is accepted")
    except HttpResponseError as e:
        assert e.status_code == 400 and e.error.code == "BadParameter", e

# Pages, tags, disabling.
listed = [(p.version, p.x509_thumbprint) for page in certificates.list_properties_of_certificate_versions("www", max_page_size=1).by_page() for p in page]
assert len(listed) == 2 and listed[1][0] == first.properties.version and listed[1][1] == first.properties.x509_thumbprint, listed
changed = certificates.update_certificate_properties("www", first.properties.version, tags={"team": "db"}, enabled=False)
assert changed.properties.tags == {"team": "db"} and not changed.properties.enabled
try:
    secrets.get_secret("www", first.properties.version)
    sys.exit("a disabled secret can be read")
except HttpResponseError as e:
    assert e.status_code == 403, e

# A deleted certificate blocks its name.
deleted = certificates.begin_delete_certificate("www").result()
assert deleted.recovery_id and deleted.scheduled_purge_date
try:
    certificates.import_certificate("www", read("www.pfx"), password="hunter2")
    sys.exit("a deleted name is reused")
except ResourceExistsError as e:
    assert e.error.innererror["code"] == "ObjectIsDeletedButRecoverable", e.error
assert certificates.get_deleted_certificate("www").name == "www"
certificates.begin_recover_deleted_certificate("www").result()
assert len(list(certificates.list_properties_of_certificate_versions("www"))) == 2
certificates.begin_delete_certificate("www").wait()
certificates.purge_deleted_certificate("www")
certificates.import_certificate("www", read("www.pfx"), password="hunter2")

# A pending creation blocks its name, and leaves a version when it is cancelled.
if kind == "secret":
    certificates.begin_create_certificate("new", CertificatePolicy("Unknown", subject="CN=new"))
    try:
        certificates.import_certificate("new", read("www.pfx"), password="hunter2")
        sys.exit("a pending certificate is replaced")
    except ResourceExistsError as e:
        assert e.error.code == "Forbidden", e.error
    assert certificates.get_certificate_operation("new").status == "inProgress"
    certificates.delete_certificate_operation("new")
    left = certificates.get_certificate("new")
    assert left.cer is None and not left.properties.enabled, left
    certificates.import_certificate("new", read("www.pfx"), password="hunter2")
    assert certificates.get_certificate("new").cer
print("done")
