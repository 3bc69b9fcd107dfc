"""Loads all images into a cluster: the deployables and the servers."""

from importlib.metadata import version

from dev.cluster.node import Cluster
from dev.images.building import DEPLOYABLES, Image, build
from dev.images.servers import SERVERS, build_servers
from dev.progress import Progress


def load_all(cluster: Cluster) -> list[Image]:
    """Build all images that have changed, and load all into the cluster, with progress on stderr.

    The deployables' images get the tag that the chart uses by default. They are returned.
    """
    names = {server: server for server in build_servers(list(SERVERS))}
    own = list(build(list(DEPLOYABLES)))
    for image in own:
        names[image.reference] = f"{image.reference.rpartition(':')[0]}:{version('flashsale')}"
    progress = Progress()
    cluster.load(names)
    progress.end(f"{len(names)} images loaded into the cluster in {{seconds}} s")
    return own
