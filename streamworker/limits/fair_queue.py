"""Decide which of the waiting jobs is next, so that no topic and no tenant starves the other ones.

Three rules, each inside the one before:

* Job topics share the streams by weight: next is the topic that has fewest streams open for its weight.
* The jobs of a topic take turns by a value, such as the tenant: each value with waiting jobs has one job per round.
* The jobs of one value leave in the order in which they were added, retries before first calls.

With one topic and one value this is first come, first served. Nothing here waits or looks at a clock, and nothing is
remembered of a topic's value without waiting jobs. Every operation takes O(1) in the jobs and values; `head` looks at
each topic with waiting jobs.
"""

from __future__ import annotations

from collections import OrderedDict
from math import lcm
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

__all__ = ["FairQueue", "TopicShares", "ValueLimit", "divide"]

Item = TypeVar("Item")


def divide(total: int, topics: Iterable[str], weights: Mapping[str, int]) -> dict[str, int]:
    """Divide a bound, such as `max_waiting`, among the topics by weight, 1 where none is given.

    The shares add up to `total`, but for topics whose share would be 0: each topic has room for one.
    """
    of = {topic: weights.get(topic, 1) for topic in topics}
    whole = sum(of.values())
    shares = {topic: total * weight // whole for topic, weight in of.items()}
    rest = sorted(of, key=lambda topic: (-(total * of[topic] % whole), topic))
    for topic in rest[: total - sum(shares.values())]:
        shares[topic] += 1
    return {topic: max(1, share) for topic, share in shares.items()}


class TopicShares:
    """The streams that are open for each topic, and which topic is next.

    Where two topics have equally many for their weight (none, say, where streams are short and calls are limited by
    rate), the topic is next that has had fewer calls for its weight since both have had work.
    """

    def __init__(self, weights: Mapping[str, int] | None = None) -> None:
        """Take positive weights; a topic that is not named has weight 1."""
        self._weights = dict(weights or {})
        if any(weight < 1 for weight in self._weights.values()):
            raise ValueError("a weight must be at least 1")
        self._scale = lcm(*self._weights.values())
        self._open: dict[str, int] = {}
        self._turns: dict[str, int] = {}
        self._turn = 0

    def rank(self, topic: str) -> tuple[float, int]:
        """Return the order of this topic: the one with the lowest rank is next."""
        return self._open.get(topic, 0) / self._weights.get(topic, 1), self._turn_of(topic)

    def open(self, topic: str) -> int:
        """Return the number of streams that are open for this topic."""
        return self._open.get(topic, 0)

    def enter(self, topic: str) -> None:
        """Count a stream of this topic."""
        self._open[topic] = self._open.get(topic, 0) + 1
        # A topic without work, or at a limit, accumulates no credit: it continues from the turn of the other topics.
        self._turn = self._turn_of(topic)
        self._turns[topic] = self._turn + self._scale // self._weights.get(topic, 1)

    def leave(self, topic: str) -> None:
        """Count off a stream that has ended."""
        _count_off(self._open, topic)

    def _turn_of(self, topic: str) -> int:
        return max(self._turn, self._turns.get(topic, 0))


class ValueLimit:
    """The bound on the streams of one value, over the queues of all upstreams. A job without a value has none."""

    def __init__(self, limit: int = 0) -> None:
        """Allow `limit` streams of each value at once; 0 means unlimited."""
        self._limit = limit
        self._open: dict[Hashable, int] = {}
        self._parked: dict[Hashable, set[_Rotation[object]]] = {}

    def has_room(self, value: Hashable) -> bool:
        """Whether one more stream of this value may open."""
        return not self._limit or value is None or self._open.get(value, 0) < self._limit

    def enter(self, value: Hashable) -> None:
        """Count a stream of this value."""
        if self._limit and value is not None:
            self._open[value] = self._open.get(value, 0) + 1

    def leave(self, value: Hashable) -> None:
        """Count off a stream that has ended; the queues give the value's waiting jobs their turns again."""
        if self._limit and value is not None:
            _count_off(self._open, value)
            for rotation in self._parked.pop(value, ()):
                rotation.resume(value)

    def park(self, value: Hashable, rotation: _Rotation[object]) -> None:
        """Note that this rotation waits until a stream of the value ends."""
        self._parked.setdefault(value, set()).add(rotation)

    def unpark(self, value: Hashable, rotation: _Rotation[object]) -> None:
        """Note that it does not wait any more: the last waiting job of the value was removed."""
        parked = self._parked[value]
        parked.remove(rotation)
        if not parked:
            del self._parked[value]


class _Line(Generic[Item]):
    """The waiting jobs of one value. An OrderedDict loses any of its entries, the first one included, in O(1)."""

    __slots__ = ("firsts", "retries")

    def __init__(self) -> None:
        self.retries: OrderedDict[Item, None] = OrderedDict()
        self.firsts: OrderedDict[Item, None] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self.retries or self.firsts)

    @property
    def head(self) -> Item:
        return next(iter(self.retries or self.firsts))

    def remove(self, item: Item) -> None:
        del (self.retries if item in self.retries else self.firsts)[item]


class _Rotation(Generic[Item]):
    """The values of one topic that have waiting jobs, in the order of their turns; those at their limit are parked."""

    def __init__(self, limit: ValueLimit) -> None:
        self._limit = limit
        self._ready: OrderedDict[Hashable, _Line[Item]] = OrderedDict()
        self._parked: dict[Hashable, _Line[Item]] = {}

    def __bool__(self) -> bool:
        return bool(self._ready or self._parked)

    def add(self, item: Item, value: Hashable, *, is_retry: bool) -> None:
        line = self._ready.get(value) or self._parked.get(value)
        if line is None:
            line = self._ready[value] = _Line()
        (line.retries if is_retry else line.firsts)[item] = None

    def remove(self, item: Item, value: Hashable) -> None:
        is_parked = value in self._parked
        lines = self._parked if is_parked else self._ready
        lines[value].remove(item)
        if not lines[value]:
            del lines[value]
            if is_parked:
                self._limit.unpark(value, self)  # type: ignore[arg-type]  # any rotation will do

    def head(self) -> Item | None:
        while self._ready:
            value, line = next(iter(self._ready.items()))
            if self._limit.has_room(value):
                return line.head
            self._parked[value] = self._ready.pop(value)
            self._limit.park(value, self)  # type: ignore[arg-type]  # any rotation will do
        return None

    def took(self, item: Item, value: Hashable) -> None:
        """Remove the head; the turn is the next value's."""
        self.remove(item, value)
        if value in self._ready:
            self._ready.move_to_end(value)

    def resume(self, value: Hashable) -> None:
        """Give a parked value its turns again, after those of the other values."""
        self._ready[value] = self._parked.pop(value)


class FairQueue(Generic[Item]):
    """The jobs that wait for one upstream. Items are distinguished by hash and equality; each may be in it once.

    `head` is the job that is next, `pop` takes it, and `leave` notes that its stream has ended.
    """

    def __init__(self, shares: TopicShares | None = None, limit: ValueLimit | None = None) -> None:
        """Share this upstream's streams by `shares`, its own; `limit` is the one of all queues of the process."""
        self._shares = shares or TopicShares()
        self._limit = limit or ValueLimit()
        self._topics: dict[str, _Rotation[Item]] = {}
        self._places: dict[Item, tuple[str, Hashable]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Item]:
        """Iterate over the waiting jobs in the order in which they were added."""
        return iter(self._places)

    def __contains__(self, item: object) -> bool:
        return item in self._places

    def add(self, item: Item, *, topic: str = "", value: Hashable = None, is_retry: bool = False) -> None:
        """Add a waiting job. All jobs without a value take turns as one value."""
        if item in self._places:
            raise ValueError("the item waits already")
        rotation = self._topics.get(topic)
        if rotation is None:
            rotation = self._topics[topic] = _Rotation(self._limit)
        rotation.add(item, value, is_retry=is_retry)
        self._places[item] = topic, value

    def remove(self, item: Item) -> bool:
        """Remove a waiting job; return False if it does not wait."""
        if item not in self._places:
            return False
        topic, value = self._places.pop(item)
        self._topics[topic].remove(item, value)
        self._forget(topic)
        return True

    def head(self) -> Item | None:
        """Return the job that is next; None if none waits, or only jobs of values that are at their limit.

        It stays the same until a job is added or removed, or a stream ends.
        """
        for topic in sorted(self._topics, key=self._shares.rank):
            item = self._topics[topic].head()
            if item is not None:
                return item
        return None

    def pop(self) -> Item:
        """Remove and return the job that is next, and count its stream. Raises IndexError if there is none."""
        item = self.head()
        if item is None:
            raise IndexError("no job may leave the queue")
        topic, value = self._places.pop(item)
        self._topics[topic].took(item, value)
        self._forget(topic)
        self._shares.enter(topic)
        self._limit.enter(value)
        return item

    def leave(self, *, topic: str = "", value: Hashable = None) -> None:
        """Note that the stream of a job that `pop` returned has ended."""
        self._shares.leave(topic)
        self._limit.leave(value)

    def clear(self) -> list[Item]:
        """Remove all waiting jobs; return them in the order in which they were added."""
        items = list(self._places)
        for item in items:
            self.remove(item)
        return items

    def _forget(self, topic: str) -> None:
        if not self._topics[topic]:
            del self._topics[topic]


Key = TypeVar("Key")


def _count_off(counts: dict[Key, int], key: Key) -> None:
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]
