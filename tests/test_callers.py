"""Whoever calls the model: the same counts and the same verdict as a plain loop over the same tokens."""

import pytest
import torch
from support.models import TINY, small_cache
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

import sedetect

TEXTS = [
    "The sea was calm that morning and the boats lay still in the harbour.",
    "def add(a, b):\n    return a + b\n",
    "It rained.",
    "She had written the letter twice before, and both times she had burned it in the stove.",
    "for name in sorted(names):\n    print(name)\n",
    "No one answered the door",
]
NEW = 6


@pytest.fixture(scope="module")
def model():
    # Eager, as continuous batching is in the absence of flash attention.
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY, padding_side="left")
    tokenizer.pad_token = tokenizer.bos_token  # tiny-moe has none of its own
    return tokenizer


def plain(model, texts):
    """Statistics of token lists, fed one by one."""
    with sedetect.profile(model, prefix=0) as prof:
        for ids in texts:
            model(input_ids=torch.tensor([ids]))
    assert prof.stats.header.tokens == sum(map(len, texts)) and not prof.stats.header.notes
    return prof.stats


def assert_same(stats, wanted, notes=()):
    assert [note.code for note in stats.header.notes] == list(notes)
    assert stats.header.tokens == wanted.header.tokens and stats.header.sequences == wanted.header.sequences
    for bank, state in wanted.banks.items():
        assert torch.equal(stats.banks[bank].rows, state.rows)
        assert torch.equal(stats.banks[bank].first_rows, state.first_rows)
        for name in ("out_max", "gate_norm_sum", "gate_first_sum"):
            assert torch.allclose(getattr(stats.banks[bank], name), getattr(state, name), rtol=1e-3, atol=1e-3)
    found, right = (sedetect.rank(one) for one in (stats, wanted))
    described = [
        [(str(s), s.verdict, s.signature, s.position, s.token_id) for s in one.super_experts] for one in (found, right)
    ]
    assert described[0] == described[1] and described[1][0][:2] == ("L1E28", "candidate")


@pytest.fixture(scope="module")
def generated(model):
    """What the model makes of each text alone, greedily, without the last token, which it does not see."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    texts = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    return [model.generate(**text, **settings)[0, :-1].tolist() for text in texts]


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generate(model, tokenizer, generated, settings):
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with sedetect.profile(model, prefix=0) as prof:
        model.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **settings)
    assert_same(prof.stats, plain(model, generated))


def test_generate_batch(model, tokenizer, generated):
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=1, pad_token_id=0)
    with sedetect.profile(model, prefix=0) as prof:
        model.generate_batch(inputs=prompts, generation_config=settings, continuous_batching_config=small_cache())
    assert_same(prof.stats, plain(model, generated), notes=["paged"])


def test_pipeline(model, tokenizer, generated):
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    with sedetect.profile(model, prefix=0) as prof:
        generator(TEXTS, batch_size=3, max_new_tokens=NEW, do_sample=False)
    assert_same(prof.stats, plain(model, generated))


class Encoded(Dataset):
    def __init__(self, tokenizer):
        self.lines = [tokenizer(text) for text in TEXTS]

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        return self.lines[index]


@pytest.mark.parametrize("side", ["left", "right"])
def test_trainer_evaluates(model, tokenizer, tmp_path, side):
    tokenizer.padding_side = side
    data = Encoded(tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=tmp_path, per_device_eval_batch_size=4, report_to=[], use_cpu=True),
        eval_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    with sedetect.profile(model, prefix=0) as prof:
        trainer.evaluate()
    assert_same(prof.stats, plain(model, [line["input_ids"] for line in data]))


def test_lm_eval(model, tokenizer):
    """HFLM pads on the right with token 0, here BOS as well, and gives no mask."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [(text[:-9], text[-9:]) for text in TEXTS]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=128, add_bos_token=True)
    encoded = [harness._encode_pair(*pair) for pair in pairs]
    wanted = plain(model, [(context + continuation)[:-1] for context, continuation in encoded])
    with sedetect.profile(model, prefix=0, pad_token_id=0) as prof:
        harness.loglikelihood(requests, disable_tqdm=True)
    assert_same(prof.stats, wanted)
    with sedetect.profile(model, prefix=0) as prof:
        harness.loglikelihood(requests, disable_tqdm=True)
    assert prof.stats.header.tokens > wanted.header.tokens
    assert [note.code for note in prof.stats.header.notes] == ["padding"]
    assert "profile(pad_token_id=0)" in str(prof.stats.header.notes[0])
