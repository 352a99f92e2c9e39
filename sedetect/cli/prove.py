"""sedetect prove: which candidates the model depends on, by switching them off where they fire."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedetect.cli.proof_tables import print_proof
from sedetect.cli.shared import (
    PROVE,
    Attn,
    BatchSize,
    Data,
    Device,
    Dtype,
    Model,
    Output,
    Revision,
    SeqLen,
    TrustRemoteCode,
    app,
    check_writable,
    print_line,
    progress_bar,
    saved_after,
)
from sedetect.results import Results


@app.command("prove", rich_help_panel=PROVE)
def prove_command(
    model: Model,
    experts: Annotated[
        str | None, typer.Option(help="names (L1E28,L8shared; default: the candidates of the statistics)")
    ] = None,
    stats: Annotated[Path | None, typer.Option(help="statistics of this model (default: profile it first)")] = None,
    output: Output = None,
    chain: Annotated[bool, typer.Option(help="also find the upstream experts that they depend on to fire")] = False,
    smallest: Annotated[float, typer.Option(help="smallest relative rise of perplexity that matters")] = 0.02,
    level: Annotated[float, typer.Option(help="probability that any interval misses the true effect")] = 0.05,
    data: Data = None,
    tokens: Annotated[int, typer.Option(help="tokens of text outside the statistics")] = 32768,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Switch the candidates of MODEL off where they fire, and report which ones the model depends on."""
    from sedetect.calibration.held_out import refuse_other_windows
    from sedetect.calibration.windows import Text, calibration_windows, check_text
    from sedetect.checkpoints.options import Loading
    from sedetect.experiments.proof import check_names, check_numbers
    from sedetect.models.identity import check_statistics
    from sedetect.models.layers import refuse_without_logits
    from sedetect.models.loading import prepare_model
    from sedetect.profiling.pipeline import profile_model
    from sedetect.profiling.proving import Proving, prove_profile

    check_numbers(smallest, level)
    if output is not None:
        check_writable(output)
    text = Text(tokens, seq_len, batch_size)
    check_text(data, text)
    state = None if stats is None else Results(stats).stats()
    prepared = prepare_model(model, loading=Loading(device, dtype, revision, attn, trust_remote_code))
    refuse_without_logits(prepared.empty, "proof")
    check_names(prepared.empty, experts)
    domains = calibration_windows(prepared.empty, prepared.tokenizer, data, text).domains
    if state is not None:
        check_statistics(state.header, prepared.empty, str(stats))
        refuse_other_windows(domains, state, seq_len)
    loaded, tokenizer, _, _ = prepared.load()
    if state is not None:
        check_statistics(state.header, loaded, str(stats))
    with progress_bar("runs") as bar:
        task = bar.add_task("profile", total=None)
        if state is None:
            state = profile_model(loaded, data, text=text, tokenizer=tokenizer).stats
        proof = prove_profile(
            loaded,
            tokenizer,
            data,
            text,
            state,
            Proving(experts, tokens, smallest, level, chain),
            progress=lambda label, done, total, seconds: bar.update(
                task, description=f"{label} (about {seconds:.0f} s in all)", completed=done, total=total
            ),
        )
    if proof is None:
        print_line("nothing to prove: the statistics give no candidate; name experts to try with --experts")
        return
    with saved_after(None if output is None else Results(output).proof_path, proof.save):
        print_proof(proof)
