"""Hidden states of many answers under many plans, with what texts have in common computed once.

Rows of one question (its choices), or all rows of a task with one instruction, begin with the same
tokens. Under one plan these have the same keys and values: they run first, as contexts, and the
rows go on from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile

import torch

from liveprune.patches.packed_forward import PackedForward, Piece
from liveprune.pruning.evaluation.engine import TokenRow

FULL_PASS = 512
"""Tokens with which a pass keeps a CPU busy: it is then kept to one plan, whose lower top-k costs
less alone (the lean path)."""
WORTH = 0.1
"""Share of a plan's tokens that contexts must save: passes of their own cost time, too."""


@dataclass(frozen=True)
class _Text:
    """One row under one slot."""

    slot: int
    row: int
    context: tuple[int, ...]
    """What it begins with, computed once for all that share it; empty: nothing."""


def answer_states(
    forward: PackedForward,
    slots: Sequence[int],
    rows: Sequence[TokenRow],
    blocks: Sequence[int],
) -> list[torch.Tensor]:
    """Hidden states [answer, hidden] that predict each answer: all rows under the first slot, ...

    Args:
        forward: of the worker's model.
        slots: live ones.
        rows: none with more tokens than a pass.
        blocks: KV blocks that nobody else uses; at least ``blocks_needed`` of any one row.
    """
    contexts = _contexts(rows)
    texts = [_Text(slot, i, contexts[i]) for slot in dict.fromkeys(slots) for i in range(len(rows))]
    if any(contexts):
        # Texts of one context must stand together; their order is undone below.
        texts.sort(key=lambda x: (slots.index(x.slot), x.context))
    found: dict[tuple[int, int], torch.Tensor] = {}
    for pack in _packs(texts, rows, forward, len(blocks)):
        found.update(_run(forward, pack, rows, blocks))
    return [found[slot, i] for slot in slots for i in range(len(rows))]


def blocks_needed(row: TokenRow, block_size: int) -> int:
    """KV blocks with which one row can be run: those of its text, and of its context."""
    return 2 * -(-len(row.text) // block_size)


def _contexts(rows: Sequence[TokenRow]) -> list[tuple[int, ...]]:
    """What each row's text begins with and others' do too; empty where sharing gains little.

    Either what all prompts begin with, or each question's own prompt where it has several rows.
    The last token of a prompt predicts the answer, and stays with the row.
    """
    prompts = [row.prompt[:-1] for row in rows]
    total = sum(len(row.text) for row in rows)
    first = min(prompts, key=len)
    same = sum(1 for _ in takewhile(lambda at: len(set(at)) == 1, zip(*prompts, strict=False)))
    common = [first[:same]] * len(rows)
    gains = [
        (sum(map(len, contexts)) - sum(map(len, set(contexts))), contexts)
        for contexts in (common, prompts)
    ]
    gain, best = max(gains, key=lambda x: x[0])
    if gain < WORTH * total:
        return [()] * len(rows)
    shared = Counter(best)
    return [context if shared[context] > 1 else () for context in best]


def _packs(
    texts: Sequence[_Text], rows: Sequence[TokenRow], forward: PackedForward, blocks: int
) -> Iterator[Sequence[_Text]]:
    """Texts whose contexts, and the longest of themselves, fit the blocks together."""
    start = held = longest = 0
    for i, text in enumerate(texts):
        own = forward.blocks(len(rows[text.row].text))
        is_new = (
            i == start or texts[i - 1].slot != text.slot or texts[i - 1].context != text.context
        )
        more = forward.blocks(len(text.context)) if is_new else 0
        if i > start and held + more + max(longest, own) > blocks:
            yield texts[start:i]
            start, held, longest = i, 0, 0
            more = forward.blocks(len(text.context))
        held, longest = held + more, max(longest, own)
    yield texts[start:]


def _run(
    forward: PackedForward, texts: Sequence[_Text], rows: Sequence[TokenRow], blocks: Sequence[int]
) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
    """Run a pack: its contexts, then the texts, which take the remaining blocks again and again."""
    size, free = forward.block_size, iter(blocks)
    contexts: dict[tuple[int, tuple[int, ...]], Piece] = {}
    for text in texts:
        key = text.slot, text.context
        if text.context and key not in contexts:
            own = tuple(islice(free, forward.blocks(len(text.context))))
            contexts[key] = Piece(text.slot, text.context, 0, own)
    for part in _passes([*contexts.values()], forward, len(blocks)):
        forward(part)
    rest = list(free)
    waiting = []
    for text in texts:
        start = len(text.context)
        shared = contexts[text.slot, text.context].blocks[: start // size] if start else ()
        waiting.append(Piece(text.slot, rows[text.row].text[start:], start, shared))
    done = 0
    for part in _passes(waiting, forward, len(rest)):
        mine = texts[done : done + len(part)]
        done += len(part)
        free = iter(rest)
        placed = [
            replace(piece, blocks=(*piece.blocks, *islice(free, forward.blocks_added(piece))))
            for piece in part
        ]
        _go_on_from(contexts, mine, placed, forward)
        hidden = forward(placed)
        end = 0
        for text, piece in zip(mine, placed, strict=True):
            end += len(piece.tokens)
            yield (text.slot, text.row), hidden[end - len(rows[text.row].answer) : end]


def _go_on_from(
    contexts: Mapping[tuple[int, tuple[int, ...]], Piece],
    texts: Sequence[_Text],
    pieces: Sequence[Piece],
    forward: PackedForward,
) -> None:
    """A context that ends inside a block: every text that goes on from it gets a copy of that."""
    targets: dict[int, list[int]] = {}
    for text, piece in zip(texts, pieces, strict=True):
        if piece.start % forward.block_size:
            source = contexts[text.slot, text.context].blocks[-1]
            targets.setdefault(source, []).append(piece.blocks[piece.start // forward.block_size])
    for source, copies in targets.items():
        forward.copy_block(source, copies)


def _passes(
    pieces: Sequence[Piece], forward: PackedForward, blocks: int
) -> Iterator[Sequence[Piece]]:
    """Runs of pieces that share a pass; their own blocks fit ``blocks``."""
    start = tokens = used = 0
    for i, piece in enumerate(pieces):
        added = forward.blocks_added(piece)
        is_full = tokens + len(piece.tokens) > forward.max_tokens or used + added > blocks
        is_other = piece.slot != pieces[i - 1].slot and forward.on_cpu and tokens >= FULL_PASS
        if i > start and (is_full or is_other):
            yield pieces[start:i]
            start, tokens, used = i, 0, 0
        tokens, used = tokens + len(piece.tokens), used + added
    if pieces:
        yield pieces[start:]
