"""sedetect profile, rank, merge."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sedetect.cli.choices import Saliency
from sedetect.cli.proof_tables import print_runs
from sedetect.cli.ranked import print_saliency
from sedetect.cli.shared import (
    FILES,
    MEASURE,
    Attn,
    Backend,
    BatchSize,
    Data,
    Device,
    Dtype,
    Model,
    Output,
    Revision,
    Seed,
    SeqLen,
    Tokens,
    TrustRemoteCode,
    app,
    check_file,
    check_writable,
    console,
    hidden,
    interruptible,
    is_first_rank,
    progress_bar,
    saved_after,
    stderr,
    uncollected,
)
from sedetect.cli.tables import print_domains, print_modalities, print_ranking, print_run, ranking_document
from sedetect.errors import SedetectError
from sedetect.files import check_space, remove_leftovers, write_atomic, write_json
from sedetect.results import Results

if TYPE_CHECKING:
    from sedetect.profiling.pipeline import ModelProfile
    from sedetect.profiling.streaming import Streamed
    from sedetect.ranking.result import Ranking

_PROVED = 8  # sequences whose residual stream is observed for a proof without --residual
Percentile = Annotated[float, typer.Option(help="percentile of the population an expert must exceed")]
Fraction = Annotated[float, typer.Option(help="fraction of the largest value an expert must exceed")]
Layers = Annotated[
    str,
    typer.Option(
        help="the first layers, as a fraction, that may hold the set; 'data': those that form massive activations"
    ),
]
Compat = Annotated[
    Literal["published-tool"] | None,
    typer.Option(help="published-tool: the published tool's rule, with its floor division"),
]
RowsOption = Annotated[
    Literal["all", "first"],
    typer.Option("--rows", help="'first': the rows that the published tool records (profile --first-rows)"),
]
MinValue = Annotated[float, typer.Option(help="smallest max|y| of an expert that stands out")]
MinRatio = Annotated[float, typer.Option(help="smallest multiple of its layer's median")]


@app.command("profile", rich_help_panel=MEASURE)
def profile_command(
    model: Model,
    output: Output = None,
    data: Data = None,
    tokens: Tokens = 32768,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    seed: Seed = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="apply the tokenizer's chat template")] = False,
    domains: Annotated[
        str | None,
        typer.Option(
            help="domains by name: 'text' is all of the data, 'images' the drawn images (default: text; without "
            "--data and for a model that takes images: text,images)"
        ),
    ] = None,
    channels: Annotated[bool, typer.Option("--channels", help="also record maxima and squares per channel")] = False,
    coactivation: Annotated[
        bool, typer.Option("--coactivation", help="also count pairs of experts chosen together")
    ] = False,
    first_rows: Annotated[
        bool,
        typer.Option(
            "--first-rows", help="also record each expert's first row per sequence, as the published tool does"
        ),
    ] = False,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="also measure the multi-token prediction head, if the model has one")
    ] = False,
    residual: Annotated[
        int | None, typer.Option(help="also observe the residual stream and attention of N sequences")
    ] = None,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="then switch the candidates off where they fire, on held-out text"),
    ] = False,
    until_stable: Annotated[int | None, typer.Option(help="stop after N rounds without a change in the set")] = None,
    stream: Annotated[
        bool | None,
        typer.Option(help="one layer at a time from disk (default: if the weights do not fit the device)"),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="when streaming with -o: save progress so that the same command can resume")
    ] = True,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = None,
    revision: Revision = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run calibration text through MODEL and find candidates for super experts."""
    if output is not None:
        check_writable(output)
    unfinished = Results(output).resume_path if output is not None and resume else None
    starting = ExitStack()  # until the first batch is done
    starting.enter_context(uncollected())

    from sedetect.profiling.processes import join

    with starting, join() as ranks, interruptible() as stop, progress_bar() as bar:
        task = bar.add_task("loading", total=None)
        device = ranks.device(device)

        def show(domain: str, done: int, total: int | None) -> None:
            starting.close()
            bar.update(task, description=domain, completed=done, total=total)

        def measure() -> ModelProfile:
            from sedetect.checkpoints.prefetch import prefetch

            # Before transformers is imported, which takes longer than reading the weights.
            ahead = None if stream else prefetch(model, device, dtype, ranks.rank / ranks.count)
            if ahead is not None:
                starting.callback(ahead.close)

            from sedetect.calibration.windows import Text
            from sedetect.checkpoints.memory import too_large
            from sedetect.checkpoints.options import Loading
            from sedetect.models.measure import Measuring

            with hidden("sklearn", "scipy"):
                from sedetect.profiling.pipeline import profile_model
                from sedetect.profiling.proving import Proving

            undecided = stream is None and ahead is None and Path(model).is_dir()
            why = too_large(model, device, dtype) if undecided else None
            if why is not None and is_first_rank():
                stderr.print(f"{model}: {why}", markup=False, highlight=False, soft_wrap=True)
            return profile_model(
                ahead or model,
                data,
                text=Text(tokens, seq_len, batch_size, seed, chat_template, _names(domains)),
                loading=Loading(device, dtype, revision, attn, trust_remote_code),
                measuring=Measuring(backend, channels, coactivation, first_rows),
                residual=_PROVED if prove and residual is None else residual,
                proving=Proving() if prove else None,
                until_stable=until_stable,
                keep_rounds=until_stable is not None and output is not None,
                stream=bool(stream) or why is not None,
                resume=unfinished / ranks.name if unfinished is not None and ranks.count > 1 else unfinished,
                part=ranks.part,
                mtp=mtp,
                progress=show,
                stop=stop,
            )

        result = ranks.run(measure)
    if result is None:  # only the first rank has it
        return
    if result.stats.banks:
        _show(result, output, model)
        if result.streamed is not None and output is not None and unfinished is not None:
            from sedetect.profiling.resume import discard

            discard(unfinished)
            # left by earlier runs that were killed while writing the results
            for folder in (output, Results(output).domains.path):
                remove_leftovers(folder)
    if result.interrupted:
        if result.streamed is not None and unfinished is not None:
            finished = result.streamed.resumed + result.streamed.layers
            saved = f"{finished} layers are finished; the same command resumes from there"
        elif output is None:
            saved = "nothing saved (no -o)"
        else:
            saved = f"saved to {output}" if result.stats.banks else "nothing to save"
        text = f"interrupted after {result.stats.header.tokens:,} of {tokens:,} tokens; {saved}"
        stderr.print(text, markup=False, soft_wrap=True)
        raise typer.Exit(130)


@app.command("rank", rich_help_panel=FILES)
def rank_command(
    stats: Annotated[Path, typer.Argument(help="a statistics file, or the folder of a profile", metavar="STATS")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="write the ranking as JSON")] = None,
    by: Annotated[Saliency | None, typer.Option(help="a saliency")] = None,
    percentile: Percentile = 99.5,
    fraction: Fraction = 0.1,
    layers: Layers = "0.75",
    residual: Annotated[
        Path | None, typer.Option(help="residual.json of the same model (default: the one in the folder)")
    ] = None,
    compat: Compat = None,
    rows: RowsOption = "all",
    min_value: MinValue = 50.0,
    min_ratio: MinRatio = 10.0,
) -> None:
    """Rank experts under other thresholds, or each layer's experts by a saliency (--by)."""
    from sedetect.ranking.rule import rank
    from sedetect.ranking.saliencies import saliency_document
    from sedetect.stats.residual import Residual

    if output is not None:
        check_file("-o", output, [stats])
    results = Results(stats)
    state = results.stats()
    seen = results.residual() if residual is None else Residual.load(residual)
    ranked = partial(
        rank,
        percentile=percentile,
        fraction=fraction,
        layers=_layers(layers),
        residual=seen,
        proof=results.proof(),
        compat=compat,
        min_value=min_value,
        min_ratio=min_ratio,
    )
    ranking, modalities = ranked(state, rows=rows), results.modalities.load()
    known = None if by is None else saliency_document(state, by, ranking)
    try:
        if known is None:
            print_ranking(console, ranking, residual=seen)
        else:
            print_saliency(known)
        by_modality = {name: ranked(part) for name, part in modalities.items()}
        print_modalities(console, state, modalities, by_modality, by or "reap")
        print_run(console, state)
    finally:  # whoever reads may have left
        if output is not None:
            write_json(output, ranking_document(ranking, None) if known is None else known.to_dict())


def _layers(value: str) -> float | str:
    try:
        return value if value == "data" else float(value)
    except ValueError:
        raise SedetectError(
            f"--layers {value}: is not a fraction; give a number above 0 and at most 1, or 'data'"
        ) from None


@app.command("merge", rich_help_panel=FILES)
def merge_command(
    stats: Annotated[list[Path], typer.Argument(help="statistics files of one model", metavar="STATS...")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the merged statistics file")],
) -> None:
    """Merge statistics of one model on different texts."""
    from sedetect.ranking.rule import rank
    from sedetect.stats.model import ModelStats

    check_file("-o", output, stats)
    merged = ModelStats.empty()
    for file in stats:
        state = ModelStats.load(file)
        try:
            merged = merged.merge(state)
        except SedetectError as error:
            raise SedetectError(f"{file}: ", *error.args) from None
    try:
        print_ranking(console, rank(merged))
        print_run(console, merged)
    finally:  # whoever reads may have left
        merged.save(output)


def _names(domains: str | None) -> tuple[str, ...] | None:
    return None if domains is None else tuple(name.strip() for name in domains.split(",") if name.strip())


def _show(result: ModelProfile, output: Path | None, model: str) -> None:
    """Print, then save."""
    from sedetect.ranking.rule import rank

    ranking = rank(result.stats, residual=result.residual, proof=result.proof)
    with saved_after(output, lambda output: _save(result, ranking, output, model)):
        print_ranking(console, ranking, result.tokenizer, result.residual)
        if result.proof is not None:
            print_runs(result.proof)
        by_domain, by_modality = (
            {name: rank(stats, residual=result.residual, proof=result.proof) for name, stats in parts.items()}
            for parts in (result.domains, result.modalities)
        )
        print_domains(console, by_domain)
        print_modalities(console, result.stats, result.modalities, by_modality)
        resumed = result.streamed is not None and result.streamed.resumed > 0
        print_run(console, result.stats, None if resumed else result.seconds)  # the times do not cover all layers
        if result.streamed is not None:
            console.print(_streamed(result.streamed), markup=False, highlight=False, soft_wrap=True)
        if result.rounds:
            console.print(_stability(result), markup=False, highlight=False, soft_wrap=True)


def _save(result: ModelProfile, ranking: Ranking, output: Path, model: str) -> None:
    from sedetect.profiling.record import describe_run

    results = Results(output)
    result.stats.save(results.stats_path)  # first: the others follow from this file or refine it
    write_json(results.ranking_path, ranking_document(ranking, result.tokenizer))
    pruned = Path(model) / results.pruning_path.name
    if pruned.is_file():  # compare maps expert numbers by this file
        write_atomic(results.pruning_path, lambda temporary: shutil.copyfile(pruned, temporary))
    else:
        results.pruning_path.unlink(missing_ok=True)  # of another run, as below
    parts = (*result.domains.values(), *result.modalities.values(), *result.shards)
    check_space(output, sum(part.nbytes for part in parts))
    results.domains.save(result.domains)
    results.modalities.save(result.modalities)
    results.rounds.save({f"{number:03}": shard for number, shard in enumerate(result.shards)})
    describe_run(result, ranking).save(results.run_path)
    for path, document in ((results.residual_path, result.residual), (results.proof_path, result.proof)):
        if document is None:
            path.unlink(missing_ok=True)
        else:
            document.save(path)


def _streamed(took: Streamed) -> str:
    """One line: how the layers spent the time."""
    resumed = f", {took.resumed} were finished before" if took.resumed else ""
    parts = {
        "read": took.read,
        "computed": took.compute,
        "waited for weights": took.wait,
        "kept for a restart": took.write,
    }
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
    return f"streamed {took.layers} layers{resumed}: {times}"


def _stability(result: ModelProfile) -> str:
    """One line: how many tokens the candidates needed."""
    tokens, names = result.rounds[-1]
    found = ", ".join(names) or "no candidate"
    if result.stable_after is None:
        return f"not stable: {found} after {tokens:,} tokens ({_counted(len(result.rounds))}); give more --tokens"
    return f"stable: {found} from {result.stable_after:,} tokens on, {tokens:,} in all ({_counted(len(result.rounds))})"


def _counted(rounds: int) -> str:
    return f"{rounds} round{'s' * (rounds != 1)}"
