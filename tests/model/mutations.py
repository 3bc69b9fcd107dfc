"""Mistakes in the Lua scripts. Random sequences of calls must find each of them."""

from hashlib import sha1
from typing import NamedTuple

from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale_operator.sales.recovery import Recovery


class Fault(NamedTuple):
    """A mistake in a script: the correct text and the wrong one."""

    script: str
    right: str
    wrong: str

    def into(self, *clients: Inventory | Outbox | Recovery) -> None:
        name = f"_{self.script}"
        [script] = [getattr(client, name) for client in clients if hasattr(client, name)]
        assert script.source.count(self.right) == 1
        script.source = script.source.replace(self.right, self.wrong)
        script.sha = sha1(script.source.encode(), usedforsecurity=False).hexdigest()


FAULTS = [
    Fault("reserve", "+ quantity > sale.max_per_user", "+ 1 > sale.max_per_user"),
    Fault("reserve", "quantity > available then", "quantity > available + 1 then"),
    Fault("reserve", "local record = records[id]\n  if", "local record = known[n]\n  if"),
    Fault("reserve", "held[user] = held[user] + quantity", "held[user] = quantity"),
    Fault("reserve", "if sale.fenced then", "if sale.torn then"),
    Fault("reserve", "outbox_length >= outbox_limit", "outbox_length > outbox_limit"),
    Fault("reserve", "sale.now < sale.starts_ms", "clock_ms() < sale.starts_ms"),
    Fault("reserve", "'HSET', KEYS[1], 'state', 'ended',", "'HSET', KEYS[1],"),
    Fault("apply", "revision < sale.revision", "revision <= sale.revision"),
    Fault("apply", "math.max(requested, sale.accepted - sale.released)", "requested"),
    Fault("apply", "if sale.fenced then", "if sale.torn then"),
    Fault("apply", "and redis.call('XLEN', outbox) == 0", ""),
    Fault("apply", "and sale.accepted == tonumber(recorded)", ""),
    Fault("apply", "or redis.call('EXISTS', KEYS[2], KEYS[3], KEYS[4]) > 0", ""),
    Fault("trust", "math.max(sale.allocated, accepted - released)", "sale.allocated"),
    Fault("settle", "and entry[2][2] == reservation_id", ""),
    Fault("close", "if revision < sale.revision then", "if revision < 0 then"),
    Fault("close", "and 'ended' or 'closed'", "and 'closed' or 'closed'"),
    Fault("free", "redis.call('XLEN', KEYS[4]) > 0 or", ""),
    Fault("free", "or sale.accepted ~= recorded", ""),
    Fault("free", "or sale.revision ~= revision", ""),
    Fault("reserve", "redis.pcall('HSET', key, 'run_id', 'fenced')", ""),
    Fault("reserve", "'%x+:%x+$'", "'%x+$'"),
    Fault("apply", "redis.pcall('HSET', key, 'run_id', 'fenced')", ""),
    Fault("reserve", "if foreign(sale, ARGV[4]) then", "if false then"),
    Fault("apply", "if foreign(sale, ARGV[12]) then", "if false then"),
    Fault("close", "if foreign(sale, ARGV[3]) then", "if false then"),
    Fault("free", "if foreign(sale, ARGV[4]) then", "if false then"),
    Fault("fence", "if sale and foreign(sale, ARGV[14]) then", "if false then"),
    Fault("reserve", "traceparents[n], 'engine', sale.engine", "traceparents[n], 'engine', ''"),
    Fault("apply", "and ARGV[12] == sale.engine", ""),
    Fault("fence", "and sale.accepted >= tonumber(ARGV[13])", ""),
    Fault("fence", "if ARGV[12] ~= 'fence' and", "if ARGV[12] == 'begin' and"),
    Fault("fence", "sale.run_id ~= mine", "false"),
    Fault("fence", "if redis.call('XLEN', KEYS[4]) > 0 then", "if false then"),
    Fault("fence", "if sale.revision > tonumber(ARGV[2]) then", "if false then"),
    Fault("fence", "and other > tonumber(ARGV[2])", ""),
    Fault("fence", "and until_ms > clock_ms()", ""),
    Fault("fence", "redis.call('DEL', KEYS[2], KEYS[3])\n  write()", "write()"),
    Fault("page", "if sale.fenced then", "if sale.torn then"),
]
