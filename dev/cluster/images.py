"""What runs on a cluster of this project's: its images and those of the servers."""

from importlib.metadata import version

from dev.cluster.node import Cluster
from dev.images.building import DEPLOYABLES, Image, build
from dev.images.servers import SERVERS, build_servers
from dev.progress import Progress


def load_all(cluster: Cluster) -> list[Image]:
    """Builds all that has changed and gives it to the node, with progress on stderr.

    The deployables' images, which are returned, get the tag that the chart takes by itself.
    """
    names = {server: server for server in build_servers(list(SERVERS))}
    own = list(build(list(DEPLOYABLES)))
    for image in own:
        names[image.reference] = f"{image.reference.rpartition(':')[0]}:{version('flashsale')}"
    progress = Progress()
    cluster.load(names)
    progress.end(f"{len(names)} images: on the node, in {{seconds}} s")
    return own
