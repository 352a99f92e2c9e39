"""Find the published super experts of three models from their first token, without downloading them.

    python examples/reproduce_published.py                # all three, about 11 GB over the network in all
    python examples/reproduce_published.py Mixtral        # those whose name has it

The expected sets are those of arXiv 2507.23279, of which the experts that fire on the first token can be seen here.
"""

import sys

import sedetect

PUBLISHED = {
    "Qwen/Qwen3-30B-A3B": {"L1E68", "L2E92", "L3E82"},
    "mistralai/Mixtral-8x7B-v0.1": {"L1E3"},
    "deepseek-ai/DeepSeek-V2-Lite": {"L3E54", "L4E38"},
}


def main(wanted: str = "") -> int:
    missed = 0
    for name, expected in PUBLISHED.items():
        if wanted.lower() not in name.lower():
            continue
        found = sedetect.locate(name, told=lambda reading: print(f"reads at most {sum(reading[:2]) / 1e9:.2f} GB"))
        names = {str(one) for one in found.candidates}
        missed += not expected <= names
        print(f"{name}: {found.headline}")
        print(f"    published {', '.join(sorted(expected))}: {'found' if expected <= names else 'NOT all found'}")
        print(f"    {found.bytes_read} in {found.seconds:.0f} s")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
