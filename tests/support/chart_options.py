"""Values that switch on the options of the chart."""

from typing import Final

from tests.support.chart import COMPONENTS, at

PEER: Final = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "there"}}}
POLICIES: Final = {"networkPolicies": {"enabled": True}}
TLS: Final = at("kafka.tls.enabled", True)
USERS: Final = at("kafka.users", {component: f"the-{component}" for component in COMPONENTS})
TOPICS: Final = {"kafka": {"topics": {"enabled": True, "cluster": "main"}}}
API_SCALES: Final = at("api.autoscaling.enabled", True)
BY_LAG: Final = at("consumer.autoscaling.by", "lag")
BY_CPU: Final = at("consumer.autoscaling.by", "cpu")
INGRESS: Final = at("api.ingress", {"enabled": True, "host": "shop.example"})
ROUTE: Final = at("api.httpRoute", {"enabled": True, "parentRefs": [{"name": "public"}]})
BALANCED: Final = at("api.service.type", "LoadBalancer")
MONITORS: Final = at("podMonitors.enabled", True)
RULES: Final = at("prometheusRules.enabled", True)
DASHBOARD: Final = at("dashboard.enabled", True)
TRACING: Final = at("tracing.endpoint", "http://collector:4318")

IDENTITY: Final = {
    "identity": {"jwksUrl": "https://keys/a", "issuer": "https://keys", "audience": "flashsale"}
}
ORDERS: Final = at("orders.existingSecret.name", "order-service")

AUTHORITY: Final = at("certificateAuthority.existingSecret.name", "ca")
EVERYWHERE: Final = at("operator.allNamespaces", True)
