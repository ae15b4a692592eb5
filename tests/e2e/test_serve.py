"""``liveprune serve`` as a user meets it: a real server process, the openai client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from transformers import AutoTokenizer

from liveprune.pruning.checkpoint.apply import apply_plan
from liveprune.pruning.plan import LayerPlan, Lineage, Plan
from liveprune.server.served_model import ServedModel
from tests.reference import greedy, pruned_model

pytestmark = pytest.mark.engine
KEY = "a-key-for-tests"


def plan() -> Plan:
    """Three layers, three forms: odd count, count below top-k, router map."""
    rng = np.random.default_rng(0)
    mixing = np.eye(8, dtype=np.float32)[:4] + 0.1 * rng.random((4, 8), dtype=np.float32)
    layers = (
        LayerPlan(0, 8, 2, kept=(0, 2, 3, 6, 7)),
        LayerPlan(1, 8, 1, kept=(4,)),
        LayerPlan(2, 8, 2, merge=mixing, router_map=mixing),
    )
    return Plan("mixtral", 3, layers, Lineage("hand"), base_model="org/tiny")


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Path]) -> Path:
    # The CPU attention kernels want a head size that is a multiple of 32.
    return tiny_model("mixtral", num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    folder = tmp_path_factory.mktemp("serve")
    apply_plan(base, plan(), folder / "model")
    flags = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--api-key", KEY]
    flags += ["--gpu-memory-utilization", "0.2"]
    with ServedModel(folder / "model", name="tiny", log=folder / "log", flags=flags) as running:
        running.wait_ready()
        yield running
        assert running.stop() == 0
        log = running.log.read_text()
        assert "liveprune: serving" in log
        assert "top-1 to 2" in log
        assert "liveprune: server stopped" in log


@pytest.fixture
def client(server: ServedModel) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY) as made:
        yield made


def test_models_say_what_is_served(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == "tiny"
    details = card.to_dict()["liveprune"]
    assert details["plan"] == plan().digest
    assert details["experts"] == {"min": 1, "max": 5}
    assert details["top_k"] == {"min": 1, "max": 2}


def test_answers_are_those_of_the_reference(client: openai.OpenAI, base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = pruned_model(base, plan())
    for prompt in ("abc", "The quick brown fox", "1 + 2 = "):
        ids = tokenizer(prompt).input_ids
        answer = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.choices[0].text == tokenizer.decode(greedy(model, ids, 8))


def test_chat_and_streaming_work(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=6,
        temperature=0,  # type: ignore[arg-type]
    )
    chunks = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=6,
        temperature=0,
        stream=True,  # type: ignore[call-overload]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content


def test_errors_are_in_openai_shape(client: openai.OpenAI, server: ServedModel) -> None:
    with pytest.raises(openai.NotFoundError, match="`other` does not exist") as unknown:
        client.completions.create(model="other", prompt="a")
    assert unknown.value.type == "NotFoundError"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a", max_tokens=-1)
    with (
        openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.models.list()
    assert refused.value.body == {
        "message": "Unauthorized",
        "type": "AuthenticationError",
        "param": None,
        "code": 401,
    }


def test_health_and_metrics_are_vllms_own(server: ServedModel) -> None:
    assert httpx.get(f"{server.base_url}/health").status_code == 200
    metrics = httpx.get(f"{server.base_url}/metrics").text
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"}' in metrics
    assert server.resident_bytes() > 100e6
