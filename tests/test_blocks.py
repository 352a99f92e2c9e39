"""Every block of commands or Python in the README and the documentation runs, where the names that it uses exist.

The blocks of a page run in their order, on little text. Commands that need a GPU, several processes or a server are
parsed by the command line instead, and the options of scripts are looked up in them.
"""

import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.checkpoints import put_model
from support.command import run
from support.models import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from typer.main import get_command

import sedetect
from sedetect.cli import load
from sedetect.profiling import proving

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCK = re.compile(r"(?<=\n\n)(?: {4}\S.*\n(?: {4}.*\n|\n(?= {4}))*|```(\w+)\n(?:.*\n)*?```)")
COMMAND = re.compile(r"\$ |sedetect |python |torchrun |pip |make |vllm |ray |[A-Z_]+=\S+ vllm ")
# Blocks of something else, by their first words: drawings, formulas, output that stands by itself, lists.
OTHERS = (
    "L1E28: ...;", "x ── router", "disk --read", "time of a layer =", "DeepseekV3ForCausalLM:", "sedetect COMMAND",
    "sedetect/  ", "model = AutoModelForCausalLM", '{"messages"',
)  # fmt: skip
# Commands that are parsed and not run, by a part of them, and why.
PARSED = {
    "--revisions": "the hub has the revisions",
    "--for vllm --protect": "vLLM runs the checkpoints",
    "QUANTIZED --for vllm": "vLLM runs the checkpoints",
    "chats.jsonl": "a processor reads them: tests/test_images.py",
    "watch": "a server of vLLM answers: tests/test_vllm.py",
}
PARSED_PYTHON = {
    "vllm.LLM": "vLLM runs the model: tests/test_vllm.py",
    "oneshot(": "llm-compressor has an environment of its own: benchmarks/bench_quantizers.py",
}
LITTLE = {"--tokens": 512, "--seq-len": 32, "--pairs": 4, "--controls": 1}


class Block(NamedTuple):
    language: str | None  # None if the block is indented
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """Words of each command; what it prints, and what follows a #, is left out."""
        lines = self.text.replace("\\\n", "").splitlines()
        asked = [line[2:] for line in lines if line.startswith("$ ")] or lines
        return [words for line in asked if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    found = []
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        text = block[0].partition("\n")[2].removesuffix("```") if block[1] else re.sub("(?m)^ {4}", "", block[0])
        if not text.startswith(OTHERS):
            found.append(Block(block[1], text))
    return found


def options_of(words: list[str]) -> set[str]:
    """Those that a command has. Parses it: unknown options and wrong values are errors."""
    command, (name, *rest) = get_command(load()), words
    while name in getattr(command, "commands", {}):
        command = command.commands[name]
        name, *rest = rest or [""]
    command.make_context("sedetect", [name, *rest])
    return {option for one in command.params for option in one.opts}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A model of shapes that every quantizer takes, whose L1E28 has the largest outputs, and results of it."""
    folder = tmp_path_factory.mktemp("documented")
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 32, "max_position_embeddings": 512}
    put_model(folder / "model", **sizes)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[28] *= 1e5
    model.save_pretrained(folder / "model")
    assert run("profile", folder / "model", "--tokens", 1024, "--seq-len", 64, "-o", folder / "results").code == 0
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path, monkeypatch):
    """The current folder: checkpoints, results and data under the names of the pages."""
    series = ("checkpoints/checkpoint-100", "checkpoints/checkpoint-200", "a/checkpoint-100", "b/checkpoint-200")
    models = ("MODEL", "FOLDER", "BASE", "QUANTIZED", "MODEL-W4A16", "runs/NAME/model", *series)
    names = dict.fromkeys(models, checkpoint / "model")
    for name, target in (
        names | dict.fromkeys(("tests/data/tiny-moe", "quantized", "deepseek-ai/DeepSeek-R1"), TINY)
    ).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    for name in ("DIR", "STATS", "OUT"):
        shutil.copytree(checkpoint / "results", tmp_path / name)
    (tmp_path / "held-out.jsonl").write_text(
        "".join(json.dumps({"text": f"The {n}th boat came in late, as always. " * 9}) + "\n" for n in range(40))
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(proving, "Proving", partial(proving.Proving, tokens=64))
    return tmp_path


def run_python(page: str, text: str) -> None:
    program = compile(text, page, "exec")
    if any(part in text for part in PARSED_PYTHON):
        return
    model, tokenizer = AutoModelForCausalLM.from_pretrained("MODEL").eval(), AutoTokenizer.from_pretrained("MODEL")
    texts = [tokenizer(text, return_tensors="pt") for text in ("The sea was calm.", "def add(a, b):")]
    names = {
        "sedetect": sedetect,
        "model": model,
        "tokenizer": tokenizer,
        "batches": [(one["input_ids"], one["attention_mask"]) for one in texts] if page == "python.md" else texts,
        "trainer": Trainer(model, TrainingArguments("run", report_to=[], use_cpu=True)),
    }
    exec(program, names)


def run_command(words: list[str]) -> None:
    """With less text where the command takes an amount."""
    options = options_of(words)
    little = [word for name, value in LITTLE.items() if name in options for word in (name, value)]
    if words[0] == "prune":
        shutil.rmtree("OUT")
    code, out, err = run(*words, *little)
    assert code == 0, f"{shlex.join(words)}: {out}{err}"
    if "-o" in words:
        assert Path(words[words.index("-o") + 1]).exists()


@pytest.mark.parametrize("page", [name for name, page in PAGES.items() if blocks(page)])
def test_blocks(page, folder):
    for block in blocks(PAGES[page]):
        if block.language:
            assert block.language == "python"
            run_python(page, block.text)
            continue
        for words in block.commands:
            line = shlex.join(words)
            if words[0] == "torchrun":
                options_of(words[words.index("sedetect") + 1 :])
            elif words[0] == "python":
                script = (ROOT / words[1]).read_text(encoding="utf-8")
                assert all(word.lstrip("-") in script for word in words if word.startswith("--")), line
            elif words[0] == "sedetect":
                (options_of if any(part in line for part in PARSED) else run_command)(words[1:])
            else:
                assert words[0] in ("pip", "make", "ray", "vllm") or words[1] == "vllm", line


def test_no_block_escapes():
    """One that begins with neither a command nor a name of OTHERS; and what OTHERS and PARSED name is there."""
    texts = {name: page.read_text(encoding="utf-8") for name, page in PAGES.items()}
    unknown = [
        f"{name}: {block.text.splitlines()[0]}"
        for name, page in PAGES.items()
        for block in blocks(page)
        if not block.language and not COMMAND.match(block.text)
    ]
    assert not unknown, "begin them with a command, or name them in OTHERS"
    assert all(any(part in text for text in texts.values()) for part in (*OTHERS, *PARSED, *PARSED_PYTHON))
