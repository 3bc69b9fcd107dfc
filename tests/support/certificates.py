"""Certificates as Strimzi and EKS can make them, which Python 3.13 refuses by default."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

ADDRESS: Final = "127.0.0.1"


def certificate(folder: Path) -> None:
    """Write `ca.crt`, and `server.pem` for `ADDRESS`. Neither has the identifier of a key."""
    now, keys = datetime.now(UTC), [generate_private_key(SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in ("ca", "it")]
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    alternatives = x509.SubjectAlternativeName([x509.IPAddress(ip_address(ADDRESS))])
    extensions = [
        [(x509.BasicConstraints(ca=True, path_length=0), True), (usage, True)],
        [(x509.BasicConstraints(ca=False, path_length=None), True), (alternatives, False)],
    ]
    for n, file in enumerate(("ca.crt", "server.pem")):
        builder = x509.CertificateBuilder(
            names[0], names[n], keys[n].public_key(), x509.random_serial_number(),
            now - timedelta(hours=1), now + timedelta(hours=1),
        )  # fmt: skip
        for extension, critical in extensions[n]:
            builder = builder.add_extension(extension, critical)
        pem = builder.sign(keys[0], SHA256()).public_bytes(Encoding.PEM)
        key = keys[n].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / file).write_bytes(pem if n == 0 else key + pem)
