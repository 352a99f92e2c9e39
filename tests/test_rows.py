"""Which row is which token: every way a model is fed, against what was fed."""

import importlib
import inspect

import pytest
import torch
import transformers
from support.conformance import available
from support.families import discover
from support.models import random_model

import sedetect
from sedetect.errors import SedetectError
from sedetect.kernels.records import column
from sedetect.models.row_context import (
    UNMAPPED_CACHE,
    UNMAPPED_INPUT,
    UNMAPPED_MASK,
    UNMAPPED_PACKED,
    UNMAPPED_RESIZED,
    RowTracker,
    unknown_caches,
    unmapped_unknown,
)

TOP_K = 2
EOS, PAD = 2, 0


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3_moe")


def sequences(*lengths, seed=0):
    """Token ids from 3 on: never BOS, EOS or PAD."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (n,), generator=generator) for n in lengths]


def padded(texts, side):
    width = max(map(len, texts))
    ids, mask = torch.full((len(texts), width), PAD), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, where], mask[row, where] = text, 1
    return ids, mask


def assert_rows(stats, texts, tokens_known=True):
    """Every layer counted exactly these texts, and every kept row is a token of them at its place.

    texts: sequence id -> its counted tokens.
    """
    total = sum(map(len, texts.values()))
    assert stats.header.tokens == total and stats.header.sequences == len(texts)
    assert len(stats.banks) == 3
    for state in stats.banks.values():
        assert state.rows.sum() == total * TOP_K
        assert state.first_rows.sum() == len(texts) * TOP_K
        for name in ("outliers", "first_outliers", "in_max"):
            records = getattr(state, name)
            kept = records[column(records, "value") >= 0]
            places = zip(*(column(kept, part).tolist() for part in ("sequence", "position", "token_id")))
            for sequence, position, token in places:
                assert token == (int(texts[sequence][position]) if tokens_known else -1)
                assert (position == 0) == (name == "first_outliers") or name == "in_max"
    assert not [note for note in stats.header.notes if "not mapped" in str(note)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batches", [1, 2])
def test_padding(model, side, batches):
    texts = sequences(5, 11, 8)
    ids, mask = padded(texts, side)
    with sedetect.profile(model) as prof:
        for _ in range(batches):
            model(input_ids=ids, attention_mask=mask)
    assert_rows(prof.stats, dict(enumerate(texts * batches)))
    assert next(iter(prof.stats.header.sources.values())).ranges == [[0, 3 * batches]]


def test_positional_arguments_and_no_mask(model):
    texts = sequences(9, 9)
    with sedetect.profile(model) as prof:
        model(torch.stack(texts))
    assert_rows(prof.stats, dict(enumerate(texts)))


def test_inputs_embeds(model):
    texts = sequences(6, 9)
    ids, mask = padded(texts, "right")
    with sedetect.profile(model) as prof:
        model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    assert_rows(prof.stats, dict(enumerate(texts)), tokens_known=False)


def cache_names(model):
    """past_key_values, which every release takes, and what the installed one calls it."""
    return sorted({"past_key_values", *({"cache"} & set(inspect.signature(model.forward).parameters))})


def test_decoding_by_hand_continues_the_sequences_of_its_cache(model):
    texts = sequences(7, 7)
    ids = torch.stack(texts)
    for name in cache_names(model):
        with sedetect.profile(model) as prof:
            cache = model(input_ids=ids[:, :4], use_cache=True)[name]
            model(input_ids=ids[:, 4:6], **{name: cache})
            model(input_ids=sequences(3, seed=1)[0][None])  # another sequence between
            model(input_ids=ids[:, 6:], **{name: cache})
        assert_rows(prof.stats, {0: texts[0], 1: texts[1], 2: sequences(3, seed=1)[0]})


def test_a_cache_that_a_tuple_holds(model):
    text = sequences(7)[0]
    with sedetect.profile(model) as prof:
        cache = model(input_ids=text[None, :4], use_cache=True, return_dict=False)[1]
        model(input_ids=text[None, 4:], past_key_values=cache)
    assert_rows(prof.stats, {0: text})


def test_a_cache_is_told_by_what_it_does(model):
    """Under any name, so that one that a release brings is seen before it is in the table."""
    text, tracker = sequences(7)[0], RowTracker(model)
    cache = transformers.DynamicCache(config=model.config)
    for begin, end in ((0, 4), (4, 7)):
        rows = tracker.begin((), {"input_ids": text[None, begin:end], "memory_of_keys": cache})
        assert rows.position.tolist() == list(range(begin, end)) and not rows.sequence.any()
        keys = torch.zeros(1, 2, end - begin, 8)
        for layer in range(3):
            cache.update(keys, keys, layer)
        tracker.end(None)
    assert not tracker.notes


@pytest.mark.parametrize("name", ["past_key_values", "layer_past", "cache_of_keys"])
def test_what_is_no_cache_that_is_known_is_said(model, name):
    old = ((torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)),)
    tracker = RowTracker(model)
    assert tracker.begin((), {"input_ids": torch.tensor([[5]]), name: old}) is None
    assert tracker.notes == {unmapped_unknown(name)}
    for value in (None, False, True):
        assert RowTracker(model).begin((), {"input_ids": torch.tensor([[5]]), name: value}) is not None


def test_a_model_that_remembers_unseen_is_said(model):
    """generate() that feeds less than the whole prefix, without a cache in the arguments."""
    ids, tracker = torch.stack(sequences(6, 6)), RowTracker(model)
    with tracker.generating((ids,), {}):
        assert tracker.begin((), {"input_ids": ids}).counted.all()
        assert tracker.begin((), {"input_ids": ids[:, -1:]}) is None
    assert tracker.notes == {UNMAPPED_CACHE}


@pytest.mark.parametrize("name", sorted({name.partition(":")[0] for name in available()} | set(discover())))
def test_every_cache_of_a_forward_is_known(name):
    """An argument of a Mixture-of-Experts model that is called like a cache is one that the rows are followed by."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    models = {c: inspect.signature(c.forward).parameters for c in own if issubclass(c, transformers.PreTrainedModel)}
    readers = {c: names for c, names in models.items() if {"input_ids", "decoder_input_ids"} & set(names)}
    assert readers
    assert not {c.__name__: unknown_caches(names) for c, names in readers.items() if unknown_caches(names)}


def test_a_prompt_that_is_all_padding_at_first(model):
    """The first token is the first counted one, wherever it is fed."""
    text = sequences(4)[0]
    with sedetect.profile(model) as prof:
        cache = model(
            input_ids=torch.full((1, 3), PAD), attention_mask=torch.zeros(1, 3, dtype=torch.int64), use_cache=True
        ).past_key_values
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
        model(input_ids=text[None], attention_mask=mask, past_key_values=cache)
    assert_rows(prof.stats, {0: text})


def generate(model, ids, mask, eos, pad, **settings):
    """(stats, sequence id -> tokens that should count): the model generates 8 tokens, greedily."""
    with sedetect.profile(model) as prof:
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=pad,
            **settings,
        )  # fmt: skip
    repeat = len(out) // len(ids)
    expected = {}
    for row, line in enumerate(out):
        prompt = ids[row // repeat][mask[row // repeat] == 1]
        fed = line[ids.shape[1] : -1].tolist()  # the last token is never fed back
        if eos in fed:
            fed = fed[: fed.index(eos) + 1]
        expected[row] = torch.cat((prompt, torch.tensor(fed, dtype=torch.int64)))
    return prof.stats, expected


@pytest.fixture(scope="module")
def eos(model):
    """A token that ends the three prompts of test_generate at different steps."""
    ids, mask = padded(sequences(5, 11, 8), "left")
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    return int(out[1, 11 + 3])


@pytest.mark.parametrize("pad", ["eos", "other"])
@pytest.mark.parametrize(
    "settings",
    [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_return_sequences": 1}],
    ids=["cache", "no-cache", "static", "default"],
)
def test_generate(model, eos, pad, settings):
    ids, mask = padded(sequences(5, 11, 8), "left")
    stats, expected = generate(model, ids, mask, eos, eos if pad == "eos" else PAD, **settings)
    lengths = [len(expected[row]) - n for row, n in enumerate((5, 11, 8))]
    assert lengths[1] < max(lengths), "the case needs sequences that end at different steps"
    assert_rows(stats, expected)


def test_generate_several_per_prompt(model, eos):
    ids, mask = padded(sequences(5, 8), "left")
    stats, expected = generate(model, ids, mask, eos, PAD, num_return_sequences=2, num_beams=2)
    assert stats.header.sequences == 4 and len(expected) == 4


def test_generate_infers_the_mask_from_padding(model):
    """With a static cache the model sees a 4-D mask alone; generate() took padding from the pad token."""
    texts = sequences(5, 11)
    ids, _ = padded(texts, "left")
    with sedetect.profile(model) as prof:
        model.generate(
            input_ids=ids, max_new_tokens=1, pad_token_id=PAD, eos_token_id=EOS, cache_implementation="static"
        )
    assert_rows(prof.stats, dict(enumerate(texts)))


def test_generate_twice_begins_new_sequences(model):
    texts = sequences(6, 6)
    with sedetect.profile(model) as prof:
        for _ in range(2):
            model.generate(
                input_ids=torch.stack(texts), max_new_tokens=1, eos_token_id=None, cache_implementation="static"
            )
    assert_rows(prof.stats, dict(enumerate(texts * 2)))


def test_generate_continues_a_conversation(model):
    """A second generate() with the first one's cache: its prompt was counted already, the new turn was not."""
    first = sequences(6)[0][None]
    with sedetect.profile(model) as prof:
        turn = model.generate(input_ids=first, max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True)
        longer = torch.cat((turn.sequences, sequences(4, seed=3)[0][None]), dim=1)
        last = model.generate(
            input_ids=longer, past_key_values=turn.past_key_values, max_new_tokens=3, eos_token_id=None
        )  # fmt: skip
    assert_rows(prof.stats, {0: last[0, :-1]})


def test_a_four_dimensional_mask_alone_cannot_be_mapped(model):
    ids = torch.stack(sequences(6, 6))
    mask = torch.zeros(2, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), torch.finfo(torch.float32).min)
    with sedetect.profile(model) as prof:
        model(input_ids=ids, attention_mask=mask)
    assert_unmapped(prof.stats, 12, UNMAPPED_MASK)


def test_a_forward_without_known_inputs_cannot_be_mapped(model):
    with sedetect.profile(model) as prof:
        model.model(input_ids=torch.stack(sequences(6, 6)))  # below the top-level call
    for state in prof.stats.banks.values():
        assert state.rows.sum() == 12 * TOP_K and state.first_rows.sum() == 0
    with pytest.raises(ValueError), sedetect.profile(model) as prof:
        model()
    assert UNMAPPED_INPUT in prof.stats.header.notes


def assert_unmapped(stats, tokens, note):
    assert note in stats.header.notes
    for state in stats.banks.values():
        assert state.rows.sum() == tokens * TOP_K and state.first_rows.sum() == 0
        kept = state.outliers[column(state.outliers, "value") >= 0]
        assert len(kept) and (column(kept, "position") == -1).all() and (column(kept, "token_id") == -1).all()
    assert sedetect.rank(stats).super_experts[0].signature is None


class Halves(torch.nn.Module):
    """Calls its experts twice, as a module does that sends text and image tokens apart."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, index, weights):
        cut = len(x) // 3
        return torch.cat([self.experts(x[s], index[s], weights[s]) for s in (slice(None, cut), slice(cut, None))])


def test_a_module_that_regroups_tokens_cannot_be_mapped():
    model = random_model("qwen3_moe")
    block = model.model.layers[1].mlp
    block.experts = Halves(block.experts)
    with sedetect.profile(model) as prof:
        model(input_ids=torch.stack(sequences(6, 6)))
    whole, split = (prof.stats.banks[bank] for bank in sorted(prof.stats.banks)[:2])
    assert whole.first_rows.sum() == 2 * TOP_K
    assert split.first_rows.sum() == 0 and split.rows.sum() == 12 * TOP_K
    kept = split.outliers[column(split.outliers, "value") >= 0]
    assert (column(kept, "position") == -1).all()
    assert [note for note in prof.stats.header.notes if note.code == "regrouped"]


def test_packed_sequences(model):
    """Several sequences in one row: unmapped, until prof.batch says which token is whose."""
    texts = sequences(5, 7, 4)
    ids = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(t)) for t in texts])[None]
    owner = torch.cat([torch.full((len(t),), 40 + i) for i, t in enumerate(texts)])[None]
    with sedetect.profile(model) as prof:
        model(input_ids=ids, position_ids=positions)
    assert_unmapped(prof.stats, 16, UNMAPPED_PACKED)
    for given in ({}, {"positions": positions}):
        with sedetect.profile(model) as prof:
            prof.batch(sequence_ids=owner, **given)
            model(input_ids=ids, position_ids=positions)
        assert_rows(prof.stats, {40 + i: text for i, text in enumerate(texts)})
        assert next(iter(prof.stats.header.sources.values())).ranges == [[40, 43]]


def test_explicit_mask_and_ids(model):
    texts = sequences(5, 9)
    ids, mask = padded(texts, "right")
    with sedetect.profile(model) as prof:
        prof.batch(sequence_ids=[7, 3], mask=mask)
        model(input_ids=ids)
    assert_rows(prof.stats, {7: texts[0], 3: texts[1]})
    with sedetect.profile(model) as prof, pytest.raises(SedetectError, match="2 sequence_ids for a batch of 3"):
        prof.batch(sequence_ids=[1, 2])
        model(input_ids=torch.stack(sequences(4, 4, 4)))


def test_a_cache_continued_with_another_batch_size(model):
    with sedetect.profile(model) as prof:
        cache = model(input_ids=torch.stack(sequences(4, 4)), use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert UNMAPPED_RESIZED in prof.stats.header.notes
    assert all(state.rows.sum() == 9 * TOP_K for state in prof.stats.banks.values())


def test_sequences_without_the_prefix_are_noted(model):
    bare = torch.stack(sequences(6, 6, 6))
    bare[0, 0] = 1
    with sedetect.profile(model, prefix=1) as prof:
        model(input_ids=bare)
    assert any(
        str(note).startswith("2 of 3 sequences") and note.code == "no_prefix" for note in prof.stats.header.notes
    )
