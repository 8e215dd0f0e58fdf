"""JSON that people really give: arrays, lines, halves, and conversations in every spelling."""

from __future__ import annotations

import json

from nasty import CHATS, HELLO, PAIRS, USER, accepted, chat, lines, parquet, refused, with_30_mb

JSON_FILES = [
    accepted("JSON lines", "d.jsonl", lines(PAIRS), format="jsonl", rows=40, kept=40, records="prompt-completion"),
    accepted("an array", "d.json", json.dumps(PAIRS), format="json", rows=40, kept=40, records="prompt-completion"),
    accepted("an indented array", "d.json", json.dumps(PAIRS, indent=2), format="json", kept=40),
    accepted(
        "columns",
        "d.json",
        json.dumps({k: [p[k] for p in PAIRS] for k in PAIRS[0]}),
        kept=40,
        records="prompt-completion",
    ),
    accepted("a wrapped list", "d.json", json.dumps({"data": PAIRS}), format="json", kept=40),
    accepted("a list wrapped twice", "d.json", json.dumps({"data": {"items": PAIRS}}), kept=40),
    accepted(
        "a wrapped list with a version",
        "d.json",
        json.dumps({"version": "1", "data": PAIRS}),
        kept=40,
        warns="ignores version",
    ),
    accepted("pandas by index", "d.json", json.dumps({str(n): p for n, p in enumerate(PAIRS)}), kept=40),
    accepted(
        "pandas by column",
        "d.json",
        json.dumps({k: {str(n): p[k] for n, p in enumerate(PAIRS)} for k in PAIRS[0]}),
        kept=40,
    ),
    accepted(
        "pandas split",
        "d.json",
        json.dumps({"columns": list(PAIRS[0]), "index": list(range(40)), "data": [list(p.values()) for p in PAIRS]}),
        kept=40,
    ),
    accepted("one object", "d.json", json.dumps(PAIRS[3]), rows=1, kept=1, train=1, validation=0),
    accepted("concatenated objects", "d.json", "".join(json.dumps(p, indent=1) for p in PAIRS), kept=40),
    accepted("objects on one line", "d.jsonl", "".join(map(json.dumps, PAIRS)), kept=40),
    accepted("JSON in a .txt", "d.txt", json.dumps(PAIRS), format="json", kept=40),
    accepted("JSON lines in a .csv", "d.csv", lines(PAIRS), format="jsonl", kept=40),
    accepted("JSON lines in a .json", "d.json", lines(PAIRS), format="jsonl", kept=40),
    accepted("blank lines between objects", "d.jsonl", lines(PAIRS).replace("\n", "\n\n"), rows=40, kept=40),
    accepted("a BOM before JSON lines", "d.jsonl", b"\xef\xbb\xbf" + lines(PAIRS).encode(), kept=40),
    accepted(
        "JSON lines in UTF-16", "d.jsonl", lines(PAIRS).encode("utf-16"), format="jsonl", kept=40, encoding="utf-16"
    ),
    accepted(
        "1 bad line of 120",
        "d.jsonl",
        lines(PAIRS) + "{broken\n" + lines([{**p, "prompt": p["prompt"] + "!"} for p in PAIRS * 2]),
        kept=80,
        rows=121,
    ),
    accepted(
        "a cut last line of 200",
        "d.jsonl",
        lines([{"text": f"Line {n} of the tale."} for n in range(200)]) + '{"text": "Li',
        kept=200,
        dropped={"not JSON": ["d.jsonl:201"]},
    ),
    accepted(
        "huge numbers keep their digits",
        "d.jsonl",
        '{"prompt": "a", "completion": 123456789012345678901234567890}\n{"prompt": "b", "completion": 1.10}\n'
        '{"prompt": "c", "completion": 1e5}\n',
        kept=3,
        writes=[
            {"prompt": "a", "completion": "123456789012345678901234567890"},
            {"prompt": "b", "completion": "1.10"},
            {"prompt": "c", "completion": "1e5"},
        ],
    ),
    accepted(
        "5,000 digits",
        "d.jsonl",
        f'{{"prompt": "a", "completion": {"9" * 5000}}}\n',
        kept=1,
        writes=[{"prompt": "a", "completion": "9" * 5000}],
    ),
    accepted(
        "a NaN cell is empty",
        "d.jsonl",
        lines(PAIRS * 1) + '{"prompt": "x", "completion": NaN}\n',
        "--on-bad-row",
        "skip",
        kept=40,
        dropped={"empty answer": ["d.jsonl:41"]},
    ),
    accepted(
        "a key twice",
        "d.jsonl",
        lines(PAIRS) + '{"prompt": "x", "prompt": "y", "completion": "z"}\n',
        "--on-bad-row",
        "skip",
        kept=40,
        dropped={"duplicate key": ["d.jsonl:41"]},
    ),
    accepted(
        "a list among objects",
        "d.jsonl",
        lines(PAIRS) + "[1, 2]\n",
        "--on-bad-row",
        "skip",
        kept=40,
        dropped={"not an object": ["d.jsonl:41"]},
    ),
    accepted(
        "a line of 30 MB among others",
        "d.jsonl",
        lines(PAIRS) + '{"prompt": "' + "x" * 30_000_000 + '"}\n',
        "--on-bad-row",
        "skip",
        kept=40,
        dropped={"line too long": ["d.jsonl:41"]},
    ),
    accepted(
        "half of a surrogate pair",
        "d.jsonl",
        lines(PAIRS) + '{"prompt": "x", "completion": "\\ud83d"}\n',
        "--on-bad-row",
        "skip",
        kept=40,
        dropped={"not UTF-8": ["d.jsonl:41"]},
    ),
    accepted(
        "a few strange fields",
        "d.jsonl",
        lines(PAIRS) + '{"foo": 1, "bar": 2}\n',
        "--on-bad-row",
        "skip",
        kept=40,
        dropped={"unexpected fields": ["d.jsonl:41"]},
    ),
    accepted(
        "two kinds of records",
        "d.jsonl",
        lines(PAIRS + CHATS),
        kept=80,
        records=["prompt-completion", "messages"],
        warns="several kinds",
    ),
    accepted(
        "optional fields",
        "d.jsonl",
        lines([{"instruction": "Add", "output": "Yes"}, {"instruction": "Go", "input": "x", "output": "No"}]),
        kept=2,
        records="instruction",
    ),
    accepted(
        "types that change",
        "d.jsonl",
        lines(
            [
                {"prompt": "a", "completion": 1},
                {"prompt": "b", "completion": "x"},
                {"prompt": "c", "completion": [1, "y"]},
            ]
        ),
        kept=3,
        writes=[
            {"prompt": "a", "completion": "1"},
            {"prompt": "b", "completion": "x"},
            {"prompt": "c", "completion": '[1, "y"]'},
        ],
    ),
    refused("an array cut in half", "d.json", json.dumps(PAIRS)[:-1000], "d.json:1", "cut off"),
    refused("an indented array cut in half", "d.json", json.dumps(PAIRS, indent=2)[:1000], "d.json:", "cut off"),
    refused("an array cut after a comma", "d.json", json.dumps(PAIRS[:2])[:-1] + ", ", "d.json:1", "cut off"),
    refused("broken in the middle", "d.json", json.dumps(PAIRS).replace('"}, {', '"} {', 1), "d.json:1", "column"),
    refused("half of the lines broken", "d.jsonl", lines(PAIRS[:2]) + "{no\n{no\n", "d.jsonl:3", "not JSON"),
    refused("JSON lines that are none", "d.jsonl", "hello\nworld\n", "d.jsonl:1", "not JSON"),
    refused("a Python dictionary", "d.json", "[{'prompt': 'a', 'completion': 'b'}]", "d.json:1", "Python"),
    refused("an empty array", "d.json", "[]", "no row"),
    refused("a configuration", "d.json", '{"model_type": "llama", "hidden_size": 1}', "one JSON object (model_type, "),
    refused("an empty object", "d.json", "{}", "empty JSON object"),
    refused("a number", "d.json", "[1, 2, 3]", "d.json:1", "not an object"),
    refused("nested without end", "d.json", "[" * 100_000, "d.json"),
    refused(
        "nested too deep",
        "d.jsonl",
        '{"prompt": ' + "[" * 200 + "]" * 200 + ', "completion": "a"}\n',
        "d.jsonl:1",
        "deep",
    ),
    refused("columns of different length", "d.json", '{"a": ["x"], "b": ["y", "z"]}', "differ in length"),
    refused("several lists", "d.json", json.dumps({"train": PAIRS, "test": PAIRS}), "several lists", "train, test"),
    refused(
        "mixed schemas",
        "d.jsonl",
        lines(PAIRS[:20] + [{"foo": 1, "bar": n} for n in range(20)]),
        "d.jsonl:21",
        "fields",
    ),
    refused(
        "preference pairs as JSON", "d.jsonl", lines([{"prompt": "a", "chosen": "b", "rejected": "c"}]), "preference"
    ),
    refused("rated answers", "d.jsonl", lines([{"prompt": "a", "completion": "b", "label": True}]), "rated answers"),
    accepted("an array of texts", "d.json", json.dumps(["One tale.", "Another."]), records="text", kept=2),
    accepted("lines of texts", "d.jsonl", '"One tale."\n"Another."\n', records="text", kept=2),
    refused("a text among objects", "d.jsonl", lines([*PAIRS[:9], "a tale"]), "d.jsonl:10", "is a string"),
    refused("a comment in an array", "d.json", '[\n  // one\n  {"prompt": "a"}]', "d.json:2", "not JSON"),
    refused("keys without quotes", "d.json", "[{prompt: 'a'}]", "d.json:1", "not JSON"),
    refused("a wrapped empty array", "d.json", '{"data": []}', "d.json", "no row"),
    refused("one record of 30 MB", "d.jsonl", with_30_mb('{"text": "') + '"}\n', "d.jsonl:1", "30,000,000 characters"),
    refused(
        "a message of 30 MB",
        "d.jsonl",
        with_30_mb('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "') + '"}]}\n',
        "d.jsonl:1",
        "30,000,000 characters",
    ),
]

CHAT_FILES = [
    accepted("messages", "c.jsonl", lines(CHATS), records="messages", kept=40),
    accepted(
        "conversations",
        "c.jsonl",
        lines(
            [
                {"conversations": [{"from": "human", "value": f"Hi {n}"}, {"from": "gpt", "value": "Yes"}]}
                for n in range(3)
            ]
        ),
        records="conversations",
        kept=3,
        writes=[
            chat({"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Yes"}) for n in range(3)
        ],
    ),
    accepted(
        "a system column",
        "c.json",
        json.dumps(
            [
                {
                    "system": "Be brief",
                    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}],
                }
            ]
        ),
        kept=1,
        writes=[
            chat(
                {"role": "system", "content": "Be brief"},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes"},
            )
        ],
    ),
    accepted(
        "content parts",
        "c.jsonl",
        lines(
            [
                chat(
                    {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
                    HELLO,
                )
            ]
        ),
        writes=[chat(USER, HELLO)],
    ),
    accepted(
        "a tool call with null content",
        "c.jsonl",
        lines(
            [
                chat(
                    USER,
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
                        ],
                    },
                    {"role": "tool", "tool_call_id": "1", "content": "2"},
                    HELLO,
                    tools=[{"type": "function", "function": {"name": "add"}}],
                )
            ]
        ),
        kept=1,
        writes=[
            chat(
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
                },
                {"role": "tool", "content": "2", "tool_call_id": "1"},
                HELLO,
                tools=[{"type": "function", "function": {"name": "add"}}],
            )
        ],
    ),
    accepted(
        "a function call of ShareGPT",
        "c.jsonl",
        lines(
            [
                {
                    "conversations": [
                        {"from": "human", "value": "Hello"},
                        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                        {"from": "observation", "value": "1"},
                        {"from": "gpt", "value": "Good day"},
                    ]
                }
            ]
        ),
        kept=1,
    ),
    accepted(
        "a weight of 0",
        "c.jsonl",
        lines([chat(USER, {"role": "assistant", "content": "No", "weight": 0}, USER, HELLO)]),
        writes=[chat(USER, {"role": "assistant", "content": "No", "weight": 0}, USER, HELLO)],
    ),
    accepted(
        "prompts as messages", "c.jsonl", lines([{"prompt": [USER], "completion": [HELLO]}]), writes=[chat(USER, HELLO)]
    ),
    accepted(
        "messages as text in a CSV",
        "c.csv",
        'id,messages\n1,"' + json.dumps([USER, HELLO]).replace('"', '""') + '"\n',
        records="messages",
        writes=[chat(USER, HELLO)],
    ),
    accepted(
        "messages as pandas writes them to a CSV",
        "c.csv",
        'id,messages\n1,"' + repr([USER, HELLO]) + '"\n',
        records="messages",
        writes=[chat(USER, HELLO)],
    ),
    accepted(
        "contents and parts",
        "c.jsonl",
        lines(
            [
                {
                    "contents": [
                        {"role": "user", "parts": [{"text": "Hello"}]},
                        {"role": "model", "parts": [{"text": "Good day"}]},
                    ]
                }
            ]
        ),
        writes=[chat(USER, HELLO)],
    ),
    refused("messages that are text", "c.jsonl", lines([{"messages": "hello"}] * 3), "c.jsonl:1", "not a list"),
    refused("a message per row", "c.jsonl", lines([USER, HELLO]), "c.jsonl:1", "each row is one message"),
    refused("one message", "c.jsonl", lines([{"messages": USER}]), "c.jsonl:1", "not a list"),
    refused("a string that holds JSON", "c.jsonl", json.dumps(json.dumps(PAIRS[0])) + "\n", "one JSON string"),
    accepted(
        "messages in parquet",
        "c.parquet",
        parquet({"messages": [[USER, HELLO]]}),
        format="parquet",
        writes=[chat(USER, HELLO)],
    ),
    accepted(
        "alpaca",
        "c.json",
        json.dumps(
            [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Ho"}]
        ),
        records="instruction",
        writes=[
            chat({"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}),
            chat({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}),
        ],
    ),
    accepted(
        "questions and answers", "c.csv", "Question,Answer\nWho?,Me\nWhere?,Here\n", kept=2, records="prompt-completion"
    ),
    refused("no assistant", "c.jsonl", lines([chat(USER)]), "c.jsonl:1", "assistant"),
    refused("all weights 0", "c.jsonl", lines([chat(USER, HELLO | {"weight": 0})]), "c.jsonl:1", "weight"),
    refused("an empty answer", "c.jsonl", lines([chat(USER, HELLO | {"content": " "})]), "c.jsonl:1", "empty"),
    refused("a null answer", "c.jsonl", lines([chat(USER, HELLO | {"content": None})]), "c.jsonl:1", "empty"),
    refused(
        "an image in a message",
        "c.jsonl",
        lines([chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, HELLO)]),
        "c.jsonl:1",
        "image_url",
    ),
    refused(
        "an unknown role",
        "c.jsonl",
        lines([chat({"role": "narrator", "content": "x"}, HELLO)]),
        "c.jsonl:1",
        "narrator",
    ),
    refused("an empty conversation", "c.jsonl", lines([chat()]), "c.jsonl:1", "empty"),
    refused("a weight of 2", "c.jsonl", lines([chat(USER, HELLO | {"weight": 2})]), "c.jsonl:1", "weight"),
    accepted(
        "a list of messages on each line",
        "c.jsonl",
        lines([[USER, HELLO]]),
        records="messages",
        writes=[chat(USER, HELLO)],
    ),
    accepted(
        "system instructions in parts",
        "c.jsonl",
        lines([{"contents": [USER, HELLO], "systemInstruction": {"parts": [{"text": "Be brief"}]}}]),
        writes=[chat({"role": "system", "content": "Be brief"}, USER, HELLO)],
    ),
]
