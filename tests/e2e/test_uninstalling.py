"""Uninstalling keeps the sales, and the next release continues them."""

from tests.e2e.shop import RELEASE, Shop, commands
from tests.support.chart import CRD_RESOURCE


def left(shop: Shop) -> list[str]:
    """Return the release's remaining objects of any kind except Events, which live for an hour."""
    kinds = shop.kubectl("api-resources", "--verbs=list", "--output=name").split()
    wanted = ",".join(kind for kind in kinds if not kind.startswith("events"))
    get = ("get", wanted, "--output=name", "--ignore-not-found")
    selector = f"--selector=app.kubernetes.io/instance={RELEASE}"
    labelled = shop.kubectl(*get, "--show-kind", selector).split()
    everything = shop.kubectl(*get).split()
    named = [each for each in everything if f"/{RELEASE}-flashsale" in each]
    return sorted({*labelled, *named})


def test_uninstalling_leaves_the_sales_and_reinstalling_continues_them(shop: Shop) -> None:
    shop.declare("kept", 50)
    shop.start_load("before", "persistent.js", ITEM_ID="kept", RATE=10, DURATION="2s", RUN="before")
    promises = shop.end_load("before")
    assert promises
    shop.check("kept", 50, promises)
    sales = set(shop.kubectl("get", "fs", "--output=name").split())

    shop.helm("uninstall", RELEASE, "--wait", "--timeout=2m")
    # Helm does not wait for the pods of the Deployments that it deletes.
    shop.until(lambda: left(shop) == [CRD_RESOURCE], "only the CRD is left")
    assert set(shop.kubectl("get", "fs", "--output=name").split()) == sales

    shop.install()
    shop.until_sale("kept", "Selling")
    rest = 50 - len(promises)
    shop.start_load("after", "stampede.js", ITEM_ID="kept", STOCK=rest, RATE=50, DURATION="3s")
    promises += shop.end_load("after")
    assert len(promises) == 50
    shop.check("kept", 50, promises)
    shop.until_sale("kept", "SoldOut")


def test_deleting_the_flashsales_first_ends_every_sale(shop: Shop) -> None:
    shop.declare("ended", 10)
    delete, get, uninstall = commands("uninstall", "operations")
    shop.shell(delete)

    def closed() -> bool:
        return all(" Closing " in line for line in shop.shell(get).splitlines()[1:])

    shop.until(closed, "every sale is Closing")
    shop.shell(uninstall)
    shop.until(lambda: left(shop) == [CRD_RESOURCE], "only the CRD is left")
    assert not shop.kubectl("get", "fs", "--output=name")

    shop.install()  # The release is there for every test, whatever their order.
