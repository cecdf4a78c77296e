"""Conversations: rendered by the template, and of all tokens the assistant's turns alone are labels."""

import json
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_compress.config import DatasetConfig
from moe_compress.data import read_rows
from moe_compress.data.chat import chat_documents
from moe_compress.errors import UserError

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}\n{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The last answer gets a block of reasoning that earlier ones lose, as in Qwen3.
REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think>\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# What asks for an answer opens that block, as in Qwen3-Thinking.
OPENED = REASONING.replace("%}<|assistant|>{%", "%}<|assistant|><think>\n{%")
# Earlier answers also lose the reasoning that is written in them.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Says how many messages there are: no beginning of a conversation looks like the conversation.
COUNTING = "{{ messages|length }}:{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "uno"},
    {"role": "user", "content": "say uno and two"},
    {"role": "assistant", "content": "due"},
]


def make_tokenizer(template):
    """One token a character; the markers are tokens of their own."""
    markers = ["<eos>", *(f"<|{name}|>" for name in ("system", "user", "assistant", "end")), "<think>"]
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(markers + letters)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": markers[1:]})
    tokenizer.chat_template = template
    return tokenizer


def learned(template, conversation=CHAT, **options):
    """The stretches of text that are labels, and the whole text."""
    tokenizer = make_tokenizer(template)
    (document,) = chat_documents([conversation], tokenizer, **options)
    tokens = tokenizer.convert_ids_to_tokens(document.ids.tolist())
    marks = "".join("x" if label else "." for label in document.labelled)
    return ["".join(tokens[m.start() : m.end()]) for m in re.finditer("x+", marks)], "".join(tokens)


def test_answers_and_what_ends_them_are_learned():
    stretches, text = learned(PLAIN)
    assert stretches == ["uno<|end|>\n", "due<|end|>\n"]
    assert text == make_tokenizer(PLAIN).apply_chat_template(CHAT, tokenize=False)


def test_a_template_that_marks_answers_is_believed():
    assert learned(MARKED)[0] == ["uno<|end|>", "due<|end|>"]


def test_a_template_that_shortens_earlier_answers():
    assert learned(REASONING)[0] == ["uno<|end|>\n", "<think>\ndue<|end|>\n"]


def test_a_template_whose_prompt_opens_the_reasoning():
    stretches, text = learned(OPENED)
    assert stretches == ["uno<|end|>\n", "due<|end|>\n"] and text == learned(REASONING)[1]


def test_a_template_that_takes_the_reasoning_out_of_earlier_answers():
    thought = [{**m, "content": f"why</think>{m['content']}"} if m["role"] == "assistant" else m for m in CHAT]
    assert learned(THINKING, thought)[0] == ["uno<|end|>\n", "why</think>due<|end|>\n"]


def test_unmasked_prompts_are_learned_too():
    stretches, text = learned(PLAIN, mask_prompts=False)
    assert stretches == [text]


def test_an_answer_that_opens_the_conversation():
    assert learned(PLAIN, CHAT[2:3])[0] == ["uno<|end|>\n"]


def test_empty_fields_of_a_table_and_parts_of_content():
    table = [{**message, "tool_calls": None} for message in CHAT]
    assert learned(PLAIN, table) == learned(PLAIN)


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (None, CHAT, "no chat template"),
        (COUNTING, CHAT, "rewrites earlier turns.*mask_prompts=false"),
        ("{{ raise_exception('roles must alternate') }}", CHAT, "cannot render a conversation: .*roles must alternate"),
        (PLAIN, [{"from": "human", "value": "x"}], "other than lists of messages with role and content"),
    ],
)
def test_mistakes(template, conversation, message):
    with pytest.raises(UserError, match=message):
        list(chat_documents([conversation], make_tokenizer(template)))


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": n, "messages": CHAT}) + "\n" for n in range(6)))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_conversations(chats, streaming):
    dataset = DatasetConfig(
        name=chats, messages_column="messages", packing="truncate", max_length=500, streaming=streaming
    )
    rows = list(read_rows(dataset, make_tokenizer(PLAIN), seed=0))
    assert len(rows) == 6
    assert all(row["labelled"].sum() == len("uno") + len("due") + 4 for row in rows)
    dataset.packing, dataset.max_length = "pack", 60
    packed = list(read_rows(dataset, make_tokenizer(PLAIN), seed=0))
    assert all(len(row["input_ids"]) == 60 and row["labelled"][1:].any() for row in packed)
    assert 0 not in {int(token) for row in packed for token in row["input_ids"]}  # conversations end by themselves


def test_rows_without_a_label_are_left_out_and_must_not_be_all(chats):
    dataset = DatasetConfig(name=chats, messages_column="messages", packing="pack", max_length=8)
    rows = list(read_rows(dataset, make_tokenizer(PLAIN), seed=0))
    assert 0 < len(rows) < 6 * 68 // 8 and all(row["labelled"][1:].any() for row in rows)
    dataset.packing = "truncate"
    with pytest.raises(UserError, match="all labels are masked.*max_length=8"):
        list(read_rows(dataset, make_tokenizer(PLAIN), seed=0))


def test_columns_are_named(chats):
    with pytest.raises(UserError, match="no column 'chat'; set messages_column to one of: id, messages"):
        list(read_rows(DatasetConfig(name=chats, messages_column="chat"), make_tokenizer(PLAIN), seed=0))
    with pytest.raises(UserError, match="column 'id' holds int, not lists of messages"):
        list(read_rows(DatasetConfig(name=chats, messages_column="id"), make_tokenizer(PLAIN), seed=0))
    with pytest.raises(UserError, match="column 'messages' holds list, not text"):
        list(read_rows(DatasetConfig(name=chats, text_column="messages"), make_tokenizer(PLAIN), seed=0))
    with pytest.raises(UserError, match="stdlib has texts"):
        list(read_rows(DatasetConfig(messages_column="messages"), make_tokenizer(PLAIN), seed=0))
