"""Calibration: where texts come from, how windows are cut, and what is refused."""

import gzip
import json
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from sedetect.calibration import texts as texts_module
from sedetect.calibration import windows as windows_module
from sedetect.calibration.records import Pair, media
from sedetect.calibration.texts import DOMAINS, Documents, load_texts
from sedetect.calibration.windows import Text, batches, check_text, check_vocabulary, make_windows, prefix_ids
from sedetect.errors import SedetectError
from sedetect.models.loading import load_tokenizer

TINY = Path(__file__).parent / "data" / "tiny-moe"
BOS, EOS = 0, 1
CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def corpus():
    return load_texts()


def refusal(function, *args, **kwargs) -> str:
    """The message of the SedetectError that the call raises, checked to be one line."""
    with pytest.raises(SedetectError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_template(tokenizer, single: str):
    """The tokenizer, putting these special tokens around every text."""
    special = [("<|bos|>", BOS), ("<|eos|>", EOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def words(n: int, word: str = "word") -> str:
    return " ".join(f"{word}{i}" for i in range(n))


# Texts


def test_embedded_corpus(corpus):
    assert tuple(corpus) == DOMAINS
    for domain, documents in corpus.items():
        assert len(documents) == 1 and len(documents[0].encode("utf-8")) >= 64 * 1024, domain
        assert "\ufffd" not in documents[0]


def test_text_file(tmp_path):
    file = tmp_path / "prose.txt"
    file.write_bytes("\ufeffZwölf\r\nBoxkämpfer".encode())
    assert load_texts(file) == {"prose": ["Zwölf\r\nBoxkämpfer"]}


def test_jsonl(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = tmp_path / "mixed.jsonl"
    lines = [json.dumps({"text": "a\u2028b"}, ensure_ascii=False), "", json.dumps({"messages": chat})]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert load_texts(file) == {"mixed": ["a\u2028b", chat]}


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"id": [1, 2], "text": ["one", "two"]}), tmp_path / "a.parquet")
    chats = [[{"role": "user", "content": "hi"}]]
    parquet.write_table(pa.table({"messages": chats}), tmp_path / "b.parquet")
    assert load_texts(tmp_path) == {"a": ["one", "two"], "b": chats}
    parquet.write_table(pa.table({"body": ["one"]}), tmp_path / "c.parquet")
    assert "c.parquet: row 0" in refusal(load_texts, tmp_path / "c.parquet")
    parquet.write_table(pa.table({"text": ["one", None]}), tmp_path / "d.parquet")
    assert "d.parquet: row 1" in refusal(load_texts, tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_bytes(b"PAR1")
    assert "e.parquet: not a readable" in refusal(load_texts, tmp_path / "e.parquet")


def test_extras_are_named(tmp_path, monkeypatch):
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").touch()
    assert "sedetect[data]" in refusal(load_texts, tmp_path / "a.parquet")
    assert "sedetect[data]" in refusal(load_texts, "owner/name")


def test_hub_data_set(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split))
        if name == "no/such":
            raise ConnectionError("no route\nto host")
        return iter([{"text": "one", "id": 1}, {"text": "two", "id": 2}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_texts("owner/name-v1.1:part.2") == {"name-v1.1": ["one", "two"]}
    assert load_texts("name") == {"name": ["one", "two"]}
    assert calls == [("owner/name-v1.1", "part.2", "train"), ("name", None, "train")]
    assert "no route to host" in refusal(load_texts, "no/such")


def test_folder(tmp_path):
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.jsonl").write_text('{"text": "ay"}')
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "empty.txt").touch()
    texts = load_texts(tmp_path)
    assert texts == {"a": ["ay"], "b": ["bee"], "empty": [""]} and list(texts) == ["a", "b", "empty"]
    (tmp_path / "b.jsonl").write_text('{"text": "bee"}')
    assert "b.txt" in refusal(load_texts, tmp_path)


@pytest.mark.parametrize("name", ["none.txt", "./none", "/none/none", "a/b/c", "a/none.json"])
def test_missing_file(name):
    assert refusal(load_texts, name).startswith(f"{name}: no such file")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n", "empty"),
        ("a.txt", b"abc\xff", "not UTF-8 at byte 3"),
        ("a.txt", "Zwölf".encode("utf-16"), "not UTF-8"),
        ("a.jsonl", b"\n", "empty"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "line 3 is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', "line 2 has no"),
        ("a.jsonl", b'{"text": 3}', "line 1 has no"),
        ("a.jsonl", b'{"messages": []}', "line 1 has no"),
        ("a.jsonl", b'{"messages": ["x"]}', "line 1 has no"),
        ("a.jsonl", b'["x"]', "line 1 is not an object"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 holds a lone surrogate"),
        ("a.csv", b"text\nx", "'.csv' are not read"),
    ],
)
def test_bad_file(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    message = refusal(load_texts, tmp_path / name)
    assert said in message and message.startswith(str(tmp_path / name))


def test_folder_without_data(tmp_path):
    assert "no .txt" in refusal(load_texts, tmp_path)
    (tmp_path / "a.txt").touch()
    assert "empty" in refusal(load_texts, tmp_path)


# Layouts of records, and clones of data sets

ASK, TELL = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize(
    "record, document",
    [
        ({"text": "a", "messages": [ASK]}, "a"),
        ({"content": "a", "id": 1}, "a"),
        ({"messages": [ASK, TELL]}, [ASK, TELL]),
        ({"conversation": [ASK, TELL]}, [ASK, TELL]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, [ASK, TELL]),
        (
            {"system": "be brief", "conversations": [{"from": "human", "value": "hi"}, {"from": "tool", "value": "x"}]},
            [{"role": "system", "content": "be brief"}, ASK, {"role": "tool", "content": "x"}],
        ),
        ({"instruction": "add", "input": "1 2", "output": "3"}, Pair("add\n\n1 2", "\n\n", "3")),
        ({"instruction": "add", "input": "", "output": "3"}, Pair("add", "\n\n", "3")),
        ({"instruction": "add", "context": None, "response": "3"}, Pair("add", "\n\n", "3")),
        ({"prompt": "1 + 2 =", "completion": " 3"}, Pair("1 + 2 =", "", " 3")),
        ({"prompt": [ASK], "completion": [TELL]}, [ASK, TELL]),
        ({"question": "1 + 2?", "answer": "3"}, Pair("1 + 2?", "\n", "3")),
    ],
)
def test_layouts(tmp_path, record, document):
    for name, content in {"a.jsonl": json.dumps(record), "a.json": json.dumps([record], indent=1)}.items():
        (tmp_path / name).write_text(content)
        assert load_texts(tmp_path / name) == {"a": [document]}


def test_unknown_layouts_are_refused_by_their_fields(tmp_path):
    file = tmp_path / "a.jsonl"
    for record, fields in (
        ({"body": "x", "title": "y"}, "'body', 'title'"),
        ({}, "empty"),
        ({"prompt": "x"}, "'prompt'"),
    ):
        file.write_text(json.dumps(record))
        message = refusal(load_texts, file)
        assert message.startswith(f"{file}: line 1 has no text") and fields in message and "'conversations'" in message
    file.write_text(json.dumps({f"field{i}\n": i for i in range(1000)}))
    assert len(refusal(load_texts, file)) < 600 + len(str(file))


def test_pairs_with_and_without_a_template(tokenizer):
    texts = {"a": [Pair(words(20, "ask"), "\n\n", words(20, "tell"))]}

    def stream(**options):
        return make_windows(tokenizer, texts, tokens=10**6, seq_len=16, **options).domains["a"].ids[:, 1:].flatten()

    for template, written in (
        (None, f"{words(20, 'ask')}\n\n{words(20, 'tell')}"),
        (CHAT, f"<user>{words(20, 'ask')}<assistant>{words(20, 'tell')}"),
    ):
        tokenizer.chat_template = template
        ids = stream(chat_template=template is not None).tolist()
        assert ids == tokenizer(written, add_special_tokens=False)["input_ids"][: len(ids)]


@pytest.mark.parametrize(
    "content, said",
    [
        (b'[{"text": "a"}, {"text": ', "record 1 is not valid JSON"),
        (b'[{"text": "a"} "b"]', "record 1 is not an object"),
        (b'[{"text": "a"}', "record 1 is not valid JSON"),
        (b"[]", "empty"),
        (b'{\n "data": [{"text": "a"}]}', "is one object over several lines"),
        (b'{"data": [{"text": "a"}]}', "line 1 has no text, only 'data'"),
        (b"[" * 10000, "record 0 is not valid JSON"),
        (b'[{"text": "\xff"}]', "not UTF-8 at byte 11"),
    ],
)
def test_bad_arrays(tmp_path, content, said):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    message = refusal(load_texts, file)
    assert said in message and message.startswith(str(file))


def test_compressed(tmp_path):
    lines = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50))
    for name, content in {"a.jsonl.gz": lines, "b.json.gz": lines, "c.txt.gz": "prose"}.items():
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    texts = load_texts(tmp_path)
    assert texts == {"a": [f"text {i}" for i in range(50)], "b": texts["a"], "c": ["prose"]}
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    for damaged in (whole[:-20], whole[:12] + b"\xff\xff\xff" + whole[15:], b"not gzip"):
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        assert "a.jsonl.gz: cannot be read" in refusal(load_texts, tmp_path / "a.jsonl.gz")


def test_clones_of_data_sets(tmp_path):
    def clone(name, **files):
        for file, text in files.items():
            path = tmp_path / name / file.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".jsonl").write_text(json.dumps({"text": text}))
        (tmp_path / name / "README.md").touch()
        (tmp_path / name / "dataset_infos.json").write_text("{}")
        (tmp_path / name / ".git").mkdir()
        (tmp_path / name / ".git" / "index.json").touch()
        return load_texts(tmp_path / name)

    shards = {f"data__train-0000{i}-of-00003": str(i) for i in (2, 0, 1)}
    assert clone("wiki", **shards, **{"data__test-00000-of-00001": "t"}) == {"wiki": ["0", "1", "2"]}
    assert clone("auto", **{"default__train__0001": "b", "default__train__0000": "a"}) == {"auto": ["a", "b"]}
    assert clone("parts", **{"data__part-00001-4f3a": "b", "data__part-00000-4f3a": "a"}) == {"parts": ["a", "b"]}
    assert clone("flat", **{f"train-0000{i}-of-00002": str(i) for i in range(2)}) == {"train": ["0", "1"]}
    assert clone("named", **{"data__english": "e", "data__code": "c"}) == {"code": ["c"], "english": ["e"]}
    assert clone("years", **{"2023": "a", "2024": "b"}) == {"2023": ["a"], "2024": ["b"]}  # of a user, as ever
    with pytest.raises(SedetectError, match="several folders, 'de', 'en'; give one of them"):
        clone("languages", de__train="d", en__train="e")


# Long texts


@pytest.fixture
def head(monkeypatch):
    """What is long, made short."""
    for module in (texts_module, windows_module):
        monkeypatch.setattr(module, "HEAD", 2**14)
    monkeypatch.setattr(windows_module, "_CHUNK", 2**12)
    return 2**14


class Counted:
    """Documents that count how many of them were read."""

    def __init__(self, documents):
        self.documents, self.read = documents, 0

    def __iter__(self):
        for document in self.documents:
            self.read += 1
            yield document


def test_what_is_read_is_in_proportion_to_the_tokens(tokenizer, tmp_path, head):
    """Windows of a long file are those of the whole, and of it no more is read and tokenized than they take."""
    file = tmp_path / "long.jsonl"
    texts = [f"{i} {words(400)}" for i in range(300)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "this line is damaged\n")
    loaded = load_texts(file)
    assert isinstance(loaded["long"], Documents)
    asked = {tokens: make_windows(tokenizer, loaded, tokens=tokens, seq_len=64) for tokens in (256, 2**16)}
    few, more = (calibration.domains["long"] for calibration in asked.values())
    assert few.source == more.source and torch.equal(few.ids, more.ids[:4]) and not asked[256].notes
    assert torch.equal(more.ids, make_windows(tokenizer, {"a": texts}, tokens=2**16, seq_len=64).domains["a"].ids)
    counted = Counted(texts)
    make_windows(tokenizer, {"a": counted}, tokens=256, seq_len=64)
    assert sum(map(len, texts[: counted.read])) < 1.5 * head
    assert "line 301 is not valid JSON" in refusal(make_windows, tokenizer, loaded, tokens=10**9, seq_len=64)


def test_a_long_document_is_taken_in_pieces(tokenizer, tmp_path, head):
    line = words(50) + "\n"
    text = line * (3 * head // len(line))
    (tmp_path / "a.txt").write_text(text)
    loaded = load_texts(tmp_path / "a.txt")
    assert "".join(loaded["a"]) == text and all(len(piece) <= head for piece in loaded["a"])
    windows = [
        make_windows(tokenizer, texts, tokens=4 * 64, seq_len=64).domains["a"] for texts in (loaded, {"a": [text]})
    ]
    assert torch.equal(windows[0].ids, windows[1].ids) and windows[0].source == windows[1].source
    for unbroken in ("x" * (head + 5), "x " * head, "\n" + "x" * 2 * head):
        (tmp_path / "b.txt").write_text(unbroken)
        loaded = list(load_texts(tmp_path / "b.txt")["b"])
        assert "".join(loaded) == unbroken and all(0 < len(piece) <= head for piece in loaded)


def test_a_seed_chooses_from_the_start_of_a_long_text(tokenizer, head):
    texts = [f"{i} {words(400)}" for i in range(200)]
    calibration = make_windows(tokenizer, {"a": texts}, tokens=8 * 64, seq_len=64, seed=1)
    windows = calibration.domains["a"]
    everything = make_windows(tokenizer, {"a": texts}, tokens=10**9, seq_len=64).domains["a"]
    assert torch.equal(windows.ids, everything.ids[windows.numbers]) and windows.source == everything.source
    note = calibration.notes[0]
    assert note.code == "chosen_among" and windows.numbers.max() < note.count < len(everything.ids)


def test_long_domains_make_up_for_short_ones(tokenizer, head):
    long = {name: [f"{i} {name} {words(400)}" for i in range(100)] for name in "ac"}
    texts = long | {"b": [words(80)]}
    counts = {
        name: len(windows.ids)
        for name, windows in make_windows(tokenizer, texts, tokens=800 * 64, seq_len=64).domains.items()
    }
    assert sum(counts.values()) == 800 and counts["b"] < 10 and abs(counts["a"] - counts["c"]) <= 1


# The tokenizer's prefix


@pytest.mark.parametrize(
    "single, prefix",
    [
        ("<|bos|> $A", [BOS]),
        ("$A", []),
        ("$A <|eos|>", []),
        ("<|bos|> $A <|eos|>", [BOS]),
        ("<|eos|> <|bos|> $A <|eos|> <|eos|>", [EOS, BOS]),
    ],
)
def test_prefix(tokenizer, single, prefix):
    with_template(tokenizer, single)
    assert prefix_ids(tokenizer) == prefix
    if "$A <" not in single:  # nothing appended: the same as around an empty text
        assert tokenizer("")["input_ids"] == prefix
    windows = make_windows(tokenizer, {"a": [words(100)]}, tokens=64, seq_len=16).domains["a"]
    assert all(row[: len(prefix)] == prefix and EOS not in row[len(prefix) :] for row in windows.ids.tolist())


# Windows


def test_windows_are_the_text(tokenizer, corpus):
    calibration = make_windows(tokenizer, corpus, tokens=4 * 5 * 128, seq_len=128)
    assert calibration.used == calibration.asked == 4 * 5 * 128 and not calibration.notes
    for domain, windows in calibration.domains.items():
        assert windows.ids.shape == (5, 128) and windows.ids.dtype == torch.int64
        assert windows.numbers.tolist() == [0, 1, 2, 3, 4]
        assert (windows.ids[:, 0] == BOS).all()
        stream = tokenizer(corpus[domain][0], add_special_tokens=False, verbose=False)["input_ids"]
        assert windows.ids[:, 1:].flatten().tolist() == stream[: 5 * 127]
        assert windows.info == {
            "domain": domain,
            "corpus": "texts",
            "window": 128,
            "chat_template": False,
        }
    assert len({windows.source for windows in calibration.domains.values()}) == 4


def test_documents_are_joined(tokenizer):
    documents = [words(30, f"doc{i}x") for i in range(5)]
    windows = make_windows(tokenizer, {"a": documents}, tokens=10**6, seq_len=20).domains["a"]
    stream = list(chain.from_iterable(tokenizer(d, add_special_tokens=False)["input_ids"] for d in documents))
    assert windows.ids[:, 1:].flatten().tolist() == stream[: len(stream) // 19 * 19]


def test_text_is_not_repeated(tokenizer):
    """Asked for more than there is: every whole window once, and the note says both numbers."""
    text = words(200)
    calibration = make_windows(tokenizer, {"a": [text]}, tokens=10**6, seq_len=32)
    stream = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = calibration.domains["a"]
    assert windows.numbers.tolist() == list(range(len(stream) // 31))
    assert windows.ids[:, 1:].flatten().tolist() == stream[: len(windows.ids) * 31]
    assert calibration.used == len(windows.ids) * 32
    assert len(calibration.notes) == 1
    assert "1000000 tokens asked" in str(calibration.notes[0]) and calibration.notes[0].count == calibration.used


@pytest.mark.parametrize(
    "tokens, counts",
    [
        (4 * 160, [10, 10, 10, 10]),
        (4 * 160 + 15, [10, 10, 10, 10]),  # rounded down to whole windows
        (41 * 16, [11, 10, 10, 10]),
        (16, [1, 1, 1, 1]),  # at least one per domain
        (1, [1, 1, 1, 1]),
    ],
)
def test_budget(tokenizer, tokens, counts):
    texts = {name: [words(1000, name)] for name in "abcd"}
    calibration = make_windows(tokenizer, texts, tokens=tokens, seq_len=16)
    assert [len(windows.ids) for windows in calibration.domains.values()] == counts
    assert calibration.used == sum(counts) * 16
    assert [str(note) for note in calibration.notes] == (
        [f"{tokens} tokens asked, 64 used: every domain gives at least one window"] if tokens < 64 else []
    )


def test_short_domains_are_made_up_for(tokenizer):
    texts = {"short": [words(20, "s")], "long": [words(2000, "l")], "empty": [], "middle": [words(60, "m")]}
    calibration = make_windows(tokenizer, texts, tokens=100 * 16, seq_len=16)
    room = {
        name: len(tokenizer(text[0], add_special_tokens=False)["input_ids"]) // 15
        for name, text in texts.items()
        if text
    }
    counts = {name: len(windows.ids) for name, windows in calibration.domains.items()}
    assert counts["short"] == room["short"] < 25 and counts["middle"] == room["middle"] < 33
    assert sum(counts.values()) == 100 and calibration.used == 1600
    assert len(calibration.notes) == 1 and str(calibration.notes[0]).startswith("empty: left out")


def test_seed(tokenizer, corpus):
    def cut(seed, tokens=4 * 8 * 64):
        return make_windows(tokenizer, corpus, tokens=tokens, seq_len=64, seed=seed).domains["english"]

    everything = cut(None, 10**9)
    ids = dict(zip(everything.numbers.tolist(), everything.ids.tolist()))
    first, again, other = cut(1), cut(1), cut(2)
    assert torch.equal(first.numbers, again.numbers) and torch.equal(first.ids, again.ids)
    assert not torch.equal(first.numbers, other.numbers)
    for windows in (first, other, cut(None)):
        assert len(set(windows.numbers.tolist())) == 8  # none twice
        for number, row in zip(windows.numbers.tolist(), windows.ids.tolist()):
            assert ids[number] == row  # a number names the same window under every seed and budget
        assert windows.source == everything.source


def test_source_names_what_the_windows_are(tokenizer):
    def source(text="x", seq_len=16, **options):
        texts = {"a": [words(100, text)]}
        return make_windows(tokenizer, texts, tokens=64, seq_len=seq_len, **options).domains["a"].source

    base = source()
    assert base == source(seed=3) == source(corpus="elsewhere")
    tokenizer.chat_template = CHAT
    others = [source("y"), source(seq_len=17), source(chat_template=True)]
    with_template(tokenizer, "$A")
    others.append(source())
    assert len({base, *others}) == 5


def test_chat_template(tokenizer):
    tokenizer.chat_template = CHAT
    chat = [{"role": "user", "content": words(20)}, {"role": "assistant", "content": words(20)}]
    windows = make_windows(tokenizer, {"a": [chat, words(20)]}, tokens=10**6, seq_len=16, chat_template=True)
    written = [f"<user>{words(20)}<assistant>{words(20)}", f"<user>{words(20)}"]
    stream = list(chain.from_iterable(tokenizer(text, add_special_tokens=False)["input_ids"] for text in written))
    ids = windows.domains["a"].ids
    assert ids[:, 1:].flatten().tolist() == stream[: len(ids) * 15]  # the template's own BOS is not in it a second time
    assert windows.domains["a"].info["chat_template"]

    message = refusal(make_windows, tokenizer, {"a": [chat]}, tokens=64, seq_len=16)
    assert message.startswith("a: holds chats") and "pass chat_template=True" in message
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    message = refusal(make_windows, tokenizer, {"a": [chat]}, tokens=64, seq_len=16, chat_template=True)
    assert message.startswith("a: ") and "roles must alternate" in message
    tokenizer.chat_template = None
    assert "no chat template" in refusal(make_windows, tokenizer, {"a": ["x"]}, tokens=1, seq_len=4, chat_template=True)


TEXT_PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
LISTS = "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{{ c.text }};{% endfor %}{% endfor %}"
STRINGS = "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}"
JOINED = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "written"), [(LISTS, "<user>one;two;"), (STRINGS, "<user>one\ntwo"), (JOINED, "<user>one\ntwo"),
                              (CHAT, "<user>one\ntwo")]
)  # fmt: skip
def test_parts_of_text_reach_a_template_that_takes_strings(tokenizer, template, written):
    tokenizer.chat_template = template
    chats = [[{"role": "user", "content": TEXT_PARTS}]] * 8
    windows = make_windows(tokenizer, {"a": chats}, tokens=1, seq_len=4, chat_template=True)
    expected = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert windows.domains["a"].ids[0, 1:].tolist() == expected[:3]


# Chats with images and sound


def chat_of(*parts) -> dict:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]}


def test_images_are_found_beside_the_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"a")
    lines = [
        chat_of({"type": "image", "path": "images/a.png"}),
        chat_of({"type": "image", "image": str(tmp_path / "images" / "a.png")}),
        chat_of({"type": "audio", "audio": "images/a.png"}),
        chat_of({"type": "image"}) | {"images": ["images/a.png"]},
    ]
    (tmp_path / "seen.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "array.json").write_text(json.dumps(lines))
    texts = load_texts(tmp_path)
    for domain in ("seen", "array"):
        parts = [media(chat)[0] for chat in texts[domain]]
        held = str(tmp_path / "images" / "a.png")
        image = {"type": "image", "image": held}
        assert parts == [image, image, {"type": "audio", "audio": held}, image]


def test_images_in_parquet(tmp_path):
    """As columns of their own, as data sets store them, and in the messages, where parts have each other's fields."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    place, text = {"type": "image", "text": None}, {"type": "text", "text": "What is it?"}
    apart = {"messages": [{"role": "user", "content": [place, text, place]}]}
    apart["images"] = [{"bytes": b"one", "path": None}, {"bytes": b"two", "path": "b.png"}]
    inside = {"messages": [{"role": "user", "content": [place | {"image": b"one"}, text | {"image": None}]}]}
    for name, row in (("apart", apart), ("inside", inside)):
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
    texts = load_texts(tmp_path)
    (content,) = [message["content"] for message in texts["apart"][0]]
    assert content == [{"type": "image", "image": b"one"}, text, {"type": "image", "image": b"two"}]
    (content,) = [message["content"] for message in texts["inside"][0]]
    assert content == [{"type": "image", "image": b"one"}, text]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (chat_of({"type": "image", "path": "b.png"}), "b.png: no such file; give paths from the file"),
        (chat_of({"type": "image", "url": "https://a.org/b.png"}), "'https://a.org/b.png' as a file; download it"),
        (chat_of({"type": "image", "image": "data:image/png;base64,AA"}), "as a file; download it"),
        (chat_of({"type": "video", "path": "b.mp4"}), "a part of type 'video'; give text, image and audio"),
        (chat_of({"type": "image_url", "image_url": {"url": "b"}}), "a part of type 'image_url'"),
        (chat_of({"type": "image"}), "an empty place for image"),
        (chat_of({"type": "audio"}) | {"images": ["x"]}, "an empty place for audio"),
    ],
)
def test_images_that_cannot_be_had(tmp_path, record, said):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    message = refusal(load_texts, tmp_path / "a.jsonl")
    assert "a.jsonl: line 1" in message and said in message


def test_more_images_than_places(tmp_path):
    (tmp_path / "b.png").touch()
    (tmp_path / "a.jsonl").write_text(json.dumps(chat_of({"type": "image"}) | {"images": ["b.png", "b.png"]}))
    assert "has 2 of image and places for 1" in refusal(load_texts, tmp_path / "a.jsonl")


def test_images_are_no_windows(tokenizer):
    tokenizer.chat_template = CHAT
    chat = chat_of({"type": "image", "image": b""})["messages"]
    for chats in ([chat], [[{"role": "user", "content": words(9)}], chat]):
        message = refusal(make_windows, tokenizer, {"a": chats}, tokens=64, seq_len=16, chat_template=True)
        assert message.startswith("a: holds chats with image")


def test_domains_by_name():
    assert list(check_text(None, Text(domains=("text",)))) == list(DOMAINS)
    assert list(check_text(None, Text(domains=("code", "images", "english")))) == ["english", "code"]
    assert list(check_text({"a": ["x"], "text": ["y"]}, Text(domains=("text",)))) == ["text"]
    message = refusal(check_text, {"a": ["x"]}, Text(domains=("b",)))
    assert message == "domains: there is no 'b'; give some of a, text, images"
    assert "there is no ''" in refusal(check_text, {"a": ["x"]}, Text(domains=()))


def test_long_text_is_silent(tokenizer, caplog):
    caplog.set_level("WARNING", "transformers")  # the command line, in an earlier test, may have silenced it
    text = words(3000)
    assert len(tokenizer(text, verbose=False)["input_ids"]) > tokenizer.model_max_length
    make_windows(tokenizer, {"a": [text]}, tokens=64, seq_len=16)
    assert not caplog.records
    tokenizer(text)  # the warning is only kept from our own call
    assert "longer than the specified maximum" in caplog.text


@pytest.mark.parametrize(
    "options, said",
    [
        ({"tokens": 0}, "tokens 0"),
        ({"tokens": -5}, "tokens -5"),
        ({"seq_len": 1}, "seq_len 1: must be at least 2"),
        ({"seq_len": 4096, "max_positions": 2048}, "seq_len 4096: the model has 2048 positions"),
        ({"seed": -1}, "seed -1"),
        ({"seq_len": 1000, "corpus": "my.txt"}, "my.txt: no domain fills a window"),
    ],
)
def test_bad_numbers(tokenizer, options, said):
    assert said in refusal(make_windows, tokenizer, {"a": [words(50)]}, **({"tokens": 64, "seq_len": 16} | options))


def test_no_text_at_all(tokenizer):
    for texts in ({}, {"a": []}, {"a": [""], "b": []}):
        assert "no domain fills a window" in refusal(make_windows, tokenizer, texts, tokens=64, seq_len=16)


def test_same_text_in_two_domains(tokenizer):
    texts = {"a": [words(100)], "b": [words(100)]}
    assert "'a' and 'b' hold the same text" in refusal(make_windows, tokenizer, texts, tokens=64, seq_len=16)


def test_vocabulary(tokenizer):
    windows = make_windows(tokenizer, {"a": [words(100)]}, tokens=64, seq_len=16).domains["a"]
    largest = int(windows.ids.max())
    check_vocabulary(tokenizer, windows, largest + 1)
    message = refusal(check_vocabulary, tokenizer, windows, largest)
    assert f"id {largest}," in message and f"{largest} rows" in message
    assert repr(tokenizer.convert_ids_to_tokens(largest)) in message


def test_batches(tokenizer):
    windows = make_windows(tokenizer, {"a": [words(500)]}, tokens=7 * 16, seq_len=16, seed=0).domains["a"]
    parts = list(batches(windows, 3))
    assert [len(ids) for ids, _ in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([ids for ids, _ in parts]), windows.ids)
    assert torch.equal(torch.cat([numbers for _, numbers in parts]), windows.numbers)
    assert "batch_size 0: " in refusal(list, batches(windows, 0))
