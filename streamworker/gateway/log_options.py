"""How the events topic is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamworker.gateway.followed import IDLE_S
from streamworker.gateway.history import HISTORY_BYTES
from streamworker.gateway.mailbox import MAILBOX_BYTES
from streamworker.gateway.search import SearchLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LogOptions"]


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """The options of one process."""

    reads_all: bool = False
    """Read all partitions, not only those with subscribers."""

    home_name: str = ""
    home_count: int = 0
    """How many home partitions the gateway of this name has; 0: it makes ids for any partition."""

    former_partitions: Sequence[int] = ()
    """Former counts of the topic's partitions: jobs from that time are looked for there too."""

    limits: SearchLimits = field(default_factory=SearchLimits)
    mailbox_bytes: int = MAILBOX_BYTES
    history_bytes: int = HISTORY_BYTES
    idle_s: float = IDLE_S
    timeout_s: float = 10.0
    """How long a request to the broker may take before BrokerUnavailable is raised."""
