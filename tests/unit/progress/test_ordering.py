"""Jobs with the same key run one after another."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamworker.progress.ordering import KeyOrder


def test_first_item_of_a_key_runs_at_once() -> None:
    """No item is before it."""
    assert KeyOrder[int]().enter(b"a", 1)


def test_items_of_one_key_wait_in_their_order() -> None:
    """Each item runs when the one before has left."""
    order = KeyOrder[int]()
    order.enter(b"a", 1)

    assert [order.enter(b"a", 2), order.enter(b"a", 3), order.waiting] == [False, False, 2]
    assert [order.leave(b"a"), order.leave(b"a"), order.leave(b"a"), order.waiting] == [2, 3, None, 0]


def test_keys_do_not_wait_for_each_other() -> None:
    """A long job delays only its own key."""
    order = KeyOrder[int]()
    order.enter(b"a", 1)

    assert order.enter(b"b", 2)


def test_item_that_is_withdrawn_does_not_run() -> None:
    """One that runs, or that has left, is not withdrawn by it."""
    order = KeyOrder[int]()
    for item in (1, 2, 3):
        order.enter(b"a", item)
    for item in (2, 2, 1):
        order.withdraw(b"a", item)
    order.withdraw(b"b", 1)

    assert order.waiting == 1
    assert [order.leave(b"a"), order.leave(b"a"), order.waiting] == [3, None, 0]
    order.withdraw(b"a", 3)
    assert order.waiting == 0


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.booleans()), max_size=200))
def test_random_schedule_keeps_order_and_holds_nothing_in_the_end(steps: list[tuple[bytes, bool]]) -> None:
    """At most one item per key runs, in the order of arrival, and an idle key uses no memory."""
    order = KeyOrder[int]()
    came: dict[bytes, list[int]] = {}
    went: dict[bytes, list[int]] = {}
    active: dict[bytes, int] = {}
    for number, (key, comes) in enumerate(steps):
        if comes:
            came.setdefault(key, []).append(number)
            if order.enter(key, number):
                assert key not in active
                active[key] = number
                went.setdefault(key, []).append(number)
        elif key in active:
            following = order.leave(key)
            del active[key]
            if following is not None:
                active[key] = following
                went.setdefault(key, []).append(following)
    for key in list(active):
        while (following := order.leave(key)) is not None:
            went[key].append(following)

    assert came == went
    assert order.waiting == 0
    assert order._queues == {}
