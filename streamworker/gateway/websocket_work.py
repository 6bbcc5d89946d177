"""A message of a websocket that is carried out in a task of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from streamworker.gateway.feeds import Feed
    from streamworker.gateway.websocket_subscription import Subscription

__all__ = ["Work"]


class Work:
    """A submit, a cancel or a subscription. A websocket may have hundreds, so that one object keeps what is known of each."""

    __slots__ = ("cursor", "feed", "is_opening", "is_unsubscribed", "subscribes", "subscription", "task")

    def __init__(self, task: asyncio.Task[None], *, subscribes: bool) -> None:
        """`subscribes`: it is or becomes a subscription."""
        self.task = task
        self.subscribes = subscribes
        self.is_opening = False
        """Whether its feed is being opened."""
        self.cursor: str | None = None
        """The client's cursor, while the feed is being opened."""
        self.feed: Feed | None = None
        self.subscription: Subscription | None = None
        self.is_unsubscribed = False
        """Whether the client has ended it."""

    @property
    def is_subscription(self) -> bool:
        """Whether the client may end it."""
        return self.is_opening or self.feed is not None

    def open(self, cursor: str | None) -> None:
        """Note that a feed is being opened."""
        self.is_opening, self.cursor = True, cursor

    def follow(self, feed: Feed, subscription: Subscription) -> None:
        """Note the open feed."""
        self.is_opening, self.cursor = False, None
        self.feed, self.subscription = feed, subscription

    def end(self) -> None:
        """Note that the subscription is over; its end was reported to the client."""
        self.feed = self.subscription = None
        self.is_unsubscribed = False
