"""Hostile inputs: what damages a checkpoint, a file of results, calibration data or an output path, one way each.

A Case is built in a folder of its own from sound files, and says what the command line must do with it: refuse it in
one line, or serve it, because it is odd and not wrong.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.servers import Server

INDEX = "model.safetensors.index.json"
SMALL = ("--tokens", 256, "--seq-len", 16)


@dataclass(frozen=True)
class Sound:
    """Sound files to damage: a checkpoint of one shard and one of several, the folder of a profile of the first. And
    where a damaged one is served, by its name."""

    single: Path
    sharded: Path
    profile: Path
    server: Server


@dataclass(frozen=True)
class Case:
    """make(folder, sound) -> the arguments of the command; served: whether it is to succeed, and what it says then."""

    name: str
    make: Callable[[Path, Sound], list]
    served: bool = False
    told: str = ""


def copied(folder: Path, source: Path) -> Path:
    return Path(shutil.copytree(source, folder / "model"))


def commands(model: Path, folder: Path, server: Server) -> dict[str, list]:
    """Everything that opens a checkpoint, and by its address."""
    server.models[folder.name] = model
    address = server.files(folder.name)
    return {
        "profile": ["profile", model, "-o", folder / "out", *SMALL],
        "stream": ["profile", model, "--stream", "-o", folder / "out", *SMALL],
        "plan": ["plan", model],
        "plan-address": ["plan", address],
        "locate": ["locate", model, "-o", folder / "out"],
        "locate-address": ["locate", address, "-o", folder / "out"],
        "prove": ["prove", model, "-o", folder / "out", "--experts", "L1E3", *SMALL],
        "prune": ["prune", model, "-o", folder / "out", *SMALL],
        "weights": ["analyze", "weights", model, "-o", folder / "out"],
    }


def damaged(name: str, harm: Callable[[Path], object], only=("profile", "stream"), sharded=False) -> Iterator[Case]:
    """One case per command on a copy of the checkpoint that harm has changed."""
    for command in only:

        def make(folder: Path, sound: Sound, command: str = command) -> list:
            model = copied(folder, sound.sharded if sharded else sound.single)
            harm(model)
            return commands(model, folder, sound.server)[command]

        yield Case(f"{name}-{command}", make)


def weights_of(model: Path) -> Path:
    return next(model.glob("*.safetensors"))


def header_of(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_header(file: Path, header: object, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def edit_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def harm(model: Path) -> None:
        header, body = header_of(weights_of(model))
        change(header)
        put_header(weights_of(model), header, body)

    return harm


def replace_header(text: bytes) -> Callable[[Path], None]:
    return lambda model: put_header(weights_of(model), text, header_of(weights_of(model))[1])


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda model: weights_of(model).write_bytes(change(weights_of(model).read_bytes()))


def edit_tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def harm(model: Path) -> None:
        tensors = load_file(weights_of(model))
        change(tensors)
        save_file(tensors, weights_of(model), {"format": "pt"})

    return harm


def edit_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    return harm


def put_text(name: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


EXPERTS = {"num_experts", "num_local_experts"}
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
NORM = "model.layers.1.input_layernorm.weight"


def entry(**fields) -> Callable[[dict], object]:
    return lambda header: header[DOWN].update(fields)


def bad_weights() -> Iterator[Case]:
    generator = random.Random(0)
    for part in (0.0, 1e-5, 1e-4, 0.3, 0.9):
        harm = edit_bytes(lambda data, part=part: data[: int(len(data) * part)])
        yield from damaged(f"truncated-{part}", harm, ("profile", "stream", "plan", "locate-address"))
    yield from damaged(
        "truncated-by-one", edit_bytes(lambda data: data[:-1]), ("profile", "stream", "plan", "locate-address")
    )
    for length in (0, 1, 2**31, 2**62, 2**64 - 1):
        harm = edit_bytes(lambda data, length=length: struct.pack("<Q", length) + data[8:])
        yield from damaged(f"header-length-{length}", harm, ("profile", "stream", "plan", "plan-address"))
    for name, text in {
        "no-json": b"{" + bytes(generator.randrange(256) for _ in range(200)),
        "list": b"[]",
        "number": b"7",
        "null": b"null",
        "strings": json.dumps({DOWN: "BF16"}).encode(),
        "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    }.items():
        yield from damaged(f"header-{name}", replace_header(text), ("profile", "stream", "plan", "locate"))
    for name, change in {
        "dtype-unknown": entry(dtype="F13"),
        "dtype-number": entry(dtype=3),
        "shape-negative": entry(shape=[-32, 24]),
        "shape-text": entry(shape="32x24"),
        "shape-larger": entry(shape=[3200, 2400]),
        "shape-float": entry(shape=[32.5, 24]),
        "offsets-reversed": lambda h: h[DOWN].update(data_offsets=h[DOWN]["data_offsets"][::-1]),
        "offsets-outside": entry(data_offsets=[2**40, 2**40 + 3072]),
        "offsets-negative": entry(data_offsets=[-3072, 0]),
        "offsets-shared": lambda h: h[DOWN].update(data_offsets=h[DOWN.replace(".3.", ".4.")]["data_offsets"]),
        "offsets-missing": lambda h: h[DOWN].pop("data_offsets"),
        "entry-missing": lambda h: h.pop(DOWN),
    }.items():
        yield from damaged(f"header-{name}", edit_header(change), ("profile", "stream", "plan", "locate"))


def bad_tensors() -> Iterator[Case]:
    for name, change in {
        "no-expert": lambda t: t.pop(DOWN),
        "no-router": lambda t: t.pop(ROUTER),
        "no-norm": lambda t: t.pop(NORM),
        "no-embedding": lambda t: t.pop("model.embed_tokens.weight"),
        "fewer-experts": lambda t: [t.pop(n) for n in list(t) if ".experts.7." in n],
        "transposed": lambda t: t.update({DOWN: t[DOWN].t().contiguous()}),
        "too-wide": lambda t: t.update({DOWN: torch.randn(64, 24)}),
        "flat": lambda t: t.update({DOWN: t[DOWN].flatten()}),
        "three-dimensional": lambda t: t.update({DOWN: t[DOWN][None]}),
        "empty": lambda t: t.update({DOWN: torch.empty(0, 24)}),
        "router-of-other-size": lambda t: t.update({ROUTER: torch.randn(5, 32)}),
        "integers": lambda t: t.update({DOWN: t[DOWN].to(torch.int32)}),
        "booleans": lambda t: t.update({DOWN: t[DOWN] > 0}),
        "bytes": lambda t: t.update({DOWN: t[DOWN].to(torch.int8)}),
    }.items():
        yield from damaged(f"tensor-{name}", edit_tensors(change), ("profile", "stream", "weights", "locate"))


def odd_tensors() -> Iterator[Case]:
    """Wrong numbers in sound files: measured, and said."""
    for name, value in {"nan": torch.nan, "inf": torch.inf, "minus-inf": -torch.inf, "huge": 1e30}.items():
        for tensor, where in ((DOWN, "expert"), (ROUTER, "router")):
            for case in damaged(
                f"weight-{name}-{where}",
                edit_tensors(lambda t, n=tensor, v=value: t[n].view(-1)[5:9].fill_(v)),
            ):
                yield Case(case.name, case.make, True, "" if name == "huge" else "non-finite values from L")


def bad_shards() -> Iterator[Case]:
    def first(model: Path) -> Path:
        return model / min(json.loads((model / INDEX).read_text())["weight_map"].values())

    def last(model: Path) -> Path:
        return model / max(json.loads((model / INDEX).read_text())["weight_map"].values())

    for name, harm in {
        "shard-missing": lambda m: first(m).unlink(),
        "shard-empty": lambda m: first(m).write_bytes(b""),
        "shard-folder": lambda m: (last(m).unlink(), last(m).mkdir()),
        "shard-dangling": lambda m: (last(m).unlink(), last(m).symlink_to(m / "nowhere")),
        "index-missing": lambda m: (m / INDEX).unlink(),
        "index-no-json": put_text(INDEX, "{"),
        "index-list": put_text(INDEX, "[]"),
        "index-empty": put_text(INDEX, "{}"),
        "index-map-empty": edit_json(INDEX, lambda d: d.update(weight_map={})),
        "index-no-map": edit_json(INDEX, lambda d: d.pop("weight_map")),
        "index-map-list": edit_json(INDEX, lambda d: d.update(weight_map=[])),
        "index-numbers": edit_json(INDEX, lambda d: d.update(weight_map=dict.fromkeys(d["weight_map"], 1))),
        "index-outside": edit_json(
            INDEX, lambda d: d.update(weight_map=dict.fromkeys(d["weight_map"], "../../etc/passwd"))
        ),
        "index-other-file": edit_json(
            INDEX, lambda d: d.update(weight_map=dict.fromkeys(d["weight_map"], "none.safetensors"))
        ),
        "index-wrong-shard": edit_json(
            INDEX, lambda d: d.update(weight_map=dict.fromkeys(d["weight_map"], max(d["weight_map"].values())))
        ),
        "index-utf16": lambda m: (m / INDEX).write_bytes((m / INDEX).read_text().encode("utf-16")),
    }.items():
        yield from damaged(name, harm, ("profile", "stream", "plan", "prune", "plan-address", "locate"), sharded=True)


def bad_configs() -> Iterator[Case]:
    for name, harm in {
        "missing": lambda m: (m / "config.json").unlink(),
        "no-json": put_text("config.json", "{'model_type': 'qwen3_moe'}"),
        "empty": put_text("config.json", ""),
        "list": put_text("config.json", "[1]"),
        "nothing-in-it": put_text("config.json", "{}"),
        "binary": put_text("config.json", bytes(range(256))),
        "no-model-type": edit_json("config.json", lambda d: d.pop("model_type")),
        "model-type-unknown": edit_json("config.json", lambda d: d.update(model_type="mixture-of-nothing")),
        "model-type-number": edit_json("config.json", lambda d: d.update(model_type=5)),
        "dense": edit_json("config.json", lambda d: d.update(model_type="qwen3", architectures=["Qwen3ForCausalLM"])),
        "vision": edit_json("config.json", lambda d: d.update(model_type="vit", architectures=["ViTModel"])),
        "experts-text": edit_json("config.json", lambda d: d.update(dict.fromkeys(EXPERTS & d.keys(), "eight"))),
        "experts-none": edit_json("config.json", lambda d: d.update(dict.fromkeys(EXPERTS & d.keys(), 0))),
        "experts-negative": edit_json("config.json", lambda d: d.update(dict.fromkeys(EXPERTS & d.keys(), -8))),
        "experts-more": edit_json("config.json", lambda d: d.update(dict.fromkeys(EXPERTS & d.keys(), 16))),
        "experts-fewer": edit_json("config.json", lambda d: d.update(dict.fromkeys(EXPERTS & d.keys(), 4))),
        "layers-more": edit_json("config.json", lambda d: d.update(num_hidden_layers=5)),
        "layers-none": edit_json("config.json", lambda d: d.update(num_hidden_layers=0)),
        "layers-text": edit_json("config.json", lambda d: d.update(num_hidden_layers="3")),
        "hidden-other": edit_json("config.json", lambda d: d.update(hidden_size=48)),
        "hidden-none": edit_json("config.json", lambda d: d.update(hidden_size=None)),
        "intermediate-other": edit_json("config.json", lambda d: d.update(moe_intermediate_size=32)),
        "top-k-too-large": edit_json("config.json", lambda d: d.update(num_experts_per_tok=9)),
        "top-k-none": edit_json("config.json", lambda d: d.update(num_experts_per_tok=0)),
        "activation-unknown": edit_json("config.json", lambda d: d.update(hidden_act="swosh")),
        "dtype-unknown": edit_json("config.json", lambda d: (d.pop("torch_dtype", 0), d.update(dtype="float13"))),
        "quantization-unknown": edit_json("config.json", lambda d: d.update(quantization_config={"quant_method": "q"})),
        "remote-code": edit_json(
            "config.json",
            lambda d: d.update(model_type="mine", auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}),
        ),
    }.items():
        yield from damaged(f"config-{name}", harm, ("profile", "stream", "plan", "locate-address"))


def bad_tokenizers() -> Iterator[Case]:
    for name, harm in {
        "missing": lambda m: [f.unlink() for f in m.glob("tokenizer*")],
        "no-json": put_text("tokenizer.json", "{"),
        "empty": put_text("tokenizer.json", ""),
        "list": put_text("tokenizer.json", "[]"),
        "nothing-in-it": put_text("tokenizer.json", "{}"),
        "config-no-json": put_text("tokenizer_config.json", "{"),
        "model-unknown": edit_json("tokenizer.json", lambda d: d["model"].update(type="Runes")),
        "no-vocabulary": edit_json("tokenizer.json", lambda d: d["model"].pop("vocab")),
        "ids-too-large": edit_json(
            "tokenizer.json", lambda d: d["model"].update(vocab={t: i + 90_000 for t, i in d["model"]["vocab"].items()})
        ),
    }.items():
        # The first token may have its row where others have none.
        also = ("prove",) if name == "ids-too-large" else ("locate", "prove")
        yield from damaged(f"tokenizer-{name}", harm, ("profile", "stream", *also))


def odd_tokenizers() -> Iterator[Case]:
    special = ("bos_token", "eos_token", "pad_token", "unk_token")

    def without(names):
        def harm(model: Path) -> None:
            edit_json("tokenizer_config.json", lambda d: [d.pop(n, None) for n in names])(model)

        return harm

    for names in (special[:1], special[1:2], special[2:3], special):
        for case in damaged("tokenizer-without-" + "-".join(n[:3] for n in names), without(names)):
            yield Case(case.name, case.make, served=True)
    for name, harm in {
        "adds-nothing": edit_json("tokenizer.json", lambda d: d.update(post_processor=None)),
        "class-unknown": edit_json("tokenizer_config.json", lambda d: d.update(tokenizer_class="NoSuchTokenizer")),
    }.items():
        for case in damaged(f"tokenizer-{name}", harm):
            yield Case(case.name, case.make, served=True)


def data(name: str, content: bytes, suffix: str = ".txt", served: bool = False) -> Case:
    def make(folder: Path, sound: Sound) -> list:
        file = folder / f"data{suffix}"
        file.write_bytes(content)
        return ["profile", sound.single, "-o", folder / "out", "--data", file, *SMALL]

    return Case(f"data-{name}", make, served)


def bad_data() -> Iterator[Case]:
    yield data("empty", b"")
    yield data("blank", b" \n\t\n")
    yield data("too-short", b"word")
    yield data("no-utf8", b"good text " * 50 + b"\xff\xfe\x00")
    yield data("lone-continuation", b"\x80" * 400)
    for name, line in {
        "no-json": b"{",
        "list": b"[1, 2]",
        "number": b"5",
        "other-keys": b'{"title": "x", "n": 3}',
        "text-number": b'{"text": 5}',
        "text-null": b'{"text": null}',
        "messages-number": b'{"messages": 5}',
        "utf16": '{"text": "word"}'.encode("utf-16"),
    }.items():
        yield data(f"jsonl-{name}", line + b"\n", ".jsonl")
    yield data("parquet-no-parquet", b"PAR1 not really", ".parquet")
    yield data("parquet-empty", b"", ".parquet")
    for name, path in {"missing": "nowhere.txt", "empty-name": "", "nul": "a\0b", "long": "x" * 5000}.items():
        yield Case(
            f"data-path-{name}", lambda f, s, path=path: ["profile", s.single, "-o", f / "out", "--data", path, *SMALL]
        )
    text = "A quiet harbour, a long line of boats. " * 60
    for name, hostile in {
        "markup": "[bold]x[/bold] [/] [red] [link=file:///]y[/link] ",
        "html": "<script>alert(1)</script> &amp; \"' ",
        "control": "\x1b[31m\x1b]0;title\x07 \b\b\b \x00 \x7f ",
        "direction": "\u202eesrever\u202c \u200f ",
        "noncharacters": "\ufffe \uffff \U0010ffff \ufeff ",
        "long-word": "a" * 3000,
        "combining": "e" + "\u0301" * 500,
        "crlf": "one\r\ntwo\rthree\u2028four\u2029five\x0csix ",
        "special": "<|bos|><|eos|><|pad|><s></s> ",
        "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 " * 20,
    }.items():
        yield data(f"text-{name}", (hostile * 5 + text).encode(), served=True)
    yield data("text-lone-surrogate", json.dumps({"text": "\ud800 " + text}).encode(), ".jsonl")


def bad_outputs() -> Iterator[Case]:
    def to(name: str, place: Callable[[Path], object], command: str = "profile") -> Case:
        def make(folder: Path, sound: Sound) -> list:
            out = place(folder)
            if command == "profile":
                return ["profile", sound.single, "-o", out, *SMALL]
            if command in ("prune", "prove"):
                return [command, sound.single, "-o", out, *SMALL]
            if command == "locate":
                return [command, sound.single, "-o", out]
            return [command, sound.profile, *({"export": ["--to", "llm-compressor"]}.get(command, [])), "-o", out]

        return Case(f"output-{name}-{command}", make)

    def in_the_way(folder: Path) -> Path:
        (folder / "file").write_text("mine")
        return folder / "file"

    def a_pipe(folder: Path) -> Path:
        os.mkfifo(folder / "pipe")
        return folder / "pipe"

    for command in ("profile", "prune", "prove", "locate"):
        yield to("is-a-file", in_the_way, command)
        yield to("below-a-file", lambda f: in_the_way(f) / "out", command)
        yield to("too-long", lambda f: f / ("x" * 300), command)
        yield to("nul", lambda f: f"{f}/a\0b", command)
        yield to("proc", lambda f: "/proc/nowhere/out", command)
    for command in ("rank", "export", "report"):
        yield to("below-a-file", lambda f: in_the_way(f) / "out", command)
        yield to("is-a-pipe", a_pipe, command)
        yield to("is-a-folder", lambda f: f, command)


def bad_results() -> Iterator[Case]:
    """Files of results that are damaged, of other versions, or of another model."""

    def on_stats(
        name: str, harm: Callable[[Path], object], only=("rank", "export", "report", "merge", "prove")
    ) -> Iterator[Case]:
        for command in only:

            def make(folder: Path, sound: Sound, command: str = command) -> list:
                results = Path(shutil.copytree(sound.profile, folder / "results"))
                harm(results)
                extra = {"export": ["--to", "llm-compressor"], "merge": ["-o", folder / "merged.safetensors"]}
                extra["prune"] = ["-o", folder / "out"]
                if command in ("prune", "prove"):
                    small = SMALL if command == "prove" else ()
                    return [command, sound.single, "--stats", results, "-o", folder / "out", *small]
                given = results / "stats.safetensors" if command == "merge" else results
                return [command, given, *extra.get(command, [])]

            yield Case(f"{name}-{command}", make)

    stats = "stats.safetensors"

    def metadata(change: Callable[[dict], object]) -> Callable[[Path], None]:
        def harm(folder: Path) -> None:
            header, body = header_of(folder / stats)
            change(header["__metadata__"])
            put_header(folder / stats, header, body)

        return harm

    def tensor(change: Callable[[dict], object]) -> Callable[[Path], None]:
        def harm(folder: Path) -> None:
            header, _ = header_of(folder / stats)
            tensors = load_file(folder / stats)
            change(tensors)
            save_file(tensors, folder / stats, header["__metadata__"])

        return harm

    rows = "decoder.1.routed/rows"
    for name, harm in {
        "stats-missing": lambda f: (f / stats).unlink(),
        "stats-empty": lambda f: (f / stats).write_bytes(b""),
        "stats-truncated": lambda f: (f / stats).write_bytes((f / stats).read_bytes()[:-100]),
        "stats-no-metadata": metadata(lambda m: m.clear()),
        "stats-version": metadata(lambda m: m.update(version="99")),
        "stats-format": metadata(lambda m: m.update(format="pt")),
        "stats-of-weights": lambda f: save_file({"a": torch.zeros(3)}, f / stats, {"format": "pt"}),
        "stats-header-no-json": metadata(lambda m: m.update({k: "{" for k in m if k not in ("format", "version")})),
        "stats-rows-missing": tensor(lambda t: t.pop(rows)),
        "stats-rows-float": tensor(lambda t: t.update({rows: t[rows].float()})),
        "stats-rows-short": tensor(lambda t: t.update({rows: t[rows][:3].clone()})),
        "stats-name-unknown": tensor(lambda t: t.update({"decoder.one.routed/rows": t[rows].clone()})),
    }.items():
        yield from on_stats(name, harm)
    for file in ("residual.json", "run.json"):
        for name, text in {
            "no-json": "{",
            "list": "[]",
            "version": json.dumps({"format": "sedetect-" + file.split(".")[0], "version": "99"}),
            "no-fields": json.dumps({"format": "sedetect-" + file.split(".")[0], "version": "1"}),
            "binary": "\x00\x01",
        }.items():
            yield from on_stats(f"{file}-{name}", put_text(file, text), ("report",))
    for text in ("{", "[]", json.dumps({"format": "sedetect-proof", "version": "99"}), "\x00\x01"):
        yield from on_stats(f"proof.json-{text[:20]!r}", put_text("proof.json", text), ("rank", "export", "report"))
    yield from on_stats("stats-of-another-model", other_model, ("prune", "prove"))


def other_model(results: Path) -> None:
    header, body = header_of(results / "stats.safetensors")
    for key, value in header["__metadata__"].items():
        if value.startswith("{"):
            document = json.loads(value)
            document["digest"] = "0" * 16
            header["__metadata__"][key] = json.dumps(document)
    put_header(results / "stats.safetensors", header, body)


def bad_numbers() -> Iterator[Case]:
    for flag, values in {
        "--tokens": (0, -5, "many", "1e3"),
        "--seq-len": (0, 1, -1, 10**6),
        "--batch-size": (0, -1, "8.5"),
        "--seed": (-1, "x"),
        "--residual": (-1,),
        "--dtype": ("float13", "int8"),
        "--device": ("gpu9", "cuda:77", ""),
        "--backend": ("fast",),
        "--attn": ("nowhere",),
    }.items():
        for value in values:
            yield Case(
                f"number{flag}-{value}",
                lambda f, s, flag=flag, value=value: ["profile", s.single, "-o", f / "out", *SMALL, flag, value],
            )
    for flag, value in (("--ratio", 1.0), ("--ratio", -0.1), ("--ratio", "nan"), ("--by", "beauty")):
        yield Case(
            f"number{flag}-{value}",
            lambda f, s, flag=flag, value=value: ["prune", s.single, "-o", f / "out", *SMALL, flag, value],
        )
    for flag, value in (
        ("--smallest", 0), ("--smallest", "nan"),
        ("--level", 0), ("--level", 1), ("--tokens", 0), ("--stats", "nowhere"),
        ("--experts", "L9E9"), ("--experts", "largest"), ("--data", "nowhere.txt"), ("--seq-len", 1),
    ):  # fmt: skip
        yield Case(
            f"number-prove{flag}-{value}",
            lambda f, s, flag=flag, value=value: ["prove", s.single, "-o", f / "out", *SMALL, flag, value],
        )
    for flag, value in (
        ("--first-tokens", "-1"), ("--first-tokens", 10**6), ("--first-tokens", "two words"), ("--dtype", "int8"),
    ):  # fmt: skip
        yield Case(
            f"number-locate{flag}-{value}",
            lambda f, s, flag=flag, value=value: ["locate", s.single, "-o", f / "out", flag, value],
        )
    cache = ["--cache", "/proc/nowhere"]
    yield Case("cache-proc-locate", lambda f, s: [*commands(s.single, f, s.server)["locate-address"], *cache])
    for name, address in {
        "nobody": "http://127.0.0.1:9/model", "scheme": "ftp://127.0.0.1/model", "port": "http://127.0.0.1:99999/model",
        "nothing": "http://", "no-model": None,
    }.items():  # fmt: skip
        for command in ("locate", "plan"):
            yield Case(
                f"address-{name}-{command}",
                lambda f, s, c=command, a=address: [c, s.server.files("nowhere") if a is None else a],
            )
    for flag, value in (("--percentile", 100), ("--fraction", 0), ("--layers", "x"), ("--min-value", "inf")):
        yield Case(f"number{flag}-{value}", lambda f, s, flag=flag, value=value: ["rank", s.profile, flag, value])


GENERATORS = (
    bad_weights,
    bad_tensors,
    odd_tensors,
    bad_shards,
    bad_configs,
    bad_tokenizers,
    odd_tokenizers,
    bad_data,
    bad_outputs,
    bad_results,
    bad_numbers,
)
CASES = [case for generator in GENERATORS for case in generator()]
