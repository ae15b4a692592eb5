"""Which slot each token of the running batch belongs to, and how vLLM's runners say so.

``GPUModelRunner`` of both generations (V1, and Model Runner V2 in ``vllm.v1.worker.gpu``) fills it
with every batch it prepares. Runs that nobody's tokens are in (profiling, warm-up) prepare no
batch: they reset it first, so that they route by a slot that is live now and not by what the last
batch left behind, whose rows may be gone. Without ``runner.liveprune_batch`` nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from liveprune.patches.compat import Seam
from liveprune.patches.live_types import BASE_SLOT, COUNT_KEY, EXTRA_ARG

PREPARE_INPUTS = Seam(
    "vllm.v1.worker.gpu_model_runner",
    "GPUModelRunner._prepare_inputs",
    ("self", "scheduler_output", "num_scheduled_tokens"),
)
DUMMY_RUN = Seam(
    "vllm.v1.worker.gpu_model_runner",
    "GPUModelRunner._dummy_run",
    (
        "self",
        "num_tokens",
        "cudagraph_runtime_mode",
        "force_attention",
        "uniform_decode",
        "allow_microbatching",
        "skip_eplb",
        "is_profile",
        "create_mixed_batch",
        "remove_lora",
        "is_graph_capturing",
        "num_active_loras",
        "profile_seq_lens",
        "randomize_inputs",
    ),
)
V2_ADD_REQUESTS = Seam(
    "vllm.v1.worker.gpu.model_runner",
    "GPUModelRunner.add_requests",
    ("self", "scheduler_output"),
)
V2_PREPARE_INPUTS = Seam(
    "vllm.v1.worker.gpu.model_runner",
    "GPUModelRunner.prepare_inputs",
    ("self", "scheduler_output", "batch_req_state", "batch_desc", "num_active_loras"),
)
V2_DUMMY_RUN = Seam(
    "vllm.v1.worker.gpu.model_runner",
    "GPUModelRunner._dummy_run",
    (
        "self",
        "num_tokens",
        "args",
        "skip_attn",
        "uniform_decode",
        "context_len",
        "skip_eplb",
        "is_profile",
        "valid_dummy_state_slots",
        "randomize_inputs",
        "kwargs",
    ),
)


class Carried(NamedTuple):
    """What a request's sampling parameters say about its tokens."""

    slot: int | None
    counted: bool


class BatchSlots:
    """The slot of each token; padding after the last token has the default slot.

    Attributes:
        slots: int64 [max_tokens], at one address for good; always a valid slot everywhere.
        static: CUDA graphs are captured, so the path must not depend on what a batch holds.
        present: slots of the batch's tokens, ascending.
        tokens: tokens of the batch; 0 after a reset.
        before_change: called before the slots become another batch's.
        after_fill: called where some are counted, with int64 and bool [tokens]: slots of the new
            batch, and which of its tokens are counted.
        of_request: V2 only: what each request carries, by the index of its state.
    """

    def __init__(
        self,
        max_tokens: int,
        device: torch.device,
        *,
        static: bool,
        default: int = BASE_SLOT,
    ) -> None:
        self.slots = torch.empty(max_tokens, dtype=torch.int64, device=device)
        self.static = static
        self.of_request: dict[int, Carried] = {}
        self.before_change: Callable[[], None] | None = None
        self.after_fill: Callable[[npt.NDArray[np.int64], npt.NDArray[np.bool_]], None] | None = (
            None
        )
        self._on_host = self.slots.numpy() if self.slots.is_cpu else None
        self.present: tuple[int, ...] = ()
        self._default = default
        self.reset()

    @property
    def default(self) -> int:
        """Slot of padding, of dummy runs and of requests that name none; must be live."""
        return self._default

    @default.setter
    def default(self, slot: int) -> None:
        self._default = slot
        self.reset()

    def reset(self) -> None:
        """Give all tokens the default slot, for a run that fills in none."""
        if self.before_change is not None:
            self.before_change()
        self.slots.fill_(self._default)
        self.tokens = 0
        self.present = (self._default,)
        self._present_with_padding: tuple[int, ...] = self.present

    def fill(
        self,
        slot_per_request: Sequence[int | None],
        tokens_per_request: npt.NDArray[np.integer[Any]],
        counted: Sequence[bool] | None = None,
    ) -> None:
        """Set the slots of a batch: each request's for each of its tokens, in batch order.

        Args:
            slot_per_request: None for a request that names none.
            tokens_per_request: whole numbers, as many.
            counted: as many, whether live statistics count the request; None: none of them.
        """
        if self.before_change is not None:
            self.before_change()
        default = self._default
        slots = [default if slot is None else slot for slot in slot_per_request]
        values = np.repeat(np.array(slots, dtype=np.int64), tokens_per_request)
        tokens = len(values)
        if self.tokens > tokens:  # what the last batch left behind these is padding now
            values = np.pad(values, (0, self.tokens - tokens), constant_values=default)
        if self._on_host is not None:
            self._on_host[: len(values)] = values
        else:
            # A fresh pinned copy each time: with asynchronous scheduling the last one may still be
            # waiting for the device, and PyTorch keeps it until it was read.
            pinned = torch.from_numpy(values).pin_memory()
            self.slots[: len(values)].copy_(pinned, non_blocking=True)
        self.tokens = tokens
        self.present = tuple(sorted(set(slots)))
        self._present_with_padding = tuple(sorted({*slots, default}))
        if self.after_fill is not None and counted is not None and any(counted):
            flags = np.repeat(np.array(counted, dtype=np.bool_), tokens_per_request)
            self.after_fill(values[:tokens], flags)

    def view(self, tokens: int) -> torch.Tensor:
        """Slots of the first ``tokens`` tokens of the forward pass: int64 [tokens]."""
        return self.slots[:tokens]

    def present_in(self, tokens: int) -> tuple[int, ...]:
        """Slots in ``view(tokens)``, ascending; a pass over more tokens than filled is padded."""
        return self.present if tokens <= self.tokens else self._present_with_padding


def wrap_prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """V1: the requests' order is that of the token counts, now and after the call."""

    def _prepare_inputs(
        self: Any, scheduler_output: Any, num_scheduled_tokens: npt.NDArray[np.int32]
    ) -> Any:
        batch: BatchSlots | None = getattr(self, "liveprune_batch", None)
        if batch is not None:
            states = [self.requests[request] for request in self.input_batch.req_ids]
            carried = [_carried(state.sampling_params) for state in states]
            batch.fill(
                [x.slot for x in carried], num_scheduled_tokens, [x.counted for x in carried]
            )
        return original(self, scheduler_output, num_scheduled_tokens)

    return _prepare_inputs


def wrap_dummy_run(original: Callable[..., Any]) -> Callable[..., Any]:
    """V1 and V2: no request's tokens are in this run."""

    def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch: BatchSlots | None = getattr(self, "liveprune_batch", None)
        if batch is not None:
            batch.reset()
        return original(self, *args, **kwargs)

    return _dummy_run


def wrap_v2_add_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """V2 hands the sampling parameters out in arrays and keeps none: note the slots here.

    New requests, and those that come back after a preemption, all pass here; an index that becomes
    another request's is overwritten.
    """

    def add_requests(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        batch: BatchSlots | None = getattr(self, "liveprune_batch", None)
        if batch is None:
            return
        for new in scheduler_output.scheduled_new_reqs:
            index = self.req_states.req_id_to_index[new.req_id]
            batch.of_request[index] = _carried(new.sampling_params)

    return add_requests


def wrap_v2_prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """V2: after the batch is made, before a graph is replayed."""

    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(self, *args, **kwargs)
        batch: BatchSlots | None = getattr(self, "liveprune_batch", None)
        if batch is not None:
            carried = [batch.of_request[index] for index in made.idx_mapping_np.tolist()]
            batch.fill(
                [x.slot for x in carried],
                np.diff(made.query_start_loc_np[: made.num_reqs + 1]),
                [x.counted for x in carried],
            )
        return made

    return prepare_inputs


def _carried(sampling: Any) -> Carried:
    """What a request carries in its sampling parameters."""
    # Not noted per request: for 256 of them that would save 20 microseconds a step.
    own = (sampling.extra_args or {}).get(EXTRA_ARG, {})
    return Carried(own.get("slot"), bool(own.get(COUNT_KEY)))
