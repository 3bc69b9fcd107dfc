"""The connections to the other nodes of a Redis Cluster."""

from flashsale import redis_client


def test_another_node_is_called_with_the_options_of_the_address() -> None:
    first = redis_client.connect("rediss://user:secret@first:7000/0?ssl_ca_certs=ca.pem")
    other = redis_client.neighbour(first, "second", 7001)
    pools = [client.connection_pool for client in (first, other)]
    own, others = [dict(pool.connection_kwargs) for pool in pools]
    assert (others.pop("host"), others.pop("port")) == ("second", 7001)
    assert (own.pop("host"), own.pop("port")) == ("first", 7000)
    assert own == others
    assert (own["username"], own["password"]) == ("user", "secret")
    assert pools[0].connection_class is pools[1].connection_class
    assert redis_client.address(other) == "second:7001/0"
