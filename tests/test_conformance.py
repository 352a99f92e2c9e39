"""Every MoE architecture of the installed transformers, by the checks of conformance.py."""

import re
from pathlib import Path

import pytest
import torch
from support.conformance import (
    TABLE_BEGINS,
    TABLE_ENDS,
    Result,
    Seen,
    attempt,
    available,
    check,
    documented,
)
from support.families import FAMILIES, Family, discover, model_class, tiny_model
from support.processors import processor_of

from sedetect.models.banks import find_banks, layers_per_stack


@pytest.mark.parametrize("name", available())
def test_family(name):
    check(name)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4", "gpt_oss", "llama4"])
def test_in_bfloat16(name):
    check(name, dtype=torch.bfloat16)


def test_a_bank_that_another_backend_served_fails():
    line = attempt("qwen3_moe", "cpu", "torch", "float32")
    assert line.result == "ok" and line.backends == "torch"
    line = attempt("qwen3_moe", "cpu", "cuda", "bfloat16")
    assert line.result == "AssertionError: decoder.0.routed is served by ['cpu'], not cuda"


def test_an_error_that_nothing_foresaw_says_where():
    line = attempt("no_such_family", "cpu", None, "float32")
    assert re.fullmatch(r"KeyError: 'no_such_family' \(conformance.py:\d+\)", line.result)


def test_the_table_of_the_docs_is_that_of_a_run():
    """Every family is in it, with the banks that are checked; of those of this transformers, the classes too."""
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    rows = page.split(TABLE_BEGINS)[1].split(TABLE_ENDS)[0].strip().splitlines()[2:]
    found = {name: rest for _, name, *rest, _ in ([c.strip() for c in row.split("|")] for row in rows)}
    assert list(found) == list(FAMILIES)
    for name, family in FAMILIES.items():
        words = (
            family.layers if isinstance(family.layers, str) else "; ".join(f"{k} {v}" for k, v in family.layers.items())
        )
        assert found[name][1] == (words if family.refused is None else f"refused: {family.refused}")
        if name in available():
            assert found[name] == [model_class(name, family.model).__name__, found[name][1], processor_of(name)]
    one = Result("a", "A", "R R")
    assert documented(f"x{TABLE_BEGINS}\nold\n{TABLE_ENDS}y", [one], str.upper).count("| a | A | R R | A |") == 1


def test_place_of_the_largest_output():
    """In float32 the first of the largest; in bfloat16 any that is as large within the tolerance, of this expert's."""
    seen = Seen()
    for y, position in (([1.0, -100.0], 3), ([96.0, 2.0], 5), ([94.0, 2.0], 6)):
        seen.add(torch.tensor(y), torch.ones(1), 1.0, position, 7)
    seen.check_place("first", 1, 3, 7, torch.float32)
    seen.check_place("first", 1, 3, 7, torch.bfloat16)
    seen.check_place("second", 0, 5, 7, torch.bfloat16)
    seen.without_places().check_place("unmapped", 0, -1, -1, torch.bfloat16)
    wrong = [(0, 5, 7, torch.float32), (0, 6, 7), (1, 5, 7), (1, 3, 8), (1, -1, -1)]
    for channel, position, token, *dtype in wrong:
        with pytest.raises(AssertionError, match="wrong: .*, which holds "):
            seen.check_place("wrong", channel, position, token, *(dtype or [torch.bfloat16]))


def test_every_class_behind_the_interface_is_in_a_model_that_is_checked():
    """A class that a release adds fails here until its family has an entry, if only one that says why it is refused."""
    for name, classes in discover().items():
        families = [(key, family) for key, family in FAMILIES.items() if key.partition(":")[0] == name]
        inside = {type(module).__name__ for key, family in families for module in tiny_model(key, family).modules()}
        assert set(classes) <= inside, f"{name}: add {sorted(set(classes) - inside)} to FAMILIES"


def test_two_stacks_of_one_model_and_layers_of_neither():
    """Thinker and talker have layers of their own; the talker's code predictor has MLPs, but no experts."""
    config = {
        "talker_config": {"text_config": {"shared_expert_intermediate_size": 20}, "spatial_merge_size": 2},
        "code2wav_config": {"decoder_dim": 32, "upsample_rates": [2, 2], "upsampling_ratios": [2]},
    }
    model = tiny_model("qwen3_omni_moe", Family("", config, model="Qwen3OmniMoeForConditionalGeneration"))
    banks = find_banks(model)
    assert layers_per_stack(model, banks) == {"decoder": 3, "talker": 3}
    assert [str(bank.id) for bank in banks] == [
        *(f"decoder.{layer}.routed" for layer in range(3)),
        *(f"talker.{layer}.{kind}" for layer in range(3) for kind in ("routed", "shared")),
    ]
    assert not any("code_predictor" in bank.path for bank in banks)
