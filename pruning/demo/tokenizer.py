"""The demo model's tokenizer: byte-level BPE whose digits and brackets are tokens of their own."""

from __future__ import annotations

import random
from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from liveprune.pruning.demo.tasks import draw, task_names

VOCABULARY = 576
MAX_LENGTH = 256
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

# One question, one answer: the last user message, in exactly the form of the rows' prompts, so
# that chat and plain completion requests give the model the same tokens.
CHAT_TEMPLATE = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | list | last -%}"
    "{{- bos_token + (asked['content'] | trim) + '\\n' -}}"
)


def train_tokenizer(seed: int, rows_per_task: int = 4000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the corpus split; a prompt and its answer never share a token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # The tasks work digit by digit and bracket by bracket; merged ones would be words
            # to learn by heart.
            pre_tokenizers.Split(Regex(r"[0-9+()\[\]{}<>\n]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer.{seed}")
    texts = (
        row.prompt + row.answer
        for task in task_names()
        for row in islice(draw(task, "corpus", rng), rows_per_task)
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
