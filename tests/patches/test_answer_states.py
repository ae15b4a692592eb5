from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveprune.patches.answer_states import FULL_PASS, answer_states, blocks_needed
from liveprune.patches.packed_forward import Piece
from liveprune.pruning.evaluation.engine import TokenRow

SIZE = 4
"""Tokens of a KV block."""


@dataclass
class Remembering:
    """A model whose state at a position is a digest of slot and of all tokens up to there.

    It keeps them in blocks as vLLM does, reads what the piece's blocks hold, and fails if that is
    not what this text begins with.
    """

    max_tokens: int
    on_cpu: bool = False
    block_size: int = SIZE
    cache: dict[tuple[int, int], float] = field(default_factory=dict)
    passes: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def blocks_added(self, piece: Piece) -> int:
        return self.blocks(piece.end) - len(piece.blocks)

    def __call__(self, pieces: Sequence[Piece]) -> torch.Tensor:
        states = []
        written: set[tuple[int, int]] = set()
        for piece in pieces:
            assert len(piece.blocks) == self.blocks(piece.end)
            state = float(piece.slot)
            for position in range(piece.start):
                state = self.cache[self._place(piece, position)]
            for i, token in enumerate(piece.tokens):
                place = self._place(piece, piece.start + i)
                assert place not in written, "two texts of one pass share a block they write"
                written.add(place)
                state = self.cache[place] = (31 * state + token) % 1009
                states.append(state)
        self.passes.append(len(states))
        self.slots.append(len({piece.slot for piece in pieces}))
        assert len(states) <= self.max_tokens
        return torch.tensor(states).unsqueeze(1)

    def copy_block(self, source: int, targets: Sequence[int]) -> None:
        for target in targets:
            for offset in range(self.block_size):
                if (source, offset) in self.cache:
                    self.cache[target, offset] = self.cache[source, offset]

    def _place(self, piece: Piece, position: int) -> tuple[int, int]:
        return piece.blocks[position // self.block_size], position % self.block_size


def expected(slot: int, row: TokenRow) -> list[float]:
    state, states = float(slot), []
    for token in (*row.prompt, *row.answer[:-1]):
        state = (31 * state + token) % 1009
        states.append(state)
    return states[-len(row.answer) :]


def check(
    rows: Sequence[TokenRow], slots: Sequence[int], forward: Remembering, blocks: int
) -> None:
    found = answer_states(forward, slots, rows, range(100, 100 + blocks))
    wanted = [expected(slot, row) for slot in slots for row in rows]
    assert [states.squeeze(1).tolist() for states in found] == wanted


tokens = st.integers(0, 5)
texts = st.lists(tokens, min_size=1, max_size=11).map(tuple)


@settings(max_examples=300)
@given(
    common=st.lists(tokens, max_size=9).map(tuple),
    pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=7),
    slots=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    extra=st.integers(0, 40),
    room=st.integers(0, 60),
    on_cpu=st.booleans(),
)
def test_states_are_those_of_each_text_alone(
    common: tuple[int, ...],
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]],
    slots: list[int],
    extra: int,
    room: int,
    on_cpu: bool,
) -> None:
    """Whatever is shared, and however few blocks and tokens there are."""
    rows = [TokenRow(common + prompt, answer) for prompt, answer in pairs]
    longest = max(len(row.prompt) + len(row.answer) for row in rows)
    blocks = max(blocks_needed(row, SIZE) for row in rows) + extra
    check(rows, slots, Remembering(longest + room, on_cpu), blocks)


def test_a_common_beginning_is_computed_once_for_each_plan() -> None:
    rows = [TokenRow((*range(10), 50 + i), (7, 8)) for i in range(5)]
    forward = Remembering(1000)
    check(rows, [1, 2], forward, 1000)
    assert forward.passes == [2 * 10, 2 * 5 * 2]


def test_a_question_is_computed_once_for_all_its_choices() -> None:
    rows = [TokenRow((q, *range(9)), (20 + c, 30)) for q in (1, 2) for c in range(4)]
    forward = Remembering(1000)
    check(rows, [3], forward, 1000)
    assert forward.passes == [2 * 9, 8 * 2]


def test_little_in_common_is_not_worth_a_pass() -> None:
    rows = [TokenRow((1, *range(20 * i, 20 * i + 20)), (5,)) for i in range(1, 4)]
    forward = Remembering(1000)
    check(rows, [0], forward, 1000)
    assert forward.passes == [3 * 21]


@pytest.mark.parametrize(("on_cpu", "together"), [(True, 1), (False, 2)])
def test_a_full_pass_is_one_plan_s_on_a_cpu(on_cpu: bool, together: int) -> None:
    rows = [TokenRow((i,) * FULL_PASS, (1,)) for i in range(2)]
    forward = Remembering(10 * FULL_PASS, on_cpu)
    check(rows, [1, 2], forward, 10_000)
    assert max(forward.slots) == together
