"""In the hand: what print shows, paths where statistics or a model are meant, and a name for each command."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.documents import SAMPLES
from torch import nn

import sedetect
from sedetect.calibration.windows import Calibration, Windows
from sedetect.cli import COMMANDS
from sedetect.cli.shared import folder_of
from sedetect.errors import SedetectError
from sedetect.profiling.record import Run
from sedetect.results import Results
from sedetect.stats.bank import BankStats
from sedetect.stats.model import merge_all
from sedetect.stats.proof import Proof

TINY = Path(__file__).parent / "data" / "tiny-moe"


@pytest.fixture(scope="module")
def profile():
    return sedetect.profile_model(TINY, text=sedetect.Text(tokens=1024, seq_len=64))


def test_results_print_a_few_lines(profile):
    ranking = sedetect.rank(profile.stats)
    windows = profile.windows["code"]
    shown = [
        profile,
        profile.stats,
        profile.stats.header,
        ranking,
        windows,
        Calibration({"code": windows}, 1024),
        sedetect.sensitivity(profile.stats),
        sedetect.agreement(profile.domains),
        sedetect.compare([profile.stats, profile.stats]),
        sedetect.analyze_weights(TINY, layers=[0]),
        sedetect.Proving(),
        sedetect.make_plan(TINY),
        many(SAMPLES[Proof], "verdicts", "runs", "controls"),
        many(SAMPLES[Run], "tokens", "contexts"),
        *profile.stats.banks.values(),
    ]
    located = sedetect.locate(TINY)
    (expert,) = located.candidates
    shown += [located, replace(expert, fires=expert.fires * 500)]
    for one in shown:
        text = repr(one)
        assert type(one).__name__ in text and len(text) < 1500 and text.count("\n") < 24, text
    assert "1,024 tokens in 16 sequences" in repr(profile.stats) and ranking.headline[:30] in repr(ranking)
    assert repr(BankStats.empty(3, coactivation=True)) == "BankStats(3 experts, 0 rows, coactivation)"
    assert "held=bfloat16" in repr(sedetect.make_plan(TINY))
    assert isinstance(windows, Windows) and "<int64 (4, 64)>" in repr(windows)


def test_statistics_by_their_path(profile, tmp_path):
    results = Results(tmp_path)
    profile.stats.save(results.stats_path)
    ranking = sedetect.rank(profile.stats)
    for path in (results.stats_path, tmp_path, str(tmp_path)):
        assert sedetect.rank(path) == ranking
        assert sedetect.compare([path, profile.stats]).equal and sedetect.agreement({"a": path, "b": path}).same
        assert sedetect.sensitivity(path) == sedetect.sensitivity(profile.stats)
        assert merge_all([path]).header == profile.stats.header
        assert [str(one.place) for one in sedetect.protect_list(path)] == [str(one) for one in ranking.found]
        assert sedetect.choose_kept(path, "reap", 0.25) == sedetect.choose_kept(profile.stats, "reap", 0.25)
    residual = sedetect.observe_residual(load_tiny(), profile.windows, prefix=1, sequences=1)
    residual.save(results.residual_path)
    assert sedetect.rank(tmp_path) == sedetect.rank(profile.stats, residual=residual) != ranking
    with pytest.raises(SedetectError, match=r"is a ModelProfile; give a ModelStats, such as its \.stats"):
        sedetect.rank(profile)
    with pytest.raises(SedetectError, match="stats: is a dict; give"):
        sedetect.compare([{}, {}])
    with pytest.raises(SedetectError, match="no such statistics file"):
        sedetect.rank("no/such/folder")


def many(document, *names):
    """The same with a thousand entries in these fields."""
    entries = {name: getattr(document, name) for name in names}
    more = {n: dict.fromkeys(range(1000), "word") if isinstance(e, dict) else e * 1000 for n, e in entries.items()}
    return replace(document, **more)


def load_tiny():
    from sedetect.models.loading import load_model

    return load_model(TINY)


@pytest.mark.parametrize(
    "name",
    ["ablate", "analyze_outputs", "analyze_routing", "find_super_weights", "make_budget", "model_digest",
     "observe_residual", "profile", "prove", "run_experiment", "trace_experts"],
)  # fmt: skip
def test_what_is_no_model_where_a_model_is_meant(name, tmp_path):
    function = getattr(sedetect, name)
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    for wrong, told in (
        (str(TINY), "is a str; give a loaded model"),
        (tmp_path, "Path; give a loaded model"),
        (None, "is a NoneType; give a loaded model"),
        ([], "is a list; give a loaded model"),
        (nn.Linear(1, 1), "Linear: not a transformers model"),
    ):
        with pytest.raises(SedetectError, match=told):
            entered = function(wrong, **{p.name: {} for p in needed[1:]})
            entered.__enter__()  # of a context manager


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda model: sedetect.analyze_weights(model), "is not a path; give that of a checkpoint"),
        (lambda model: sedetect.analyze_weights(TINY, against=model or 3), "is not a path; give that of a checkpoint"),
        (lambda model: sedetect.make_plan(model), "is not a path; give that of a checkpoint"),
        (lambda model: sedetect.locate(model), "is not a path; give that of a checkpoint"),
        (lambda model: sedetect.prune_checkpoint(model, "out", {}), "is not a path; give that of a checkpoint"),
        (lambda model: sedetect.prune_checkpoint(TINY, model, {}), "is not a path; give that of a new folder"),
        (lambda model: sedetect.make_report(model), "give the path of a folder of results"),
        (lambda model: sedetect.make_report(TINY, model or 3), "page: is a .*; give the path of a file"),
        (lambda model: sedetect.merge_all(model), "stats: is one .*; give several ModelStats or their paths"),
        (lambda model: sedetect.compare(model), "stats: is one .*; give several ModelStats or their paths"),
        (lambda model: sedetect.agreement(model), "parts: is a .*; give a dictionary"),
    ],
)
def test_what_is_no_path_where_paths_are_meant(call, told):
    for wrong in (None, 3, nn.Linear(1, 1)):
        with pytest.raises(SedetectError, match=told):
            call(wrong)


@pytest.mark.parametrize("wrong", ["L1E28", 3, {}])
def test_options_of_another_kind(profile, wrong):
    """Settings that go into a function as one value, and results that go into another."""
    stats = profile.stats
    for call, told in (
        (lambda: sedetect.profile_model(TINY, text=wrong), "text: is a .*; give a Text"),
        (lambda: sedetect.profile_model(TINY, loading=wrong), "loading: is a .*; give a Loading"),
        (lambda: sedetect.profile_model(TINY, measuring=wrong), "measuring: is a .*; give a Measuring"),
        (lambda: sedetect.profile_model(TINY, proving=wrong), "proving: is a .*; give a Proving"),
        (lambda: sedetect.locate(TINY, loading=wrong), "loading: is a .*; give a Loading"),
        (lambda: sedetect.locate(TINY, text=[wrong]), "text: is a list; give a str"),
        (lambda: sedetect.locate(TINY, first_tokens=str(wrong)), "first_tokens '.*': is not a list of tokens"),
        (lambda: sedetect.locate(TINY, first_tokens=1.5), "first_tokens 1.5: is not a list of tokens"),
        (lambda: sedetect.make_plan(TINY, wrong), "loading: is a .*; give a Loading"),
        (lambda: sedetect.analyze_weights(TINY, loading=wrong), "loading: is a .*; give a Loading"),
        (lambda: sedetect.rank(stats, residual=wrong), "residual: is a .*; give a Residual"),
        (lambda: sedetect.rank(stats, proof=wrong), "proof: is a .*; give a Proof"),
        (lambda: sedetect.protect_list(stats, ranking=wrong or 1), "ranking: is a .*; give a Ranking"),
        (lambda: sedetect.protect_list(stats, feeders=wrong), "feeders: is a .*; give a Proof"),
        (lambda: sedetect.export(stats, [wrong], "json"), "experts: is a list, not of Protected"),
        (lambda: sedetect.export(stats, "L1E28", "json"), "experts: is a str, not of Protected"),
        (lambda: sedetect.choose_kept(stats, "reap", str(wrong)), "ratio '.*': must be above 0"),
    ):
        with pytest.raises(SedetectError, match=told):
            call()


def test_one_where_several_are_meant(profile, tmp_path):
    for one in (profile.stats, str(tmp_path), tmp_path):
        for function in (sedetect.merge_all, sedetect.compare):
            with pytest.raises(SedetectError, match="stats: is one .*; give several"):
                function(one)
    with pytest.raises(SedetectError, match=r"3: is a int; give a loaded model .* or a checkpoint's folder"):
        sedetect.profile_model(3)


def test_a_report_by_its_function(profile, tmp_path):
    profile.stats.save(Results(tmp_path).stats_path)
    made = sedetect.make_report(tmp_path)
    assert made.page == tmp_path / "report.html" and made.charts == 0 and not made.figures.exists()
    assert made.headline == sedetect.rank(profile.stats).headline
    assert "2 candidates: L1E28" in made.page.read_text()
    with pytest.raises(SedetectError, match="no such statistics file"):
        sedetect.make_report(TINY)


def test_every_command_has_a_function():
    """The table of commands and functions in docs/python.md."""
    text = (Path(__file__).parent.parent / "docs/python.md").read_text(encoding="utf-8")
    table = text.split("| command | in Python |")[1].split("\n\n")[0]
    rows = [[cell.strip(" `") for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
    assert {row[0].split()[0] for row in rows} == set(COMMANDS)
    for _, functions in rows:
        for function in re.findall(r"`(\w+)`", f"`{functions}`"):
            assert callable(getattr(sedetect, function))


def test_plan_and_prune_take_what_is_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, local_files_only: str(TINY))
    assert folder_of("owner/tiny") == str(TINY) and folder_of(str(tmp_path)) == str(tmp_path)
    monkeypatch.undo()
    with pytest.raises(SedetectError, match=r"owner/none: no such folder.* \(hf download owner/none\)"):
        folder_of("owner/none")
