"""Weights that are read ahead: the same model as from_pretrained gives, and one line where a file ends early."""

import pytest
import torch
from support.models import TINY

from sedetect import Loading, SedetectError, Text, profile_model
from sedetect.checkpoints.files import shards_of
from sedetect.checkpoints.prefetch import Prefetched, prefetch
from sedetect.checkpoints.staging import stored_tensors
from sedetect.models.loading import load_model

CPU = torch.device("cpu")


def ahead(folder=TINY) -> Prefetched:
    return Prefetched(folder, CPU, stored_tensors(shards_of(folder)))


def test_the_model_is_the_same():
    plain, model = load_model(TINY, loading=Loading(device="cpu")), load_model(ahead(), loading=Loading(device="cpu"))
    assert model.config._name_or_path == plain.config._name_or_path
    weights = plain.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_a_profile_takes_it_like_a_folder():
    texts = {"text": ["The quick brown fox jumps over the lazy dog. " * 40]}
    short = {"text": Text(tokens=256, seq_len=64), "loading": Loading(device="cpu")}
    plain, found = profile_model(TINY, texts, **short), profile_model(ahead(), texts, **short)
    assert found.stats.header.digest == plain.stats.header.digest
    for bank, state in plain.stats.banks.items():
        for name, tensor in state.tensors().items():
            assert torch.equal(found.stats.banks[bank].tensors()[name], tensor)


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path):
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = stored_tensors(shards_of(tmp_path))
    shard = shards_of(tmp_path)[0]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(SedetectError, match=shard.name):
        load_model(Prefetched(tmp_path, CPU, tensors), loading=Loading(device="cpu"))


def test_nothing_is_read_ahead_where_it_is_no_gain(tmp_path):
    assert prefetch(TINY, "cpu") is None
    assert prefetch("owner/name", None) is None
    assert prefetch(tmp_path, None) is None


@pytest.mark.gpu
def test_on_a_gpu():
    source = prefetch(TINY, "cuda")
    assert isinstance(source, Prefetched)
    plain, model = (
        load_model(TINY, loading=Loading(device="cpu")).state_dict(),
        load_model(source, loading=Loading(device="cuda")),
    )
    assert all(weight.is_cuda and torch.equal(weight.cpu(), plain[name]) for name, weight in model.state_dict().items())


def test_used_up_it_is_a_folder_and_closed_it_reads_no_more():
    source = ahead()
    load_model(source, loading=Loading(device="cpu"))
    assert source.used
    again, plain = load_model(source, loading=Loading(device="cpu")), load_model(TINY, loading=Loading(device="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))
    unused = ahead()
    unused.close()
