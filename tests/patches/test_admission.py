from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from liveprune.patches import admission
from liveprune.patches.admission import Admission, admitting, carrying, serving
from liveprune.patches.live_types import EXTRA_ARG, Served
from tests.patches.front_end import E2, E4, FULL, NAME, FakeDirectory, patch_vllm


@pytest.fixture
def directory() -> Iterator[FakeDirectory]:
    made = FakeDirectory()
    admission.install(made)
    yield made
    admission.install(None)


class TestAdmission:
    def test_a_name_is_resolved_and_pinned_once(self) -> None:
        directory = FakeDirectory(alias=E4)
        request = Admission(directory)
        assert request.admit(NAME) is E4
        assert directory.held == Counter({E4.name: 1})
        directory.alias = E2
        assert request.admit(NAME) is E4
        assert request.admit(E4.name) is E4
        assert directory.pins == Counter({E4.name: 1})

    def test_a_second_name_is_refused(self) -> None:
        directory = FakeDirectory()
        request = Admission(directory)
        request.admit(NAME)
        assert request.admit(E2.name) is None
        assert request.admit("other") is None
        assert request.served is E4
        assert directory.pins == Counter({E4.name: 1})

    def test_an_unknown_name_pins_nothing(self) -> None:
        directory = FakeDirectory()
        request = Admission(directory)
        assert request.admit("other") is None
        assert request.served is None
        request.release()
        assert directory.pins.total() == directory.unpins.total() == 0

    def test_the_last_release_unpins(self) -> None:
        directory = FakeDirectory()
        request = Admission(directory)
        request.admit(NAME)
        request.hold()
        request.release()
        assert not request.ended
        assert directory.unpins.total() == 0
        request.release()
        assert request.ended
        assert directory.unpins == Counter({E4.name: 1})

    def test_a_request_that_has_ended_pins_nothing_more(self) -> None:
        directory = FakeDirectory()
        request = Admission(directory)
        request.release()
        assert request.admit(NAME) is None
        assert directory.pins.total() == 0


class TestContexts:
    def test_tasks_and_generators_share_the_admission(self, directory: FakeDirectory) -> None:
        async def handler() -> Served | None:
            return opened().admit(NAME)

        async def stream() -> AsyncIterator[Served | None]:
            yield opened().served

        def opened() -> Admission:
            found = admission._admission.get()
            assert found is not None
            return found

        async def main() -> None:
            with admitting() as request:
                assert await asyncio.create_task(handler()) is E4
                assert request.served is E4
                assert [served async for served in stream()] == [E4]
                assert directory.held == Counter({E4.name: 1})
            assert admission._admission.get() is None

        asyncio.run(main())
        assert directory.unpins == Counter({E4.name: 1})

    def test_requests_side_by_side_do_not_see_each_other(self, directory: FakeDirectory) -> None:
        async def one(name: str) -> Any:
            with admitting() as request:
                request.admit(name)
                await asyncio.sleep(0)
                return carrying(sampling()).extra_args[EXTRA_ARG]["slot"]

        async def main() -> list[Any]:
            return await asyncio.gather(*(one(s.name) for s in (E2, FULL, E4, E2)))

        assert asyncio.run(main()) == [5, 0, 3, 5]
        assert directory.pins == directory.unpins

    @pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, KeyboardInterrupt])
    def test_errors_unpin(self, error: type[BaseException], directory: FakeDirectory) -> None:
        def handle() -> None:
            with admitting() as request:
                request.admit(NAME)
                raise error

        with pytest.raises(error):
            handle()
        assert directory.unpins == Counter({E4.name: 1})
        assert admission._admission.get() is None

    def test_a_request_keeps_the_directory_that_it_began_with(
        self, directory: FakeDirectory
    ) -> None:
        later = FakeDirectory()
        with admitting() as request:
            request.admit(NAME)
            admission.install(later)
        assert directory.unpins == Counter({E4.name: 1})
        assert later.unpins.total() == 0

    def test_requests_of_our_own_need_no_directory_and_no_pin(self) -> None:
        with serving(E2):
            assert carrying(sampling()).extra_args == {EXTRA_ARG: {"slot": 5, "salt": E2.salt}}
            with serving(FULL):
                assert carrying(sampling()).extra_args[EXTRA_ARG] == {"slot": 0, "salt": None}
            assert carrying(sampling()).extra_args[EXTRA_ARG]["slot"] == 5
        assert carrying(sampling()).extra_args is None


def sampling(**extra: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=3, extra_args=extra or None)


class TestCarrying:
    def test_shared_parameters_are_copied_and_never_changed(self) -> None:
        shared = sampling(own=1, **{EXTRA_ARG: {"slot": 1, "salt": "forged"}})
        before = copy.deepcopy(shared)
        with serving(E4):
            carried = carrying(shared)
        assert shared == before
        assert carried.extra_args == {"own": 1, EXTRA_ARG: {"slot": 3, "salt": E4.salt}}
        carried.extra_args = shared.extra_args
        assert carried == before

    @pytest.mark.parametrize("forged", [{"slot": 1, "salt": ""}, 0, None, "x"])
    def test_forged_variants_are_removed_where_there_is_none(self, forged: Any) -> None:
        assert carrying(sampling(own=1, **{EXTRA_ARG: forged})).extra_args == {"own": 1}
        assert carrying(sampling(**{EXTRA_ARG: forged})).extra_args is None

    def test_where_nothing_changes_the_object_is_the_same(self) -> None:
        for params in (sampling(), sampling(own=1)):
            assert carrying(params) is params

    def test_pooling_runs_on_the_base_only(self) -> None:
        from vllm import PoolingParams
        from vllm.entrypoints.serve import create_error_response
        from vllm.exceptions import VLLMValidationError

        params = PoolingParams()
        assert carrying(params) is params
        with serving(FULL):
            assert carrying(params) is params
        with serving(E4), pytest.raises(VLLMValidationError, match="generates text only") as error:
            carrying(params)
        assert create_error_response(error.value).error.code == 400

    def test_what_was_not_admitted_does_not_reach_the_engine(
        self, directory: FakeDirectory
    ) -> None:
        from vllm.exceptions import VLLMValidationError

        with pytest.raises(VLLMValidationError, match="chose no variant"):
            carrying(sampling())
        with admitting() as request, pytest.raises(VLLMValidationError, match="chose no variant"):
            carrying(sampling())
        with admitting() as request:
            request.admit(NAME)
            request.release()
            with pytest.raises(VLLMValidationError, match="`tiny:e4` has ended"):
                carrying(sampling())
            request.hold()


ADAPTER = "adapter"


@pytest.fixture
def base_serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own classes, with an adapter, over an engine that is not there."""
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.lora.request import LoRARequest

    patch_vllm(monkeypatch)
    engine = SimpleNamespace(model_config=None, renderer=None, input_processor=None)
    paths = [BaseModelPath(name=NAME, model_path="/models/tiny")]
    models = OpenAIServingModels(engine, paths)
    models.lora_requests[ADAPTER] = LoRARequest(ADAPTER, 1, "/adapters/1")
    return BaseServing(models, None)


def asks(model: str | None, **fields: Any) -> Any:
    return SimpleNamespace(model=model, **fields)


class TestServing:
    def test_the_check_admits(self, base_serving: Any, directory: FakeDirectory) -> None:
        for model, served in ((NAME, E4), (None, E4), ("", E4), (E2.name, E2), (FULL.name, FULL)):
            with admitting() as request:
                assert asyncio.run(base_serving._check_model(asks(model))) is None
                assert base_serving._maybe_get_adapters(asks(model)) is None
                assert request.served is served
                assert not request.answered
                assert base_serving.models.model_name() == served.name
                assert request.answered
        assert directory.pins == directory.unpins
        assert directory.pins.total() == 5

    def test_unknown_names_are_vllms_own_error(
        self, base_serving: Any, directory: FakeDirectory
    ) -> None:
        from vllm.exceptions import VLLMNotFoundError

        with admitting():
            error = asyncio.run(base_serving._check_model(asks("tiny:e3"))).error
            assert error.message == "The model `tiny:e3` does not exist. Valid aliases: tiny."
            assert (error.type, error.code, error.param) == ("NotFoundError", 404, "model")
            with pytest.raises(VLLMNotFoundError, match="`tiny:e3` does not exist"):
                base_serving._maybe_get_adapters(asks("tiny:e3"))

    @pytest.mark.parametrize("name", [ADAPTER, E4.name])
    def test_an_adapter_runs_on_the_base(
        self, name: str, base_serving: Any, directory: FakeDirectory
    ) -> None:
        """vLLM prefers adapters, even one that is named like a variant."""
        loaded = base_serving.models.lora_requests
        loaded[name] = loaded.pop(ADAPTER)
        loaded[name].lora_name = name
        with admitting() as request:
            assert asyncio.run(base_serving._check_model(asks(name))) is None
            adapter = base_serving._maybe_get_adapters(asks(name))
            assert adapter is loaded[name]
            assert base_serving.models.model_name(adapter) == name
            assert request.served is FULL
            assert not request.answered
            assert directory.held == Counter({FULL.name: 1})
        assert directory.unpins == Counter({FULL.name: 1})

    def test_an_adapter_needs_a_live_base(
        self, base_serving: Any, directory: FakeDirectory
    ) -> None:
        from vllm.exceptions import VLLMValidationError

        del directory.live[FULL.name]
        with (
            admitting(),
            pytest.raises(VLLMValidationError, match="`tiny:full`, which is not live"),
        ):
            base_serving._maybe_get_adapters(asks(ADAPTER))

    def test_an_adapter_that_vllm_adds_by_itself_leaves_the_variant(
        self, base_serving: Any, directory: FakeDirectory
    ) -> None:
        """Default adapters of a modality, named like the modality."""
        models = base_serving.models
        models.lora_requests["image"] = models.lora_requests.pop(ADAPTER)
        models.lora_requests["image"].lora_name = "image"
        messages = [{"content": [{"type": "image_url"}]}]
        with admitting() as request:
            asyncio.run(base_serving._check_model(asks(NAME)))
            found = base_serving._maybe_get_adapters(asks(NAME, messages=messages), True)  # noqa: FBT003 - vLLM's
            assert found.lora_name == "image"
            assert request.served is E4

    def test_without_a_directory_nothing_changes(self, base_serving: Any) -> None:
        with admitting() as request:
            assert base_serving._is_model_supported(NAME)
            assert not base_serving._is_model_supported(FULL.name)
            assert base_serving._maybe_get_adapters(asks(ADAPTER)).lora_name == ADAPTER
            assert base_serving.models.model_name() == NAME
            assert request.served is None
            assert not request.answered
