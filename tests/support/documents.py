"""One sample of every JSON document."""

import math

from sedetect.compression.budget import Budget, Cost, Row
from sedetect.compression.frontier import Curve, Frontier, Point
from sedetect.compression.protect import ProtectList
from sedetect.compression.pruning import Pruning
from sedetect.compression.verification import Limits, Verification, VerifiedExpert
from sedetect.experiments.divergence import Divergence
from sedetect.experiments.study import Experiment, Outcome
from sedetect.experiments.traces import ExpertTrace, Fired, Group, Traces
from sedetect.profiling.record import Context, Run
from sedetect.profiling.resume import Finished
from sedetect.stats.place import BankId, Place
from sedetect.stats.proof import Effect, Feeder, Proof, Switching, Verdict
from sedetect.stats.residual import Formation, LayerResidual, Observation, Residual, Writer
from sedetect.training.histories import History, Timeline
from sedetect.training.series import State

EXPERT = Place("decoder", 1, "routed", 28)


def outcome(label, change, residual=7.5):
    sinks = {"sink_mean": None, "sinks": [None, 0.5], "sink_decay": [None, 0.1], "residual_max": residual}
    changes = {"change": {"code": change}, "mean_change": change}
    return Outcome(label, ["L1E28"], "skip", "all", {"code": 9.5}, **sinks, accuracy=0.5, **changes)


LAYER = LayerResidual(1, 900.0, 101, 0, 3, 2, "code", 0.5, None, 4, 0, [0.25, 0.75])
FORMED = Formation(
    "formed",
    1,
    101,
    "code",
    2,
    0,
    3,
    0.1,
    -900.0,
    -900.1,
    None,
    [Writer(EXPERT, 0.97, 0.6)],
    0.99,
    4,
    None,
    4,
    Writer(EXPERT, 0.6, 0.3),
)
RESIDUAL = Residual("m", "d", {"code": 2}, 128, 1, 50.0, 100.0, [LAYER] * 3, [FORMED], 1, ["a note"], ["output gates"])
WITHOUT = Residual("m", "d", {"code": 2}, 128, 1, 50.0, 100.0, [LAYER] * 3, [], 0)
EFFECT = Effect(0.125, -1.0, math.inf, 3)
DIVERGED = Divergence(9.5, math.inf, EFFECT, 0.25, 0.5, 127)
PLAN = {"decoder.1.routed": ["kept", "int4", "pruned"]}
GROUP = Group(3, 4, None, 900.0, 0.5)
COST = Cost(["L1E28"], 0.25, {"code": 9.5}, {"code": 0.5}, 0.5)
STATE = State(100, "checkpoint-100", "s", "d", 0.01, 3.5, None, None, 12.5, 0.5)
SAMPLES = {
    Timeline: Timeline("m", [STATE], [History(EXPERT, [7.5], [None], [1], [True], 100, 100)], [], None, ["a note"]),
    Run: Run("d", "2026-01-01T00:00:00+00:00", "cpu", 1.5, 8192, {3: "<s>", 17: "é"},
             [Context("s", 2, 0, "", "a", "b")]),
    Residual: RESIDUAL,
    Observation: Observation(RESIDUAL, WITHOUT, ["L1E28"]),
    Experiment: Experiment("m", "d", "float32", {"code": 128}, outcome("none", 0.0), [outcome("all", 0.5)],
                           {"same layers": [outcome("all", 0.25)], "anywhere": []}, 8),
    Traces: Traces("m", 256, {"code": 2}, False, [
        ExpertTrace(EXPERT, 3, 1, [Fired("code", 2, 0, 3, None, 0.5, None, 101)], {"first": GROUP}, {"0": GROUP},
                    {3: GROUP}, {3: None}),
    ], ["a note"]),
    Proof: Proof("m", "d", 1536, 3, 0.03, 0.05, 0.07, None, 900.0, 0.003, [
        Verdict("L1E28", "proved", "why", EFFECT, EFFECT, 3, 2, ["L3E2"], [Feeder("L0E24", 0.1)]),
        Verdict("L9E7", "undecided", "why", None, None, 0, 0),
    ], [Switching("all", ["L1E28"], EFFECT, 0.02, 90.0)], [Switching("control 1", [], EFFECT)], 1.5, "no sinks",
                 ["a note"]),
    Budget: Budget("m", "float32", "reap", 128, ["L1E28"], COST, [
        Row("int4", COST, COST, [COST]), Row("int3", Cost([], 0.2, {"code": math.inf}, {"code": math.inf}, math.inf),
                                             None, []),
    ], {"code": 128}, ["a note"]),
    Verification: Verification("m", "m-int4", Limits(0.05, None), None, "d", "e", {"code": 128}, {"code": DIVERGED},
                               DIVERGED, [VerifiedExpert("L1E28", "equal", True, 900.0, None)],
                               {"decoder.1.routed": 0.25}, [900.0, math.inf], [None, 0.5], ["a failure"], ["a note"]),
    Pruning: Pruning({"model": "m", "ratio": 0.25}, {BankId("decoder", 1, "routed"): [0, 2, 28]}),
    Frontier: Frontier("m", "d", "float32", 128, ["L1E0"], 48.0, {"code": 7.5}, {"code": 64}, 64, {
        "decoder.1.routed": {"int4": 0.01, "pruned": 0.5},
    }, [Curve("expert", True, None, [Point(24.0, 22.5, PLAN, 0.1, 0.0, {"code": math.inf}, EFFECT, EFFECT)]),
        Curve("layer", False, 1, [Point(24.0, 22.5, PLAN, 0.1, None, {"code": 8.5}, EFFECT)])], ["a note"]),
    ProtectList: ProtectList("m", "d", 128, "layer", ["layers.1.mlp.experts"], [{"name": "L1E28"}]),
    Finished: Finished(3, 1.25, {"batch size": 2, "domains": ["code"]}),
}  # fmt: skip
