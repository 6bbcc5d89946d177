"""Home partitions: the same for a name, different for others, and ids that fall into them."""

from __future__ import annotations

from collections import Counter

import pytest

from streamworker.client.ids import new_job_id
from streamworker.gateway.home_partitions import draw_id, home_partitions
from streamworker.kafka.partitioner import partition_of


def test_home_partitions_of_a_name_are_constant_and_spread_over_all() -> None:
    """Twenty gateways with five each use most of 96 partitions, none of them by more than a few."""
    names = [f"gateway-{number}" for number in range(20)]
    homes = [home_partitions(name, 5, 96) for name in names]
    uses = Counter(number for home in homes for number in home)

    assert homes == [home_partitions(name, 5, 96) for name in names]
    assert all(len(home) == 5 for home in homes)
    assert len(uses) > 50
    assert max(uses.values()) <= 5


def test_home_partitions_change_little_when_partitions_are_added() -> None:
    """A name keeps the partitions that no new one outranks."""
    kept = [len(home_partitions(f"g{n}", 5, 96) & home_partitions(f"g{n}", 5, 108)) for n in range(50)]

    assert sum(kept) / 50 > 4


@pytest.mark.parametrize(("count", "partitions", "size"), [(0, 96, 0), (5, 3, 3), (1, 1, 1)])
def test_home_partitions_are_at_most_all(count: int, partitions: int, size: int) -> None:
    """None are wanted, or more than there are."""
    assert len(home_partitions("g", count, partitions)) == size


def test_draw_id_returns_an_id_in_a_home_partition() -> None:
    """Whatever the tenant's prefix is."""
    home = home_partitions("g", 5, 96)
    ids = [
        draw_id(lambda: "acme." + new_job_id(), lambda key: partition_of(key, 96), home, 96)
        for _ in range(20)
    ]

    assert all(partition_of(one.encode(), 96) in home for one in ids)
    assert len(set(ids)) == 20


def test_draw_id_without_home_partitions_draws_once() -> None:
    """And it ends where no id falls into a home partition."""
    ids = iter(["x", "y"])
    assert draw_id(lambda: next(ids), lambda _: 0, (), 96) == "x"
    assert next(ids) == "y"
    assert draw_id(lambda: "x", lambda _: 0, {1}, 2) == "x"
