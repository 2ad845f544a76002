"""Lines as no decent program writes them: a corpus of known evils, and a generator that mutates and mixes them."""

from __future__ import annotations

import json
import random

# Each of these has broken some program that reads JSONL.
CORPUS: list[bytes] = [
    b"{}",
    b"[]",
    b"null",
    b"0",
    b'"prompt"',
    b"{",
    b"}",
    b'{"prompt"}',
    b'{"prompt":}',
    b'{"prompt": "unclosed',
    b'{"prompt": "a"} {"prompt": "b"}',
    b'{"prompt": "a"},',
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": 5}',
    b'{"prompt": null}',
    b'{"prompt": ""}',
    b'{"prompt": ["a"]}',
    b'{"Prompt": "a"}',
    b"{'prompt': 'a'}",
    b'{"prompt": "a", "id": {"deep": 1}}',
    b'{"prompt": "a", "id": 1e400}',
    b'{"prompt": "a", "id": NaN}',
    b'{"prompt": "a", "id": -Infinity}',
    b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "id": 0.' + b"1" * 5000 + b"}",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\udc00\\ud800"}',
    b'{"prompt": "\\ud83d\\ude00"}',
    b'{"prompt": "\\u0000"}',
    b'{"prompt": "\x00"}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\xc0\xaf"}',
    b'{"prompt": "\xf5\x80\x80\x80"}',
    b"\xef\xbb\xbf" + b'{"prompt": "a"}',
    b"\xff\xfe{\x00}\x00",
    b"\x00" * 64,
    b'{"prompt": "tab\there"}',
    b'{"prompt": "\\x41"}',
    b'{"prompt": "\xe2\x80\xa8 \xe2\x80\xa9 \xc2\x85 \x0b \x0c"}',
    b'{"prompt": "a"}\r',
    b'\r{"prompt": "a"}',
    b'{"prompt": "a"}\x00',
    b"[" * 100_000,
    b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"a":' * 3000 + b"1" + b"}" * 3000,
    b'{"prompt": "' + b"a" * 200_000 + b'"}',
    b'{"prompt": "{{7*7}} ${x} %s {0} <|im_end|> <think> \\u202e"}',
    b'{"messages": []}',
    b'{"messages": "hello"}',
    b'{"messages": [{"role": "user"}]}',
    b'{"messages": [{"role": "root", "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "prompt": "b"}',
    b'{"messages": [null, 5, "x"]}',
    b'{"prompt": "a", "generation": 5}',
    b'{"prompt": "a", "generation": {"max_new_tokens": -1}}',
    b'{"prompt": "a", "generation": {"max_new_tokens": 1e99}}',
    b'{"prompt": "a", "generation": {"temperature": "hot"}}',
    b'{"prompt": "a", "generation": {"__class__": "x"}}',
    b'{"__proto__": {"prompt": "a"}, "": "", "\\u0000": 1}',
]
# What is put into a line where it hurts.
PIECES = [
    b"\x00",
    b"\xff",
    b"\\",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\u",
    b"\\ud8",
    b"\xed\xa0\x80",
    b"1e999",
]
PIECES += [b"NaN", b"\r", b"\x1f", b"null", b"\xef\xbb\xbf", b"\\ud800"]


def good_line(number: int) -> bytes:
    return json.dumps({"id": number, "prompt": f"line {number} says äöü 😀"}, ensure_ascii=False).encode()


def mutated(chance: random.Random) -> bytes:
    """One line, without a line end in it and not blank: of the corpus or good, with up to eight changes."""
    line = bytearray(chance.choice(CORPUS) if chance.random() < 0.4 else good_line(chance.randrange(10**6)))
    if len(line) > 2000 and chance.random() < 0.99:  # long ones are slow to make, and few are enough
        del line[chance.randrange(1, 2000) :]
    for _ in range(chance.randrange(9)):
        place = chance.randrange(len(line) + 1)
        match chance.randrange(5):
            case 0:
                line[place:place] = chance.choice(PIECES)
            case 1:
                del line[place : place + chance.randrange(1, 9)]
            case 2:
                line[place : place + 1] = bytes([chance.randrange(256)])
            case 3:
                line[place:place] = line[: chance.randrange(64)]
            case _:
                del line[place:]
    data = bytes(line).replace(b"\n", b" ")
    return data if data.strip(b" \t\r\v\f") else b"x"
