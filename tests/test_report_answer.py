"""The report: how it opens, with the answer in plain words and what to do."""

import json
import re
from dataclasses import replace

import pytest
import torch
from support.command import refused, run
from support.documents import SAMPLES
from support.models import TINY, random_model
from support.page import Page

import sedetect
from sedetect import ModelStats
from sedetect.compression.budget import Budget, Cost, Row
from sedetect.compression.protect import GRANULARITIES, TOOLS, export, protect_list
from sedetect.report.answer import answer_section
from sedetect.report.evidence import Evidence
from sedetect.report.write import write_report
from sedetect.stats.proof import Effect, Proof, Verdict

EFFECT = Effect(0.2, 0.1, 0.3, 64)


@pytest.fixture(scope="module")
def stats(tiny_profile):
    return ModelStats.load(tiny_profile)


def answered(stats, **levels):
    """The opening of a page of stats, with a proof of these verdicts by expert."""
    verdicts = [Verdict(name, level, f"why {name}", EFFECT, None, 64, 64) for name, level in levels.items()]
    proof = Proof("m", stats.header.digest, 4096, 32, 0.02, 0.05, 0.2, 0.5, 900.0, 0.01, verdicts, [], [], 1.0)
    proof = proof if levels else None
    return answer_section(Evidence(stats, sedetect.rank(stats, proof=proof), proof=proof, folder="my out"))


def words(opening) -> list[str]:
    return list(opening["answer"].values())


def test_the_answer_of_candidates(stats):
    opening = answered(stats)
    found, sure, advice = words(opening)
    assert found.startswith("The model may depend on L1E28 and L9E7: among its 320 experts") and "Not proved" in sure
    assert "2,048 tokens" in sure and "routed experts saw fewer than 32 tokens" in sure and "Prove it" in advice
    assert opening["todo"]["command"] == "sedetect prove MODEL --stats 'my out' -o 'my out' --seq-len 128"
    assert opening["todo"]["modules"] == ["model.layers.1.mlp.experts.28", "model.layers.9.mlp.experts.7"]
    assert opening["reasons"] == []


def test_the_answer_of_a_proof(stats):
    opening = answered(stats, L1E28="proved", L9E7="refuted")
    found, sure, advice = words(opening)
    assert found.startswith("The model depends on L1E28, of 320 experts") and "without it" in found
    assert sure.endswith("on 4,096 tokens of other text.") and advice.startswith("Keep it when you prune")
    assert opening["todo"]["command"] == "sedetect export 'my out' --to TOOL --model MODEL -o FILE"
    assert opening["todo"]["modules"] == ["model.layers.1.mlp.experts.28"]
    assert opening["reasons"] == ["L1E28: proved: why L1E28", "L9E7: refuted: why L9E7"]
    left_open = words(answered(stats, L1E28="proved"))[1]
    assert left_open.endswith("L9E7 is neither proved nor refuted, and protected too.")


def test_the_answer_of_a_proof_that_decides_nothing(stats):
    opening = answered(stats, L1E28="undecided", L9E7="undecided")
    assert "The answer is not clear." in words(opening)[1]
    assert opening["todo"]["command"].startswith("sedetect prove ")
    assert opening["todo"]["command"].endswith(" --tokens 16384")


def test_the_answer_where_nothing_is_to_be_done(stats, tmp_path):
    opening = answered(stats, L1E28="refuted", L9E7="refuted")
    assert opening["todo"] is None and words(opening)[0].startswith("The model does not depend on L1E28 and L9E7")
    model = random_model("qwen3_moe")
    with sedetect.profile(model) as prof:
        model(input_ids=torch.randint(3, 96, (2, 20)))
    evidence = Evidence(prof.stats, sedetect.rank(prof.stats))
    opening = answer_section(evidence)
    assert opening["todo"] is None and re.match(r"None of the \d+ experts stands out", words(opening)[0])
    assert words(opening)[2].startswith("Nothing:")
    write_report(evidence, tmp_path / "page.html")
    assert "todo" not in Page((tmp_path / "page.html").read_text()).ids


def test_the_names_are_those_of_the_export(stats):
    tools = answered(stats)["todo"]["tools"]
    assert [row[0] for row in tools.rows] == list(TOOLS)
    experts = protect_list(stats)
    for tool, *names, _ in tools.rows:
        for granularity, cell in zip(GRANULARITIES, names, strict=True):
            if (tool, granularity) != ("llama.cpp", "expert"):
                document, _ = export(stats, experts, tool, granularity, model=TINY)
                text = document if isinstance(document, str) else json.dumps(document).replace("\\\\", "\\")
                assert all(name in text for name in cell.split("\n"))


def test_experts_that_no_list_can_name(stats, tmp_path):
    header = replace(stats.header, banks={n: replace(b, module="x.linear") for n, b in stats.header.banks.items()})
    evidence = Evidence(ModelStats(stats.banks, header), sedetect.rank(stats))
    assert "does not hold its experts by number" in answer_section(evidence)["todo"]["unnamed"]
    write_report(evidence, tmp_path / "page.html")
    assert "No list of module names: L1E28: x.linear does not" in Page((tmp_path / "page.html").read_text()).text


def test_sizes_in_bytes_are_of_the_checkpoint(tiny_profile, tmp_path):
    code, _, err = run("report", tiny_profile, "--model", TINY, "-o", tmp_path / "page.html")
    assert code == 0, err
    page = Page((tmp_path / "page.html").read_text())
    assert f"by expert, 2 of 320 routed experts: {2 * 3 * 256 * 48 * 1.5:,.0f} bytes, +1.88%" in page.text
    answer, box, facts = map(page.text.index, ("What was found", "sedetect prove MODEL", "calibration tokens"))
    assert answer < box < facts
    random_model("qwen2_moe").save_pretrained(tmp_path / "other")
    assert "the statistics are of another model (tiny-moe)" in refused(
        run("report", tiny_profile, "--model", tmp_path / "other")
    )


def test_the_cost_of_4_bits(stats):
    def cost(budget):
        return answer_section(Evidence(stats, sedetect.rank(stats), budget=budget))["todo"]["cost"]

    plain, kept, *others = (Cost([], 0.25, {"code": 9.5}, {"code": x}, x) for x in (0.0135, 0.0093, 0.0131, 0.0142))
    budget = replace(SAMPLES[Budget], rows=[Row("int4", plain, kept, others)])
    said = "perplexity +1.35%; with L1E28 in full precision +0.93%, with random experts of the same layers instead "
    assert said + "+1.31% to +1.42%." in cost(budget)["text"] and cost(budget)["command"] is None
    for other in (None, replace(budget, rows=[]), replace(budget, rows=[Row("int4", plain, None, [])])):
        assert cost(other)["command"] == "sedetect budget MODEL --stats DIR -o DIR --seq-len 128 --format int4"
