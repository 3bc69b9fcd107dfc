"""`python -m dev.issuer`: an issuer of tokens for buyers, on loopback.

It serves its public keys, and answers `?sub=USER` with a token, to every caller.
"""

import argparse
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import parse_qs, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from dev.progress import ending_quietly

AUDIENCE: Final = "flashsale"


class Issuer:
    """Its keys have the ids of their algorithms. It is also a context manager."""

    def __init__(self, port: int = 0, *, max_age: int | None = None) -> None:
        """`max_age` is the age limit of the keys in seconds, if the answers have one."""
        rsa = generate_rsa(65537, 2048)
        curve, edwards = generate_private_key(SECP256R1()), Ed25519PrivateKey.generate()
        self.keys: dict[str, Any] = {"RS256": rsa, "ES256": curve, "EdDSA": edwards}
        self.published: dict[str, dict[str, Any]] = {
            "RS256": RSAAlgorithm.to_jwk(rsa.public_key(), as_dict=True),
            "ES256": ECAlgorithm.to_jwk(curve.public_key(), as_dict=True),
            "EdDSA": OKPAlgorithm.to_jwk(edwards.public_key(), as_dict=True),
        }
        """The public keys by id. Tests change them."""
        self.requests = 0
        """How often the keys were asked for."""
        self._max_age = max_age
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                if subjects := query.get("sub"):
                    body, kind = issuer.token(subjects[0]).encode(), "text/plain"
                else:
                    body, kind = issuer._answer(), "application/json"
                self.send_response(200)
                self.send_header("Content-Type", kind)
                if issuer._max_age is not None:
                    self.send_header("Cache-Control", f"public, max-age={issuer._max_age}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:  # noqa: ANN401 - http.server's signature
                """Write nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def stop(self) -> None:
        """Stop serving keys. The issuer can still sign."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def settings(self) -> dict[str, str]:
        """The settings of an API that accepts this issuer's tokens."""
        return {
            "FLASHSALE_JWKS_URL": f"{self.url}/jwks.json",
            "FLASHSALE_JWT_ISSUER": self.url,
            "FLASHSALE_JWT_AUDIENCE": AUDIENCE,
        }

    def token(self, user: str, algorithm: str = "ES256", **changes: Any) -> str:  # noqa: ANN401
        """Sign a token that is valid for an hour. `changes` replace claims, None removes one."""
        claims = {"sub": user, "iss": self.url, "aud": AUDIENCE, "exp": int(time.time()) + 3600}
        kept = {name: value for name, value in (claims | changes).items() if value is not None}
        return jwt.encode(kept, self.keys[algorithm], algorithm, headers={"kid": algorithm})

    def _answer(self) -> bytes:
        self.requests += 1
        keys = [{**key, "kid": key_id} for key_id, key in self.published.items()]
        return json.dumps({"keys": keys}).encode()


def main() -> int:
    """Serve until Ctrl-C. Print the settings of an API and of the k6 scripts."""
    parser = argparse.ArgumentParser(prog="python -m dev.issuer", description=__doc__)
    parser.add_argument("--port", type=int, default=8090, help="default: 8090")
    port = parser.parse_args().port
    try:
        serving = Issuer(port)
    except (OSError, OverflowError) as error:
        parser.error(f"port {port} cannot be served: {error}")
    with serving as issuer:
        for name, value in (issuer.settings | {"TOKEN_URL": f"{issuer.url}/token"}).items():
            print(f"export {name}={value}", flush=True)
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
