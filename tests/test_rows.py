"""Which row is which token: every way a model is fed, against what was fed."""

import copy
import gc
import importlib
import inspect

import pytest
import torch
import transformers
from support.conformance import available
from support.families import discover
from support.models import random_model, small_cache
from torch.utils._python_dispatch import TorchDispatchMode

import sedetect
from sedetect.errors import SedetectError
from sedetect.kernels.records import column
from sedetect.models.caches import unknown_caches
from sedetect.models.row_context import (
    PAGED,
    UNMAPPED_CACHE,
    UNMAPPED_INPUT,
    UNMAPPED_MASK,
    UNMAPPED_PACKED,
    UNMAPPED_RESIZED,
    UNMAPPED_SHAPE,
    RowTracker,
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


def dynamic(model):
    return transformers.DynamicCache(config=model.config)


def static(model):
    return transformers.StaticCache(config=model.config, max_cache_len=32)


def empty(cache):
    """reset(), which in transformers 5.17 leaves a dynamic cache as long as it was, full of zeros."""
    cache.reset()
    if isinstance(cache, transformers.DynamicCache):
        for layer in cache.layers:
            if layer.is_initialized:
                layer.crop(-layer.keys.shape[-2])


# gpt_oss: the first layer's window slides, and the static cache counts on the host.
CACHES = [("qwen3_moe", dynamic), ("qwen3_moe", static), ("gpt_oss", dynamic), ("gpt_oss", static)]


@pytest.mark.parametrize(("name", "make"), CACHES)
@pytest.mark.parametrize("given", [False, True], ids=["", "ids"])
def test_a_cache_that_is_reset_begins_new_sequences(name, make, given):
    model, lengths = random_model(name), (7, 9, 6)
    texts, cache = [sequences(n, n, seed=n) for n in lengths], make(model)
    with sedetect.profile(model) as prof:
        for number, batch in enumerate(texts):
            empty(cache)
            ids = torch.stack(batch)
            for begin, end in ((0, 4), (4, len(batch[0]) - 1), (len(batch[0]) - 1, len(batch[0]))):
                if given and not begin:
                    prof.batch(sequence_ids=[2 * number, 2 * number + 1])
                elif given:
                    prof.batch(sequence_ids=[90, 91])  # what goes on keeps its ids
                model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True)
    assert_rows(prof.stats, dict(enumerate(text for batch in texts for text in batch)))
    assert next(iter(prof.stats.header.sources.values())).ranges == [[0, 6]] and not prof.stats.header.notes


@pytest.mark.parametrize(("name", "make"), CACHES)
def test_a_cache_that_is_cropped_goes_on_from_there(name, make):
    """Three tokens are drafted, two rejected and others fed in their place."""
    model, text, wrong = random_model(name), sequences(9)[0], sequences(2, seed=4)[0]
    cache = make(model)
    with sedetect.profile(model) as prof:
        model(input_ids=text[None, :6], past_key_values=cache, use_cache=True)
        cache.activate_past_recording()
        model(input_ids=torch.cat((text[6:7], wrong))[None], past_key_values=cache)
        for layer in cache.layers:
            if make is dynamic:
                layer.crop(-2)
            else:  # 5.24 has crop for it
                layer.cumulative_length.sub_(2)
                if hasattr(layer, "cumulative_length_int"):
                    layer.cumulative_length_int -= 2
        model(input_ids=text[None, 7:], past_key_values=cache)
    stats = prof.stats
    assert (stats.header.tokens, stats.header.sequences) == (11, 1)
    assert [(note.code, note.count) for note in stats.header.notes] == [("lost", 2)]
    for state in stats.banks.values():
        assert state.rows.sum() == 11 * TOP_K and state.first_rows.sum() == TOP_K
        kept = state.outliers[column(state.outliers, "value") >= 0]
        for position, token in zip(column(kept, "position").tolist(), column(kept, "token_id").tolist()):
            assert token in (int(text[position]), int(wrong[position - 7]) if 7 <= position < 9 else None)
        assert {7, 8} <= set(column(kept, "position").tolist())


@pytest.mark.parametrize("make", [dynamic, static])
def test_a_cache_that_was_filled_elsewhere_is_noted_until_it_is_reset(model, make):
    texts, cache = sequences(8, 6), make(model)
    model(input_ids=texts[0][None, :4], past_key_values=cache, use_cache=True)
    with sedetect.profile(model) as prof:
        for token in texts[0][4:]:
            model(input_ids=token[None, None], past_key_values=cache)
        assert_unmapped(prof.stats, 4, UNMAPPED_CACHE)
        empty(cache)
        model(input_ids=texts[1][None], past_key_values=cache)
    assert all(state.first_rows.sum() == TOP_K for state in prof.stats.banks.values())
    kept = next(iter(prof.stats.banks.values())).outliers
    assert set(column(kept[column(kept, "value") >= 0], "position").tolist()) == {-1, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("make", [dynamic, static])
def test_a_cache_with_padding_on_the_left(model, make):
    texts, cache = sequences(5, 11, 8), make(model)
    ids, mask = padded(texts, "left")
    with sedetect.profile(model) as prof:
        for begin, end in ((0, 6), (6, 10), (10, 11)):
            model(
                input_ids=ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
            )  # fmt: skip
    assert_rows(prof.stats, dict(enumerate(texts)))


def test_a_forward_in_inference_mode_between_others(model):
    texts, cache = sequences(5, 6, 7), static(model)
    with sedetect.profile(model) as prof:
        with torch.inference_mode():
            tracked = prof._tracked.tracker
            tracked.begin((), {"input_ids": texts[0][None], "past_key_values": cache})
        tracked.begin((), {"input_ids": texts[1][None]})
        with torch.inference_mode():
            assert tracked.begin((), {"input_ids": texts[2][None]}).sequence.tolist() == [2] * 7
    assert tracked.totals() == (18, 3)


class OnTheDevice(TorchDispatchMode):
    """Fails where a value goes to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"), name
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("make", [dynamic, static])
@pytest.mark.parametrize("pad", [None, 50])
def test_nothing_waits_for_the_device(model, make, pad):
    ids, positions, ends, numbers = flattened(sequences(5, 7, 4))
    batch, mask = padded(sequences(5, 9), "left")
    cache, tracker = make(model), RowTracker(model, prefix=1, pad=pad)
    told = {"position_ids": positions, "cu_seq_lens_q": ends, "seq_idx": numbers}
    calls = [
        {"input_ids": ids, **told},
        {"input_ids": batch, "attention_mask": mask[:, :9], "past_key_values": cache},
        {"input_ids": batch[:, :1], "attention_mask": torch.ones(2, 10), "past_key_values": cache},
        {"input_ids": ids, **told, "cache": object()},
    ]
    for arguments in calls:
        with OnTheDevice():
            assert tracker.begin((), arguments) is not None
            tracker.end(None)
        if arguments.get("past_key_values") is cache:
            length = arguments["input_ids"].shape[1]
            for layer in range(3):
                cache.update(torch.zeros(2, 2, length, 8), torch.zeros(2, 2, length, 8), layer)
    with tracker.generating((batch,), {"eos_token_id": 2, "pad_token_id": 0}), OnTheDevice():
        for width in (9, 10):
            arguments = {
                "input_ids": torch.cat((batch, batch), 1)[:, :width],
                "attention_mask": mask.new_ones(2, width),
            }
            assert tracker.begin((), arguments) is not None
            tracker.end(None)


def test_token_ids_of_another_type_or_shape(model):
    text = sequences(7)[0]
    with sedetect.profile(model) as prof:
        model(input_ids=text[None].to(torch.int32))
    assert_rows(prof.stats, {0: text})
    tracker = RowTracker(model)
    assert tracker.begin((), {"input_ids": torch.zeros(1, 4, 2, dtype=torch.int64)}) is None
    assert tracker.notes == {UNMAPPED_SHAPE}


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


class Ending(torch.nn.Module):
    """A language model's head that always wants one token."""

    def __init__(self, hidden, vocabulary, token):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(vocabulary, hidden))
        self.out_features, self.token = vocabulary, token

    def forward(self, x):
        return torch.nn.functional.one_hot(torch.tensor(self.token), self.out_features).float().expand(*x.shape[:2], -1)


def drafts(model):
    """Name -> arguments of generate() by which tokens are drafted that the model may reject."""
    ending = copy.deepcopy(model)
    ending.lm_head = Ending(32, 96, EOS)
    return {
        "accepted": {"assistant_model": copy.deepcopy(model)},
        "end of sequence": {"assistant_model": ending},
        "other": {"assistant_model": random_model("qwen3_moe", seed=5)},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "itself": {"assistant_early_exit": 2},
    }


@pytest.mark.parametrize("draft", ["accepted", "end of sequence", "other", "prompt lookup", "itself"])
def test_generate_with_drafts(model, draft):
    """The text's tokens count as they do without drafts, and the rejected ones are noted."""
    prompt = sequences(9)[0][None]
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
    with sedetect.profile(model) as plain:
        text = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
    with sedetect.profile(model) as prof:
        same = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings, **drafts(model)[draft]
        )  # fmt: skip
    gc.collect()
    assert torch.equal(text, same) and not prof._tracked.tracker._by_cache  # holds no cache that is done with
    assert_rows(plain.stats, {0: text[0, :-1]})
    lost = sum(note.count for note in prof.stats.header.notes if note.code == "lost")
    assert (lost > 0) == (draft != "accepted")
    assert prof.stats.header.tokens - lost == plain.stats.header.tokens and prof.stats.header.sequences == 1
    for bank, state in prof.stats.banks.items():
        assert state.rows.sum() == prof.stats.header.tokens * TOP_K and state.first_rows.sum() == TOP_K
        # float32 rounding apart, since more tokens go through at once
        assert (state.out_max - plain.stats.banks[bank].out_max).min() > -1e-4
    if not lost:
        assert_rows(prof.stats, {0: text[0, :-1]})


class StopAt(transformers.StoppingCriteria):
    """Ends each row after as many new tokens as it is given."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


def test_generate_that_a_criterion_stops(model):
    """What a row is filled up with after its end is padding, also where no token ended it."""
    ids = torch.stack(sequences(6, 6, 6))
    with sedetect.profile(model) as prof:
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=EOS,
            pad_token_id=PAD, stopping_criteria=[StopAt([8, 12, 10])],
        )  # fmt: skip
    assert (out[0, 8:] == PAD).all() and out.shape[1] == 12 and not (out == EOS).any()
    assert_rows(prof.stats, {0: out[0, :8], 1: out[1, :11], 2: out[2, :10]})


def test_generate_with_its_settings_by_position(model, eos):
    ids, mask = padded(sequences(5, 11, 8), "left")
    settings = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=PAD)
    with sedetect.profile(model) as prof:
        model.generate(ids, settings, attention_mask=mask)
    assert prof.stats.header.tokens == generate(model, ids, mask, eos, PAD)[0].header.tokens


def test_generate_batch(model):
    """Continuous batching: the counts and values of generate(), without knowing which text a token is of."""
    prompts = [text.tolist() for text in sequences(5, 11, 8)]
    settings = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
    with sedetect.profile(model) as alone:
        for prompt in prompts:
            model.generate(torch.tensor([prompt]), settings, attention_mask=torch.ones(1, len(prompt)))
    with sedetect.profile(model) as prof:
        model.generate_batch(inputs=prompts, generation_config=settings, continuous_batching_config=small_cache())
    stats = prof.stats
    assert PAGED in stats.header.notes and not [n for n in stats.header.notes if n.code == "unmapped"]
    assert (stats.header.tokens, stats.header.sequences) == (alone.stats.header.tokens, 3)
    assert stats.header.tokens > sum(map(len, prompts))
    for bank, state in alone.stats.banks.items():
        same = stats.banks[bank]
        assert torch.equal(same.rows, state.rows) and torch.equal(same.first_rows, state.first_rows)
        for name in ("outliers", "first_outliers"):
            values = [column(getattr(one, name), "value") for one in (same, state)]
            assert torch.allclose(*values, rtol=1e-4, atol=1e-4)
            for part in ("position", "token_id"):
                assert torch.equal(*(column(getattr(one, name), part) for one in (same, state)))
        assert (column(same.outliers[column(same.outliers, "value") >= 0], "sequence") == -1).all()


def test_padding_of_continuous_batching_does_not_count(model):
    """Sizes are rounded up where graphs are captured: behind the last cumulative length nothing is text."""
    tracker, ids = RowTracker(model), torch.arange(3, 11, dtype=torch.int32)[None]
    rows = tracker.begin(
        (),
        {
            "input_ids": ids,
            "position_ids": torch.tensor([[0, 1, 2, 7, 0, 0, 0, 0]]),
            "cu_seq_lens_q": torch.tensor([0, 3, 4, 4, 4], dtype=torch.int32),
            "cache": object(),
        },
    )
    assert rows.counted.tolist() == [True] * 4 + [False] * 4
    assert rows.first.tolist() == [True] + [False] * 7
    assert rows.position[:4].tolist() == [0, 1, 2, 7] and rows.sequence.unique().tolist() == [-1]
    assert tracker.totals() == (4, 1) and tracker.notes == {PAGED}


def unmasked(texts, side, pad):
    """texts in one batch, padded by a token and nothing that says so."""
    width = max(map(len, texts))
    rows = [torch.full((width - len(text),), pad) for text in texts]
    return torch.stack([torch.cat((r, t) if side == "left" else (t, r)) for r, t in zip(rows, texts)])


def padding_notes(stats):
    return [(note.text.split(" that no mask")[0], note.count) for note in stats.header.notes if note.code == "padding"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("ones", [False, True], ids=["", "ones"])
def test_padding_that_no_mask_hides(model, side, ones):
    """Noted with its token, and left out where the token is given."""
    texts = sequences(5, 11, 8, 3)
    ids = unmasked(texts, side, 50)
    given = {"attention_mask": torch.ones_like(ids)} if ones else {}
    with sedetect.profile(model) as prof:
        model(input_ids=ids, **given)
    end = "end" if side == "right" else "begin"
    assert padding_notes(prof.stats) == [(f"3 of 4 sequences {end} with a run of token 50", 3)]
    assert prof.stats.header.tokens == ids.numel()
    with sedetect.profile(model, pad_token_id=50) as prof:
        model(input_ids=ids, **given)
    assert_rows(prof.stats, dict(enumerate(texts)))
    assert not prof.stats.header.notes


@pytest.mark.parametrize(("side", "pad"), [("right", 1), ("left", 1), ("right", EOS), ("left", EOS)])
def test_padding_that_is_the_beginning_or_the_end(model, side, pad):
    """One of the run is the text's own: the last before it, if the token is BOS, the first after it, if it is EOS."""
    texts = sequences(5, 11, 8, 1)
    if pad == 1:
        texts = [torch.cat((torch.tensor([1]), text)) for text in texts] + [torch.tensor([1])]
    elif side == "right":
        texts = [torch.cat((text, torch.tensor([EOS]))) for text in texts]
    else:  # one that ends as padding does keeps it
        texts = [*texts[:3], torch.cat((texts[3], torch.tensor([EOS])))]
    for batch in (texts, texts[:2]):
        with sedetect.profile(model, pad_token_id=pad) as prof:
            model(input_ids=unmasked(batch, side, pad))
        assert_rows(prof.stats, dict(enumerate(batch)))


def test_padding_beside_a_mask_and_in_generate(model, eos):
    """A mask that hides it, or a prompt: the same with the token given."""
    texts = [torch.cat((torch.tensor([1]), text)) for text in sequences(4, 10, 7)]
    for side in ("left", "right"):
        ids, mask = unmasked(texts, side, 1), padded(texts, side)[1]
        with sedetect.profile(model, pad_token_id=1) as prof:
            model(input_ids=ids, attention_mask=mask)
        assert_rows(prof.stats, dict(enumerate(texts)))
    with sedetect.profile(model, pad_token_id=1) as prof:
        model.generate(input_ids=unmasked(texts, "left", 1), max_new_tokens=1, pad_token_id=1, eos_token_id=1)
    # The positions are the model's own: generate() hides no padding that is an end of sequence.
    assert (prof.stats.header.tokens, prof.stats.header.sequences) == (sum(map(len, texts)), 3)
    for state in prof.stats.banks.values():
        assert state.rows.sum() == sum(map(len, texts)) * TOP_K and state.first_rows.sum() == 3 * TOP_K
        firsts = state.first_outliers[column(state.first_outliers, "value") >= 0]
        assert (column(firsts, "token_id") == 1).all()


def test_runs_that_are_no_padding(model):
    """Two BOS before every text; a run in one text of many; texts of one token alone."""
    twice = [torch.cat((torch.tensor([1, 1]), text)) for text in sequences(6, 6, 6)]
    run = torch.cat((sequences(4)[0], torch.tensor([9, 9])))
    for batch in (twice, [run, *sequences(6, 6, 6)], [torch.full((6,), 5)] * 3):
        with sedetect.profile(model) as prof:
            model(input_ids=torch.stack(batch))
        assert not prof.stats.header.notes
    many = [run if n in (3, 40) else text for n, text in enumerate(sequences(*[6] * 60))]
    many = [text if text is run else torch.cat((text[:5], text[:1])) for text in many]  # no other run
    with sedetect.profile(model) as prof:
        for begin in range(0, 60, 3):
            model(input_ids=torch.stack(many[begin : begin + 3]))
    assert not padding_notes(prof.stats)


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


def flattened(texts):
    """(ids, positions, cumulative lengths, numbers) of texts in one row, as DataCollatorWithFlattening gives them."""
    ends = torch.tensor([0, *map(len, texts)]).cumsum(0).to(torch.int32)
    numbers = torch.cat([torch.full((len(t),), i, dtype=torch.int32) for i, t in enumerate(texts)])
    return torch.cat(texts)[None], torch.cat([torch.arange(len(t)) for t in texts])[None], ends, numbers[None]


@pytest.mark.parametrize("told", ["position_ids", "from 2", "cu_seq_lens_q", "seq_idx", "all"])
def test_flattened_sequences(model, told):
    """Several sequences in one row: each begins where positions, cumulative lengths or numbers begin again."""
    texts = sequences(5, 1, 7, 4)
    ids, positions, ends, numbers = flattened(texts)
    arguments = {"position_ids": positions, "cu_seq_lens_q": ends, "seq_idx": numbers}
    if told == "from 2":  # texts of one token are seen by nothing else, as by transformers itself
        texts = texts[:1] + texts[2:]
        ids, positions, *_ = flattened(texts)
        arguments = {"position_ids": positions + 2}
    elif told != "all":
        arguments = {told: arguments[told]}
    with sedetect.profile(model) as prof:
        model(input_ids=ids, use_cache=False, **arguments)
        model(input_ids=ids, use_cache=False, **arguments)
    if told == "from 2":
        assert prof.stats.header.sequences == 6
        assert all(state.first_rows.sum() == 6 * TOP_K for state in prof.stats.banks.values())
    else:
        assert_rows(prof.stats, dict(enumerate(texts * 2)))
    assert next(iter(prof.stats.header.sources.values())).ranges == [[0, 2 * len(texts)]]
    apart = told in ("position_ids", "from 2", "all")  # eager attention knows nothing of the others
    assert [note.code for note in prof.stats.header.notes] == ([] if apart else ["mixed"])


def test_flattened_sequences_are_the_sequences_alone(model):
    texts, more = sequences(5, 7, 4), sequences(6, 4, 6, seed=1)
    ids, positions = (torch.cat(both) for both in zip(flattened(texts)[:2], flattened(more)[:2]))
    with sedetect.profile(model) as packed:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    with sedetect.profile(model) as alone:
        for text in texts + more:
            model(input_ids=text[None])
    assert packed.stats.header.sequences == 6 and not packed.stats.header.notes
    for bank, state in alone.stats.banks.items():
        same = packed.stats.banks[bank]
        assert torch.equal(same.rows, state.rows) and torch.equal(same.first_rows, state.first_rows)
        for name in ("outliers", "first_outliers"):
            for part in ("sequence", "position", "token_id"):
                assert torch.equal(*(column(getattr(one, name), part) for one in (same, state)))


def test_flattened_sequences_that_see_each_other_are_noted(model):
    """With a cache, transformers does not look at positions that begin again."""
    texts = sequences(5, 7, 4)
    ids, positions, *_ = flattened(texts)
    with sedetect.profile(model) as prof:
        cache = model(input_ids=ids, position_ids=positions, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[9]]), position_ids=torch.tensor([[4]]), past_key_values=cache)
    assert_rows(prof.stats, {0: texts[0], 1: texts[1], 2: torch.cat((texts[2], torch.tensor([9])))})
    assert [(note.code, note.count) for note in prof.stats.header.notes] == [("mixed", 3)]


def test_packed_sequences(model):
    """Given one id for a row of several sequences: unmapped, until prof.batch says which token is whose."""
    texts = sequences(5, 7, 4)
    ids, positions, *_ = flattened(texts)
    owner = torch.cat([torch.full((len(t),), 40 + i) for i, t in enumerate(texts)])[None]
    with sedetect.profile(model) as prof:
        prof.batch(sequence_ids=[3])
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
