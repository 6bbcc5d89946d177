"""The fields behind those of aiokafka's sticky assignor, as bytes."""

from __future__ import annotations

import pytest
from aiokafka.coordinator.assignors.sticky.sticky_assignor import (
    StickyAssignorUserDataV1,
    StickyPartitionAssignor,
)
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from hypothesis import given
from hypothesis import strategies as st

from streamworker.kafka.member_metadata import (
    decode_assignment,
    decode_claim,
    encode_assignment,
    encode_claim,
)
from streamworker.model import TopicPartition
from streamworker.progress.moves import Assignment, Claim

PARTITIONS = st.frozensets(
    st.builds(TopicPartition, st.sampled_from(["jobs", "täglich"]), st.integers(0, 2**31 - 1)), max_size=40
)
GENERATIONS = st.integers(-1, 2**31 - 1)


@st.composite
def claims(draw: st.DrawFn) -> Claim:
    owned = draw(PARTITIONS)
    parts = st.frozensets(st.sampled_from(sorted(owned))) if owned else st.just(frozenset[TopicPartition]())
    return Claim(
        topics=draw(st.frozensets(st.sampled_from(["jobs", "täglich", "leer"]))),
        owned=owned,
        generation=draw(GENERATIONS),
        busy=draw(parts),
        sealed=draw(parts),
        is_leaving=draw(st.booleans()),
    )


def through_the_wire(metadata: ConsumerProtocolMemberMetadata) -> ConsumerProtocolMemberMetadata:
    found: ConsumerProtocolMemberMetadata = ConsumerProtocolMemberMetadata.decode(metadata.encode())
    return found


@given(claims())
def test_claim_is_read_as_it_was_written(claim: Claim) -> None:
    """Through the bytes of a JoinGroup request."""
    assert decode_claim(through_the_wire(encode_claim(claim))) == claim


@given(claims())
def test_claim_is_read_by_the_previous_version_as_its_own(claim: Claim) -> None:
    """aiokafka's sticky assignor finds the partitions and the generation."""
    read = StickyPartitionAssignor.parse_member_metadata(through_the_wire(encode_claim(claim)))

    assert frozenset(TopicPartition(*partition) for partition in read.partitions) == claim.owned
    assert read.generation == claim.generation
    assert frozenset(read.subscription) == claim.topics


@given(PARTITIONS, GENERATIONS, st.booleans(), st.data())
def test_assignment_is_read_as_it_was_written(
    owned: frozenset[TopicPartition], generation: int, is_moving: bool, data: st.DataObject
) -> None:
    """Through the bytes of a SyncGroup response."""
    promised = data.draw(st.frozensets(st.sampled_from(sorted(owned)))) if owned else owned
    assignment = Assignment(owned=owned, promised=promised)
    sent = encode_assignment(assignment, generation, is_moving=is_moving)
    written = ConsumerProtocolMemberAssignment.decode(sent.encode())

    assert decode_assignment(written) == (assignment, generation, is_moving)
    assert frozenset(TopicPartition(*partition) for partition in written.partitions()) == owned


def test_claim_of_a_thousand_partitions_takes_little_more_than_the_previous_version_sends() -> None:
    """One record of the broker holds the metadata of the whole group."""
    owned = frozenset(TopicPartition("jobs", number) for number in range(1000))
    claim = Claim(topics=frozenset({"jobs"}), owned=owned, generation=7, busy=owned, sealed=owned)
    before = StickyAssignorUserDataV1([("jobs", sorted(n for _, n in owned))], 7).encode()

    assert len(encode_claim(claim).user_data) == len(before) + 254
    assert len(encode_assignment(Assignment(owned=owned, promised=owned), 7).user_data) == 133


def test_claim_of_the_previous_version_has_no_open_jobs() -> None:
    """Its partitions move at once, as they always have."""
    user_data = StickyAssignorUserDataV1([("jobs", [0, 1])], 3).encode()
    claim = decode_claim(ConsumerProtocolMemberMetadata(0, ["jobs"], user_data))

    owned = frozenset({TopicPartition("jobs", 0), TopicPartition("jobs", 1)})
    assert claim == Claim(topics=frozenset({"jobs"}), owned=owned, generation=3)


@pytest.mark.parametrize(
    "user_data", [b"", None, b"\x00", b"\xff\xff\xff\xff\x00\x00\x00\x01", b"\x7f\xff\xff\xff"]
)
def test_claim_without_sticky_fields_is_a_new_members(user_data: bytes | None) -> None:
    """A first join has none; what is damaged says nothing."""
    claim = decode_claim(ConsumerProtocolMemberMetadata(0, ["jobs"], user_data))

    assert claim == Claim(topics=frozenset({"jobs"}))


@given(claims(), st.data())
def test_claim_that_is_cut_short_is_read_as_far_as_the_previous_version_reads_it(
    claim: Claim, data: st.DataObject
) -> None:
    """Half a bitmap is not believed."""
    whole = encode_claim(claim).user_data
    ours = 4 + 2 * -(-len(claim.owned) // 8)
    cut = data.draw(st.integers(len(whole) - ours, len(whole) - 1))
    read = decode_claim(ConsumerProtocolMemberMetadata(0, sorted(claim.topics), whole[:cut]))

    assert read == Claim(topics=claim.topics, owned=claim.owned, generation=claim.generation)


def test_claim_with_fields_of_a_later_version_is_read() -> None:
    """Bytes behind the bitmaps are ignored."""
    claim = Claim(topics=frozenset({"jobs"}), owned=frozenset({TopicPartition("jobs", 4)}), is_leaving=True)
    metadata = encode_claim(claim)
    metadata.user_data += b"and more"

    assert decode_claim(metadata) == claim


@given(st.binary(max_size=64))
def test_claim_of_any_bytes_is_read_without_an_error(user_data: bytes) -> None:
    """An error in the leader would stop the whole group."""
    assert decode_claim(ConsumerProtocolMemberMetadata(0, ["jobs"], user_data)).busy <= frozenset(
        decode_claim(ConsumerProtocolMemberMetadata(0, ["jobs"], user_data)).owned
    )


def test_assignment_of_a_leader_that_does_not_report_moves_is_read() -> None:
    """Its fields end with the promised partitions."""
    owned = frozenset(TopicPartition("jobs", number) for number in range(3))
    assignment = Assignment(owned=owned, promised=owned)
    sent = encode_assignment(assignment, 7, is_moving=True)
    sent.user_data = sent.user_data[:-1]

    assert decode_assignment(sent) == (assignment, 7, False)


def test_assignment_with_fields_of_a_later_version_is_read() -> None:
    """Its unknown flags, and bytes behind them, are ignored."""
    assignment = Assignment(owned=frozenset({TopicPartition("jobs", 4)}))
    sent = encode_assignment(assignment, 7, is_moving=True)
    sent.user_data = sent.user_data[:-1] + b"\xff and more"

    assert decode_assignment(sent) == (assignment, 7, True)


@pytest.mark.parametrize("user_data", [b"", b"sw1\x00\x00\x00\x01", b"sw2\x00\x00\x00\x01\xff", b"x" * 40])
def test_assignment_without_the_fields_promises_nothing(user_data: bytes) -> None:
    """The leader is of the previous version, or fell back to its way."""
    assignment = ConsumerProtocolMemberAssignment(0, [("jobs", [0, 1])], user_data)

    assert decode_assignment(assignment).assignment.promised == frozenset()
    assert decode_assignment(assignment).last_generation is None
