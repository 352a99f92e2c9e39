"""Calibration: where texts come from, how windows are cut, and what is refused."""

import json
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from sedetect.calibration import texts as texts_module
from sedetect.calibration.texts import DOMAINS, load_texts
from sedetect.calibration.windows import batches, check_vocabulary, make_windows, prefix_ids
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
    monkeypatch.setattr(texts_module, "_HUB_CHARACTERS", 3)
    assert load_texts("name") == {"name": ["one"]}


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
        ("a.jsonl", b'["x"]', "line 1 is no object"),
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
