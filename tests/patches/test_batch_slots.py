from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from liveprune.patches import batch_slots
from liveprune.patches.batch_slots import BatchSlots
from liveprune.patches.compat import check_seam


def slots_of(batch: BatchSlots, tokens: int) -> list[int]:
    found: list[int] = batch.view(tokens).tolist()
    return found


def make(default: int = 0) -> BatchSlots:
    return BatchSlots(12, torch.device("cpu"), static=False, default=default)


def sampling(slot: int | None = None, **other: Any) -> Any:
    """As a request carries it."""
    extra = dict(other)
    if slot is not None:
        extra["liveprune"] = {"slot": slot, "salt": "some"}
    return SimpleNamespace(extra_args=extra or None)


@pytest.mark.parametrize(
    "seam",
    [
        batch_slots.PREPARE_INPUTS,
        batch_slots.DUMMY_RUN,
        batch_slots.V2_ADD_REQUESTS,
        batch_slots.V2_PREPARE_INPUTS,
        batch_slots.V2_DUMMY_RUN,
    ],
    ids=str,
)
def test_seams_are_as_in_this_vllm(seam: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's imports warn
        check_seam(seam)


def test_each_request_once_for_each_of_its_tokens() -> None:
    batch = make()
    batch.fill([2, 0, 2, 1], np.array([1, 3, 2, 1], dtype=np.int32))
    assert slots_of(batch, 7) == [2, 0, 0, 0, 2, 2, 1]
    assert batch.tokens == 7
    assert batch.present == batch.present_in(7) == (0, 1, 2)


def test_everything_is_the_default_before_the_first_batch() -> None:
    batch = make(default=3)
    assert slots_of(batch, 12) == [3] * 12
    assert (batch.tokens, batch.present, batch.present_in(12)) == (0, (3,), (3,))


def test_padding_after_a_shorter_batch_is_the_default() -> None:
    batch = make(default=3)
    batch.fill([1, 2], np.array([5, 4]))
    batch.fill([1], np.array([2]))
    assert slots_of(batch, 12) == [1] * 2 + [3] * 10
    assert batch.present_in(2) == (1,)
    assert batch.present_in(4) == (1, 3)
    batch.fill([2], np.array([6]))
    assert slots_of(batch, 12) == [2] * 6 + [3] * 6


def test_requests_that_name_no_slot_take_the_default() -> None:
    batch = make(default=3)
    batch.fill([None, 1], np.array([2, 1]))
    assert slots_of(batch, 3) == [3, 3, 1]
    assert batch.present == (1, 3)


def test_a_new_default_leaves_nothing_of_the_old_one() -> None:
    batch = make(default=3)
    batch.fill([1], np.array([2]))
    batch.default = 4
    assert batch.default == 4
    assert slots_of(batch, 12) == [4] * 12
    assert batch.present_in(12) == (4,)


def test_the_address_never_changes() -> None:
    batch = make()
    before = batch.slots.data_ptr()
    batch.fill([1], np.array([12]))
    batch.default = 2
    assert batch.slots.data_ptr() == batch.view(5).data_ptr() == before


class V1Runner:
    """What the wrapper sees of vLLM's runner."""

    def __init__(self, batch: BatchSlots | None) -> None:
        self.requests = {
            "a": SimpleNamespace(sampling_params=sampling(2)),
            "b": SimpleNamespace(sampling_params=sampling(other=1)),
            "c": SimpleNamespace(sampling_params=sampling()),
            "d": SimpleNamespace(sampling_params=sampling(0)),
        }
        self.input_batch = SimpleNamespace(req_ids=["d", "a", "c", "b"])
        self.seen: list[Any] = []
        if batch is not None:
            self.liveprune_batch = batch

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> str:
        self.seen.append((scheduler_output, num_scheduled_tokens))
        return "prepared"

    def _dummy_run(self, num_tokens: int, *, is_profile: bool = False) -> str:
        batch: BatchSlots | None = getattr(self, "liveprune_batch", None)
        self.seen.append((num_tokens, is_profile, batch and batch.present_in(num_tokens)))
        return "ran"


def test_v1_fills_in_batch_order() -> None:
    batch = make(default=1)
    runner = V1Runner(batch)
    prepare = batch_slots.wrap_prepare_inputs(V1Runner._prepare_inputs)
    counts = np.array([1, 2, 3, 1], dtype=np.int32)
    assert prepare(runner, "output", counts) == "prepared"
    assert slots_of(batch, 8) == [0, 2, 2, 1, 1, 1, 1, 1]
    assert batch.tokens == 7
    assert runner.seen == [("output", counts)]


def test_v1_dummy_runs_see_the_default_only() -> None:
    batch = make(default=1)
    batch.fill([2], np.array([9]))
    runner = V1Runner(batch)
    run = batch_slots.wrap_dummy_run(V1Runner._dummy_run)
    assert run(runner, 4, is_profile=True) == "ran"
    assert runner.seen == [(4, True, (1,))]
    assert slots_of(batch, 12) == [1] * 12


def test_without_live_variants_the_wrappers_only_call_the_original() -> None:
    runner = V1Runner(None)
    counts = np.array([1])
    prepare = batch_slots.wrap_prepare_inputs(V1Runner._prepare_inputs)
    assert prepare(runner, "output", counts) == "prepared"
    assert batch_slots.wrap_dummy_run(V1Runner._dummy_run)(runner, 4) == "ran"
    assert runner.seen == [("output", counts), (4, False, None)]
    v2 = V2Runner(None)
    add = batch_slots.wrap_v2_add_requests(V2Runner.add_requests)
    add(v2, v2.step({"a": sampling(1)}, {}))
    made = batch_slots.wrap_v2_prepare_inputs(V2Runner.prepare_inputs)(v2, {"a": 2}, None, None, 0)
    assert made.num_reqs == 1


class V2Runner:
    """Requests' states under indices that are used again, batches in an order of their own."""

    def __init__(self, batch: BatchSlots | None) -> None:
        self.req_states = SimpleNamespace(req_id_to_index={})
        self.liveprune_batch = batch

    @staticmethod
    def step(new: dict[str, Any], tokens: dict[str, int]) -> Any:
        requests = [SimpleNamespace(req_id=r, sampling_params=s) for r, s in new.items()]
        return SimpleNamespace(scheduled_new_reqs=requests, num_scheduled_tokens=tokens)

    def add_requests(self, scheduler_output: Any) -> None:
        indices = self.req_states.req_id_to_index
        for new in scheduler_output.scheduled_new_reqs:
            indices.pop(new.req_id, None)
            indices[new.req_id] = next(i for i in range(8) if i not in indices.values())

    def prepare_inputs(
        self, tokens: dict[str, int], batch_req_state: Any, batch_desc: Any, loras: int
    ) -> Any:
        ids = sorted(tokens, key=lambda request: tokens[request])  # decodes first
        indices = [self.req_states.req_id_to_index[request] for request in ids]
        starts = np.zeros(8, dtype=np.int32)  # padded, as for a full CUDA graph
        np.cumsum([tokens[request] for request in ids], out=starts[1 : len(ids) + 1])
        starts[len(ids) + 1 :] = starts[len(ids)]
        return SimpleNamespace(
            num_reqs=len(ids),
            idx_mapping_np=np.array(indices, dtype=np.intp),
            query_start_loc_np=starts,
        )


def test_v2_notes_slots_when_requests_come_and_fills_from_the_batch() -> None:
    batch = make(default=1)
    runner = V2Runner(batch)
    add = batch_slots.wrap_v2_add_requests(V2Runner.add_requests)
    prepare = batch_slots.wrap_v2_prepare_inputs(V2Runner.prepare_inputs)
    add(runner, runner.step({"a": sampling(2), "b": sampling(0), "c": sampling()}, {}))
    prepare(runner, {"a": 4, "b": 1, "c": 2}, None, None, 0)
    assert slots_of(batch, 9) == [0, 1, 1, 2, 2, 2, 2, 1, 1]
    assert batch.tokens == 7
    prepare(runner, {"c": 1, "a": 2}, None, None, 0)
    assert slots_of(batch, 4) == [1, 2, 2, 1]


def test_v2_an_index_that_is_used_again_has_the_new_requests_slot() -> None:
    """``a`` ends, ``d`` gets its index; ``b`` comes back after a preemption, under another."""
    batch = make()
    runner = V2Runner(batch)
    add = batch_slots.wrap_v2_add_requests(V2Runner.add_requests)
    prepare = batch_slots.wrap_v2_prepare_inputs(V2Runner.prepare_inputs)
    add(runner, runner.step({"a": sampling(2), "b": sampling(3)}, {}))
    indices = runner.req_states.req_id_to_index
    freed = indices.pop("a")
    del indices["b"]
    add(runner, runner.step({"d": sampling(), "b": sampling(3)}, {}))
    assert indices["d"] == freed
    prepare(runner, {"d": 1, "b": 2}, None, None, 0)
    assert slots_of(batch, 3) == [0, 3, 3]
