"""The release goes, the sales stay, and another release continues them."""

from tests.e2e.shop import RELEASE, Shop, eventually

CRD = "customresourcedefinition.apiextensions.k8s.io/flashsales.flashsale.dev"


def left(shop: Shop) -> list[str]:
    """What there is of the release, of any kind, but for Events, which tell of it for an hour."""
    kinds = shop.kubectl("api-resources", "--verbs=list", "--output=name").split()
    wanted = ",".join(kind for kind in kinds if not kind.startswith("events"))
    labelled = shop.kubectl(
        *("get", wanted, "--output=name", "--ignore-not-found", "--show-kind"),
        f"--selector=app.kubernetes.io/instance={RELEASE}",
    ).split()
    everything = shop.kubectl("get", wanted, "--output=name", "--ignore-not-found").split()
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
    # Helm waits for what it made, and not for pods that take their time to end.
    eventually("nothing but the resource is left", lambda: left(shop) == [CRD])
    assert set(shop.kubectl("get", "fs", "--output=name").split()) == sales

    shop.install()
    shop.until_sale("kept", "Selling")
    rest = 50 - len(promises)
    shop.start_load("after", "stampede.js", ITEM_ID="kept", STOCK=rest, RATE=50, DURATION="3s")
    promises += shop.end_load("after")
    assert len(promises) == 50
    shop.check("kept", 50, promises)
    shop.until_sale("kept", "SoldOut")
