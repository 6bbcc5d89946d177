"""A sticky assignor that lets open jobs end before their partition moves.

aiokafka takes any object with a name and three methods as an assignor. This one keeps the protocol name `sticky`, so
that a group may hold members of the previous version: whichever member leads, both read one another (see
`member_metadata`). Each consumer has an instance of its own: aiokafka's sticky assignor keeps the assignment as a class
attribute, and its generation is never set (aiokafka #1175, #1176).
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor

from streamworker.kafka.member_metadata import (
    decode_assignment,
    decode_claim,
    encode_assignment,
    encode_claim,
)
from streamworker.model import TopicPartition
from streamworker.progress.moves import Assignment, Claim, MemberIdentity, Report, kept_partitions, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from aiokafka.cluster import ClusterMetadata
    from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata

    from streamworker.progress.moves import MoveSchedule

__all__ = ["DeferredAssignor", "Outcome"]

log = structlog.get_logger()


class Outcome(NamedTuple):
    """The result of a rebalance for this member.

    The jobs of `kept` partitions continue; the rest of `owned` is to be opened. No more records of `promised` partitions
    may be accepted. An `overdue` partition that is not kept moved although it had open jobs: they took longer than
    `move_timeout_s`. `is_moving` says that a partition of this or another member is promised.
    """

    owned: frozenset[TopicPartition] = frozenset()
    kept: frozenset[TopicPartition] = frozenset()
    promised: frozenset[TopicPartition] = frozenset()
    overdue: frozenset[TopicPartition] = frozenset()
    is_moving: bool = False


class DeferredAssignor:
    """The assignor of one consumer. `outcome` belongs to the last assignment.

    The caller must accept no record between `metadata`, which reports the open jobs, and `on_assignment`.
    """

    name = "sticky"
    version = 0

    def __init__(
        self,
        schedule: MoveSchedule,
        *,
        identity: Callable[[], tuple[str, int]],
        busy: Callable[[], Collection[TopicPartition]],
        is_fenced: bool,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Report to the group what `busy` returns: the partitions with open jobs.

        `identity` returns the member id and the generation that the consumer has now. `is_fenced` says that the
        broker refuses the commits of a partition's former owner.
        """
        self._schedule = schedule
        self._identity = identity
        self._busy = busy
        self._is_fenced = is_fenced
        self._clock = clock
        self._assigned_as: MemberIdentity | None = None
        self._report: Report | None = None
        self._fallback: Any = type("Sticky", (StickyPartitionAssignor,), {})  # it keeps state on the class
        self.outcome = Outcome()

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """Return what this member reports when it joins. Called anew for every attempt to join.

        A member that the group has forgotten, and that got another id, claims nothing: its partitions may be another's.
        """
        subscribed = frozenset(topics)
        self._report = report = self._schedule.report(frozenset(self._busy()), self._clock())
        assigned_as, owned = self._assigned_as, self.outcome.owned
        if assigned_as is None or assigned_as.member_id != self._identity()[0]:
            return encode_claim(Claim(topics=subscribed, is_leaving=report.is_leaving))
        return encode_claim(
            Claim(
                topics=subscribed,
                owned=owned,
                generation=assigned_as.generation,
                busy=report.busy & owned,
                sealed=report.sealed & owned,
                is_leaving=report.is_leaving,
            )
        )

    def assign(
        self, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """Return the assignment of each member, as the leader of the group."""
        try:
            return _assign(cluster, members)
        except Exception:
            # An exception of `assign` would keep every member of the group from its assignment, for ever.
            log.exception("rebalance.plan_failed", members=len(members))
            return self._fallback.assign(cluster, members)  # type: ignore[no-any-return]

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Compute `outcome` from what the leader assigned to this member."""
        decision = decode_assignment(assignment)
        given, now = decision.assignment, MemberIdentity(*self._identity())
        kept = kept_partitions(
            self._assigned_as,
            now,
            owned_before=self.outcome.owned,
            owned=given.owned,
            busy=frozenset() if self._report is None else self._report.busy,
            last_generation=decision.last_generation,
            is_fenced=self._is_fenced,
        )
        overdue = frozenset() if self._report is None else self._report.overdue
        self.outcome = Outcome(given.owned, kept, given.promised, overdue, decision.is_moving)
        self._assigned_as = now
        self._schedule.assigned(given.promised, self._clock())


def _assign(
    cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
) -> dict[str, ConsumerProtocolMemberAssignment]:
    claims = {member: decode_claim(metadata) for member, metadata in members.items()}
    topics = frozenset[str]().union(*(claim.topics for claim in claims.values()))
    partitions = [
        TopicPartition(topic, number)
        for topic in topics
        for number in cluster.partitions_for_topic(topic) or ()
    ]
    found = plan(claims, partitions)
    nothing = Assignment(owned=frozenset())
    return {
        member: encode_assignment(
            found.assignments.get(member, nothing), found.last_generation, is_moving=found.is_moving
        )
        for member in members
    }
