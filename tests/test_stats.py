"""The state as a value: files, merging, headers."""

import json
import math
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file

from sedetect import ops
from sedetect.errors import SedetectError
from sedetect.files import write_atomic, write_json
from sedetect.kernels.records import COLUMN, RECORD, Record, decode, empty_records, float_bits
from sedetect.kernels.rows import Rows
from sedetect.stats.bank import BankStats
from sedetect.stats.model import BankInfo, Header, ModelStats, Source, merge_all, ranges_of
from sedetect.stats.note import Note
from sedetect.stats.place import BankId

BANK = BankId("decoder", 3, "routed")


def measured(seed, rows=200, experts=5, scale=1.0, special=False):
    """A state of random rows; ties and, with special, NaN and Inf among them."""
    generator = torch.Generator().manual_seed(seed)
    state = BankStats.empty(experts, channels=(12, 6), coactivation=True, published=True)
    down = torch.randn(experts, 12, 6, generator=generator)
    x = (torch.randn(rows, 6, generator=generator) * scale).round(decimals=1)
    if special:
        x[3], x[4] = torch.nan, torch.inf
    index = torch.rand(rows, experts - 1, generator=generator).topk(2).indices  # the last expert sees nothing
    ids = torch.arange(rows)
    rows_of = Rows(ids >= 0, ids % 10 == 0, ids // 10 + 1000 * seed, ids % 10, ids)
    weights = ops.ExpertWeights(torch.eye(6).repeat(experts, 1, 1), down, ops.Gate("relu2", gated=False))
    ops.moe_mlp(x, index, torch.rand(rows, 2, generator=generator), weights, state, rows=rows_of)
    return state


def model_stats(seed, source="text", **kwargs):
    header = Header(
        "model", "d1", "float32", {"decoder": 4}, {str(BANK): BankInfo("layers.3", 2, ["cpu"])},
        {source: Source([[1000 * seed, 1000 * seed + 20]], {"domain": source})}, 200, 20, 10, {"torch": "2"}, [],
    )  # fmt: skip
    return ModelStats({BANK: measured(seed, **kwargs)}, header)


@pytest.mark.parametrize("special", [False, True])
def test_a_file_holds_the_state_bit_for_bit(tmp_path, special):
    stats = model_stats(1, special=special)
    assert special == bool(stats.banks[BANK].out_max.isnan().any())
    stats.save(tmp_path / "new" / "a.safetensors")
    loaded = ModelStats.load(tmp_path / "new" / "a.safetensors")
    assert loaded.header.to_json() == stats.header.to_json()
    for field in fields(BankStats):
        mine, theirs = getattr(stats.banks[BANK], field.name), getattr(loaded.banks[BANK], field.name)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)), field.name
    assert loaded.banks[BANK].rows[-1] == 0 and loaded.banks[BANK].out_max[-1] == 0


# one row as it is packed (bits of -2.5 have the sign in bit 31), and as it reads
PACKED = {
    "value": 0x43FA0000, "sign": 1, "channel": 101, "source": 1, "sequence": 12, "position": 77, "token_id": 4095,
    "gate": 0x3F400000, "in_value": 0xC0200000, "in_channel": 14,
}  # fmt: skip
ROW = Record(500.0, -1, 101, 1, 12, 77, 4095, 0.75, -2.5, 14)


def packed(value: float, **parts: int) -> torch.Tensor:
    """PACKED with another value, and other columns."""
    bits = float_bits(torch.tensor([value])).item()
    return torch.tensor([(PACKED | {"value": bits} | parts)[name] for name in RECORD])


def test_records_read_as_they_are_packed():
    records = empty_records(1, 4)[0]
    records[0] = torch.tensor([PACKED[name] for name in RECORD])
    records[2] = packed(math.inf, sign=0, sequence=-1, position=-1, token_id=-1)
    row, empty, unmapped, last = decode(records)
    assert row == ROW and empty is None and last is None
    assert unmapped == ROW._replace(value=math.inf, sign=1, sequence=-1, position=-1, token_id=-1)
    assert [type(x) for x in row] == [float, *[int] * 6, float, float, int]
    (seen,) = decode(packed(math.nan)[None])  # NaN is a value, not an empty slot
    assert math.isnan(seen.value) and seen._replace(value=500.0) == ROW
    (zero,) = decode(packed(0.0)[None])
    assert zero == ROW._replace(value=0.0) and decode(records[:0]) == []


def test_rows_of_an_expert():
    state = BankStats.empty(3)
    for slot, value in enumerate((math.nan, 700.0, 3.0)):
        state.outliers[1, slot] = packed(value, position=slot + 1)
    for slot, value in enumerate((800.0, 3.0)):
        state.first_outliers[1, slot] = packed(value, position=0, sequence=slot)
    state.first_outliers[2, 0] = packed(5.0)
    rest, first = state.kept_rows(1, first=False), state.kept_rows(1, first=True)
    assert [row.position for row in rest] == [1, 2, 3] and rest[1] == ROW._replace(value=700.0, position=2)
    assert first == [ROW._replace(value=v, position=0, sequence=n) for n, v in enumerate((800.0, 3.0))]
    assert state.strongest(2, 8) == [(ROW._replace(value=5.0), True)]
    assert state.kept_rows(0, first=True) == state.kept_rows(0, first=False) == state.strongest(0, 8) == []
    assert state.peak_of(0) is None and state.peak_of(2).value == 5
    assert math.isnan(state.peak_of(1).value) and state.peak_of(1).position == 1
    assert [row.value for row, _ in state.strongest(1, 8)] == [800.0, 700.0, 3.0, 3.0]  # NaN has no place among them
    assert [row.value for row, _ in state.strongest(1, 1)] == [800.0]
    state.outliers[1, :2] = state.outliers[1, 1:3].clone()
    state.outliers[1, 2, COLUMN["value"]] = -1
    kept = [(row.value, row.position, is_first) for row, is_first in state.strongest(1, 8)]
    assert kept == [(800.0, 0, True), (700.0, 2, False), (3.0, 0, True), (3.0, 3, False)]
    assert [row.value for row, _ in state.strongest(1, 1)] == [800.0, 700.0] and state.peak_of(1) == first[0]


def test_the_documented_tensors_are_in_the_file(tmp_path):
    model_stats(1).save(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    expected = {
        "rows": torch.int64, "first_rows": torch.int64, "nonfinite": torch.int64, "gate_sum": torch.float64,
        "gate_norm_sum": torch.float64, "outliers.value": torch.float32, "outliers.token": torch.int64,
        "first_outliers.channel": torch.int32, "in_max.value": torch.float32, "channel_max": torch.float32,
    }  # fmt: skip
    for name, dtype in expected.items():
        assert tensors[f"decoder.3.routed/{name}"].dtype == dtype, name
    value = tensors["decoder.3.routed/outliers.value"]
    assert value.shape == (5, 32) and (value[-1] == -1).all()
    assert (value[0].diff() <= 0).all(), "sorted, largest first"


def test_merge_of_random_states_commutes_and_associates():
    a, b, c = (measured(seed, special=seed == 2) for seed in range(3))
    assert a.merge(b).equal(b.merge(a))
    assert a.merge(b).merge(c).equal(a.merge(b.merge(c)))
    assert not a.merge(b).equal(a)
    empty = BankStats.empty(5, channels=(12, 6), coactivation=True, published=True)
    assert a.merge(empty).equal(a) and empty.merge(a).equal(a)


def test_equal_sees_every_field():
    for field in fields(BankStats):
        state = measured(0)
        tensor = getattr(state, field.name)
        tensor.view(-1)[0] += 1
        assert not state.equal(measured(0)), field.name


def test_sources_are_renumbered_by_name():
    """Record sources mean the same after merging in any order; ties go to the lower name."""
    parts = [model_stats(seed, source) for seed, source in ((1, "zebra"), (1, "ant"), (1, "mole"))]
    merged = [merge_all(parts[i] for i in order) for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0))]
    for other in merged[1:]:
        assert other.banks[BANK].equal(merged[0].banks[BANK])
        assert other.header.to_json() == merged[0].header.to_json()
    assert list(merged[0].header.sources) == ["ant", "mole", "zebra"]
    records = merged[0].banks[BANK].outliers[0]
    assert records[:6, 3].tolist() == [0, 1, 2, 0, 1, 2], "three equal rows, in the order of their sources"


def test_merge_refuses_what_does_not_belong_together():
    one = model_stats(1)
    with pytest.raises(SedetectError, match=r"source text \(text\): sequences 1000 to 1019 are in both runs"):
        one.merge(model_stats(1))
    other = model_stats(2)
    other.header.digest = "d2"
    with pytest.raises(SedetectError, match="different models do not merge"):
        one.merge(other)
    other = model_stats(2)
    other.header.dtype = "bfloat16"
    with pytest.raises(SedetectError, match="differ in dtype"):
        one.merge(other)
    with pytest.raises(SedetectError, match="channel_max: shapes"):
        measured(1).merge(BankStats.empty(5, coactivation=True))


def test_merged_header_adds_up():
    merged = model_stats(1).merge(model_stats(2)).header
    assert merged.tokens == 400 and merged.sequences == 40 and merged.window == 10
    assert merged.sources["text"].ranges == [[1000, 1020], [2000, 2020]]
    adjacent = model_stats(1)
    adjacent.header.sources["text"].ranges = [[1020, 1030]]
    assert model_stats(1).header.merge(adjacent.header).sources["text"].ranges == [[1000, 1030]]


def test_notes_are_data():
    """Sorted by their lines, each once; a header written when they were lines has notes that are their text alone."""
    bank = BankId("decoder", 1, "routed")
    why = Note("fallback", "why", bank)
    header = Header(notes=[Note("tokens_used", "9 tokens asked, 3 used", count=3), why])
    stored = json.loads(header.to_json())
    assert stored["notes"][1] == {"code": "fallback", "text": "why", "bank": "decoder.1.routed", "count": None}
    assert Header.from_json(header.to_json()) == header
    old = Header.from_json(json.dumps(stored | {"notes": ["a line", "decoder.1.routed: why"]}))
    assert old.notes == [Note("text", "a line"), Note("text", "why", bank)]
    merged = header.merge(old).notes
    assert [str(note) for note in merged] == ["9 tokens asked, 3 used", "a line", "decoder.1.routed: why"]


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(SedetectError, match="no such statistics file"):
        ModelStats.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(SedetectError, match="not a sedetect statistics file"):
        ModelStats.load(path)
    save_file({"x": torch.zeros(1)}, path, {"format": "sedetect-stats", "version": "99"})
    with pytest.raises(SedetectError, match="version '99', this sedetect reads 1 and 2"):
        ModelStats.load(path)
    stats = model_stats(1)
    tensors = {f"{BANK}/{name}": t for name, t in stats.banks[BANK].tensors().items() if name != "rows"}
    save_file(tensors, path, {"format": "sedetect-stats", "version": "1", "header": stats.header.to_json()})
    with pytest.raises(SedetectError, match="damaged statistics file"):
        ModelStats.load(path)
    stats.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SedetectError, match="damaged statistics file"):
        ModelStats.load(path)


def test_ranges_of():
    assert ranges_of(torch.tensor([3, 1, 2, 7, 3])) == [[1, 4], [7, 8]]
    assert ranges_of(torch.tensor([], dtype=torch.int64)) == []
    assert ranges_of(torch.arange(5)) == [[0, 5]]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SedetectError, match="a.json: cannot be written"):
        write_atomic(path, fail)
    assert json.loads(path.read_text()) == {"x": 1}
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(SedetectError, match="cannot be written"):
        write_json(tmp_path / "file" / "a.json", {})


@pytest.mark.parametrize("damage", ["bank", "shape", "header"])
def test_inconsistent_files_are_refused(tmp_path, damage):
    stats = model_stats(1)
    tensors = {f"{BANK}/{name}": t for name, t in stats.banks[BANK].tensors().items()}
    header = stats.header.to_json()
    if damage == "bank":
        tensors = {f"decoder.4.routed{key.removeprefix(str(BANK))}": t for key, t in tensors.items()}
    elif damage == "shape":
        tensors[f"{BANK}/rows"] = torch.zeros(2, 2, dtype=torch.int64)
    else:
        header = header.replace('"banks": {', '"banks": [], "was": {')
    save_file(tensors, tmp_path / "a", {"format": "sedetect-stats", "version": "1", "header": header})
    with pytest.raises(SedetectError, match="damaged statistics file"):
        ModelStats.load(tmp_path / "a")


def test_lines_of_older_headers_keep_their_bank():
    note = Note.read("decoder.3.routed: backend cuda does not serve it")
    assert (str(note.bank), note.text) == ("decoder.3.routed", "backend cuda does not serve it")
    assert Note.read("stopped early: enough").bank is None
