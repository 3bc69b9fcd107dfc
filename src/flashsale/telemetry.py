"""What every process tells of itself beside its own metrics."""

import platform

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, disable_created_metrics

from flashsale import __version__


def registry(component: str) -> CollectorRegistry:
    """A registry that has `flashsale_build_info` and, on Linux, the process' own figures."""
    # A series for every counter that nobody looks at.
    disable_created_metrics()  # type: ignore[no-untyped-call] # it lacks its "-> None"
    made = CollectorRegistry()
    Gauge(
        "flashsale_build_info",
        "1: this component runs in this version.",
        ["component", "version", "python"],
        registry=made,
    ).labels(component, __version__, platform.python_version()).set(1)
    ProcessCollector(registry=made)
    return made
