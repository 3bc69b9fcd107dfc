"""Metrics that every process exports in addition to its own."""

import platform

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, disable_created_metrics

from flashsale import __version__


def registry(component: str, engine: str) -> CollectorRegistry:
    """Returns a registry with `flashsale_build_info` and, on Linux, the process metrics."""
    # Otherwise every counter gets a second, unused series with its creation time.
    disable_created_metrics()  # type: ignore[no-untyped-call] # it lacks its "-> None"
    made = CollectorRegistry()
    Gauge(
        "flashsale_build_info",
        "Always 1. The labels are the component, its engine's name, its version and its Python.",
        ["component", "engine", "version", "python"],
        registry=made,
    ).labels(component, engine, __version__, platform.python_version()).set(1)
    ProcessCollector(registry=made)
    return made
