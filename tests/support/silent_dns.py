"""`python -m tests.support.silent_dns FOLDER`: sell while no DNS server knows Kafka's names.

The program needs a network and mounts of its own (`unshare --map-root-user --net --mount`), because
it replaces /etc/resolv.conf. It prints the status of a reservation after Redis has closed the
connections of an API pod, and then the pod's log.
"""

import asyncio
import fcntl
import socket
import struct
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread
from typing import Final

import httpx

from dev.services import Addresses, ApiServer
from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.inventory import Inventory
from flashsale.sale import SaleSpec

ITEM: Final = "phone"
LOOKUP_SECONDS: Final = 14
"""More than the 10 seconds of aiokafka, so that its next look-up begins meanwhile."""
_RESOLV_CONF: Final = f"nameserver 127.0.0.1\noptions timeout:{LOOKUP_SECONDS} attempts:1\n"
_KNOWN: Final = b"\x05redis\x04test\x00"
_SIOCSIFFLAGS: Final = 0x8914
_UP: Final = 0x49


def start_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", _UP))


def answer_names(server: socket.socket, hanging: Event) -> None:
    """Answer for redis.test, and never for other names. Set `hanging` with the second of those."""
    silent = set()
    while True:
        query, client = server.recvfrom(512)
        name, kind = query[12:-4], query[-4:-2]
        if name != _KNOWN:
            silent.add(name)
            if len(silent) > 1:
                hanging.set()
            continue
        is_ipv4 = kind == b"\x00\x01"
        address = struct.pack(">HHHIH", 0xC00C, 1, 1, 1, 4) + socket.inet_aton("127.0.0.1")
        head = query[:2] + b"\x81\x80" + struct.pack(">HHHH", 1, is_ipv4, 0, 0)
        server.sendto(head + query[12:] + (address if is_ipv4 else b""), client)


async def sell(folder: Path, hanging: Event) -> None:
    with RedisServer(folder / "redis") as redis:
        client = redis_client.connect(redis.url)
        await Inventory(client).apply(SaleSpec("default/phone", ITEM, 10), 1, seed_until_ms=2**53)
        addresses = Addresses(
            f"redis://redis.test:{redis.port}/0", "first.test:9092,second.test:9092", ""
        )
        with ApiServer(folder / "api", addresses) as api:
            await asyncio.to_thread(hanging.wait, 60)
            await asyncio.sleep(0.5)
            await client.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.5)
            async with httpx.AsyncClient(base_url=api.url, timeout=30) as http:
                body = {"userId": "ann", "itemId": ITEM, "quantity": 1}
                print((await http.post("/reserve", json=body)).status_code)
            await asyncio.sleep(LOOKUP_SECONDS / 2)  # the first look-up fails
            print(api.log.read_text())
        await client.aclose()


def main() -> None:
    folder = Path(sys.argv[1])
    start_loopback()
    own = folder / "resolv.conf"
    own.write_text(_RESOLV_CONF)
    subprocess.run(["mount", "--bind", str(own), "/etc/resolv.conf"], check=True)
    hanging = Event()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        Thread(target=answer_names, args=(server, hanging), daemon=True).start()
        asyncio.run(sell(folder, hanging))


if __name__ == "__main__":
    main()
