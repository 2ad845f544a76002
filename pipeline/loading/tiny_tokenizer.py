"""A small tokenizer in the manner of Qwen's, trained on the text below: byte-level BPE, tags, chat template."""
# pyright: basic

from __future__ import annotations

import json
from pathlib import Path

_NUM_TRAINED = 507
_CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TAGS = ("<think>", "</think>")  # as in Qwen: whole tokens, which decoding shows

END_OF_TEXT, START_OF_TURN, END_OF_TURN, OPEN_THINK, CLOSE_THINK = range(_NUM_TRAINED, _NUM_TRAINED + 5)
VOCABULARY_SIZE = CLOSE_THINK + 1

# Qwen2's pre-tokenizer: transformers, models/qwen2/tokenization_qwen2.py.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Turns as Qwen writes them. Reasoning of earlier turns is dropped; the last turn is opened with the tag, or with an
# empty reasoning where `enable_thinking` is false.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- else %}
{{- '<think>\\n' }}
{%- endif %}
{%- endif %}
"""

_TEXT = """\
The night train leaves the station at ten and arrives in the morning. Most of the travellers sleep, a few of them read,
and one of them writes letters to everybody she knows. When the sun rises over the fields, the conductor walks through
the train and brings coffee, tea and bread. There is time to look out of the window, to think about the day that comes,
and to ask the questions for which there was no time before.
What is a question? It is a sentence that asks for an answer. Who is there? Where are you going? When will it rain? Why
is the sky blue? How many people live in this town? Which of these two numbers is larger? Can you tell me the name of
the capital of that country? Write a short story about the sea. Explain in one sentence what a river is. Give three
reasons for your answer. Translate the following text. Summarise the story in a few words.
Let me think about this. First, I should understand what the user wants. The user asks about the weather, so the answer
should say whether it will rain. Then I should check that the answer is right. Wait, that is not what was asked. Let me
look at the question again. The answer follows from the first part and the second part together, so I can write it down
now. Okay, here is the answer.
Water runs down from the mountains to the sea. On its way it turns wheels, fills lakes, feeds fields and carries ships.
In winter it is ice, in summer it is rain, and it is always moving. The people who live beside the river know when it
rises and when it falls; they have written it down for more than three hundred years.
To make bread, take flour, water, salt and a little yeast. Mix them well, wait until the dough has grown, and bake it in
a hot oven for about half an hour. The kitchen will smell of it for the rest of the day. It is better to share the bread
than to keep it, because it is best while it is still warm.
A computer does what it was told and nothing else. It reads a list of instructions, one after the other, and keeps the
results in its memory. If the instructions are wrong, the results are wrong, and it does not know. That is why people
who write programs also write tests, and why they read each other's programs.
def add(first, second):
    # The sum of two numbers.
    return first + second
for number in range(10):
    if number % 2 == 0:
        print(number, add(number, 1))
{"id": "a1", "prompt": "Hello, how are you?", "answer": "I am well, thank you."}
- one, two, three, four, five, six, seven, eight, nine, ten
- January, February, March, April, May, June, July, August, September, October, November, December
1. The first thing to do is to read the question.
2. The second thing is to answer it.
3. The third thing is to read the answer again.
"""


def write_tiny_tokenizer(directory: Path) -> None:
    """Train it and write its three files into `directory`: tokenizer.json, tokenizer_config.json, chat_template.jinja.

    The same bytes every time. Ids: trained pieces first, all 256 bytes among them, then the control tokens and tags.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_NUM_TRAINED, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in _TAGS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
