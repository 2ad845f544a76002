"""Small tokenizers of the kinds in the field, trained in milliseconds, with chat templates like their families'."""

# ruff: noqa: RUF001  DeepSeek writes its tokens with full-width bars

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "hello world, the quick brown fox x jumps over the lazy dog again and again.",
    "user assistant system model think tool call end of turn im start header id INST SYS [ ] < > | / _ \n\n",
    "what is the capital of france? the capital of france is paris. 0123456789 ABC def ghi",
    "<h1>html is text</h1> a<b and b>c; naïve café, Ünïcode; 'quotes' \"double\" {braces} \\ % ^ & * ( ) = + - ~ `",
]

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

QWEN3 = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

QWEN3_THINKING = (
    QWEN3.split("    {%- if enable_thinking", maxsplit=1)[0].replace(
        "'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"
    )
    + "{%- endif %}"
)

# Switched by a word in the system message, as in SmolLM3: the frame depends on the content.
SMOLLM3 = """{%- set quiet = '/no_think' in messages[0].content %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}
{%- if quiet %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}"""

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

LLAMA2 = """{%- if messages[0]['role'] == 'system' %}
    {%- set turns = messages[1:] %}{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{%- else %}{%- set turns = messages %}{%- set system = '' %}{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set content = system + message['content'] if loop.first else message['content'] %}
    {%- if message['role'] == 'user' %}{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}{{- ' ' + content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

PHI3 = """{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}{{- '<|assistant|>\\n' }}"""

# Drops the system message without a word, as some older templates do.
DEEPSEEK = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}{%- endif %}
    {%- if message['role'] == 'assistant' %}
        {{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"""

T5 = """{%- for message in messages %}{{- message['role'] + ': ' + message['content'] + '</s>' }}{%- endfor %}
{{- '<extra_id_0>' }}"""

BERT = "{%- for message in messages %}{{- '[CLS] ' + message['content'] + ' [SEP]' }}{%- endfor %}{{- '[MASK]' }}"


def _special(*texts: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=flags.get("normalized", False)) for text in texts]


def _plain(*texts: str, normalized: bool = False) -> list[AddedToken]:
    return [AddedToken(text, special=False, normalized=normalized) for text in texts]


def _byte_level(normalizer: object = None, *, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece_bpe(normalizer: object, in_vocabulary: list[str], unknown: str = "<unk>") -> Tokenizer:
    """BPE over whole text with byte fallback; some control tokens lie in the vocabulary, and merges spell them."""
    tokenizer = Tokenizer(models.BPE(unk_token=unknown, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizer
    words = [text for text in in_vocabulary for _ in range(20)]  # often enough that merges build the whole token
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[unknown, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, *words], trainer)
    # The trainer makes added tokens of the bytes; in the field they are plain vocabulary.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:1]
    return Tokenizer.from_str(json.dumps(data))


def _wrap(tokenizer: Tokenizer, template: str | None, **special: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.chat_template = template
    return wrapped


def qwen() -> PreTrainedTokenizerFast:
    tokenizer = _byte_level(normalizers.NFC())
    tokenizer.add_tokens(_special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.add_tokens(_plain("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"))
    tokenizer.add_tokens(_plain("<think>", "</think>"))
    return _wrap(tokenizer, QWEN3, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def qwen_thinking() -> PreTrainedTokenizerFast:
    tokenizer = qwen()
    tokenizer.chat_template = QWEN3_THINKING
    return tokenizer


def smollm3() -> PreTrainedTokenizerFast:
    tokenizer = qwen()
    tokenizer.chat_template = SMOLLM3
    return tokenizer


def smollm2() -> PreTrainedTokenizerFast:
    tokenizer = _byte_level()
    tokenizer.add_tokens(_special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"))
    tokenizer.add_tokens(_plain("<|im_start"))  # begins as another does, that the template's frame has
    return _wrap(tokenizer, CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>")


def llama3() -> PreTrainedTokenizerFast:
    tokenizer = _byte_level(ignore_merges=True)
    tokenizer.add_tokens(_special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"))
    tokenizer.add_tokens(_special("<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_0|>"))
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    return _wrap(tokenizer, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def llama2() -> PreTrainedTokenizerFast:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = _sentencepiece_bpe(normalizer, ["<s>", "</s>"])
    tokenizer.add_tokens(_special("<s>", "</s>"))
    tokenizer.add_tokens(_plain("<tool>", normalized=True))
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return _wrap(tokenizer, LLAMA2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def mistral() -> PreTrainedTokenizerFast:
    tokenizer = _sentencepiece_bpe(normalizers.Replace(" ", "▁"), ["[INST]", "[/INST]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_tokens(_special("<s>", "</s>", "[INST]", "[/INST]", "[THINK]", "[/THINK]"))
    return _wrap(tokenizer, LLAMA2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma() -> PreTrainedTokenizerFast:
    controls = ["<start_of_turn>", "<end_of_turn>", "<h1>", "</h1>"]
    tokenizer = _sentencepiece_bpe(normalizers.Replace(" ", "▁"), controls)
    tokenizer.add_tokens(_special("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"))
    tokenizer.add_tokens(_plain("<h1>", "</h1>", "<unused0>", "\n\n", "\n\n\n"))
    return _wrap(tokenizer, GEMMA, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def phi3() -> PreTrainedTokenizerFast:
    """Flags that reach beyond the token itself: white space beside it is eaten, or its neighbours decide."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = _sentencepiece_bpe(normalizer, [])
    for text in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"):
        tokenizer.add_tokens([AddedToken(text, special=True, rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<mask>", special=True, lstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<sep>", special=False, single_word=True, normalized=False)])
    return _wrap(tokenizer, PHI3, bos_token="<|endoftext|>", eos_token="<|end|>", unk_token="<unk>")


def t5() -> PreTrainedTokenizerFast:
    """Unigram under NFKC, its control tokens in the vocabulary with the best scores there are."""
    controls = ["<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>"]
    letters = sorted({*"".join(CORPUS).replace(" ", ""), "▁"})
    pieces = [(text, 0.0) for text in controls] + [(letter, -8.0) for letter in letters]
    pieces += [(f"▁{word}", -6.0) for word in ("hello", "world", "the", "capital", "of", "france")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_tokens(_special("<unk>", "<s>", "</s>"))
    tokenizer.add_tokens(_special("<extra_id_0>", "<extra_id_1>", normalized=True))
    eos = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", eos)])
    return _wrap(tokenizer, T5, eos_token="</s>", unk_token="<unk>")


def nfkc() -> PreTrainedTokenizerFast:
    """Normalized control tokens under NFKC and lower case: other spellings of a token are that token too."""
    tokenizer = _byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
    tokenizer.add_tokens(_special("<|im_start|>", "<|im_end|>", normalized=True))
    tokenizer.add_tokens(_plain("<think>", "</think>", normalized=True))
    return _wrap(tokenizer, CHATML, eos_token="<|im_end|>")


def bert() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(_plain("[user]", normalized=True))
    ids = [(text, tokenizer.token_to_id(text)) for text in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return _wrap(tokenizer, BERT, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


def word_level() -> PreTrainedTokenizerFast:
    """Plain words between white space: without its added tokens the vocabulary still knows them."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer, BERT, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def deepseek() -> PreTrainedTokenizerFast:
    tokenizer = _byte_level()
    tokenizer.add_tokens(_special("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"))
    tokenizer.add_tokens(_plain("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", normalized=True))
    return _wrap(tokenizer, DEEPSEEK, bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>")


def gpt2() -> PreTrainedTokenizerFast:
    """No chat template, one control token."""
    tokenizer = _byte_level()
    tokenizer.add_tokens(_special("<|endoftext|>"))
    text = "<|endoftext|>"
    return _wrap(tokenizer, None, bos_token=text, eos_token=text, unk_token=text)


_BUILDERS: tuple[Callable[[], PreTrainedTokenizerFast], ...] = (
    qwen,
    qwen_thinking,
    smollm3,
    smollm2,
    llama3,
    llama2,
    mistral,
    gemma,
    phi3,
    t5,
    nfkc,
    bert,
    word_level,
    deepseek,
    gpt2,
)
FAMILIES = tuple(builder.__name__ for builder in _BUILDERS)


EXTRA_FAMILIES: dict[str, PreTrainedTokenizerFast] = {}  # a test that brings a tokenizer of its own names it here


@cache
def _build(name: str) -> PreTrainedTokenizerFast:
    return {builder.__name__: builder for builder in _BUILDERS}[name]()


def family(name: str) -> PreTrainedTokenizerFast:
    return EXTRA_FAMILIES.get(name) or _build(name)
