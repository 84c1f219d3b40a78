"""Make the package's own policy of what `dit4dit demo-train` left.

    python examples/tabletop/ship_policy.py demo-train/seed-0 FOLDER

Weights in half precision, of the VAE only the encoder, which is all that a policy runs: 5 MB are what a source tree can carry.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from dit4dit.checkpoints import checksums, native
from dit4dit.checkpoints.checkpoint import VAE, open_checkpoint
from dit4dit.errors import CheckpointError
from dit4dit.files.keys import read_json

LIMIT = 5_000_000
COMMAND = "make demo-train"


def ship(source: Path, target: Path) -> None:
    """Write the policy of the demo-train folder `source` into the new folder `target`, with metrics.json.

    Raises:
        CheckpointError: more than 5 MB, or trained outside of a repository, so that no commit says what made it.
    """
    result = read_json(source / "demo-train.json")
    if not result.get("commit"):
        raise CheckpointError(f"{source}: demo-train.json names no commit; run {COMMAND} in a clone of the repository")
    checkpoint = open_checkpoint(result["policy"], None)
    kept = tuple(VAE + part for part in ("encoder.", "quant_conv."))
    names = [n for n in checkpoint.tensors if not n.startswith(VAE) or n.startswith(kept)]
    with native.new_folder(target) as partial:
        native.write_folder(
            partial,
            model=checkpoint.model,
            embodiment=checkpoint.embodiment,
            tensors={name: checkpoint.tensors[name].half() for name in names},
        )
        native.write_json(partial / "statistics.json", checkpoint.statistics)
        shutil.copytree(Path(result["policy"]) / "tokenizer", partial / "tokenizer")
        facts = {
            key: result[key] for key in ("seed", "success", "demonstrations", "recipe", "execute", "seconds", "machine")
        }
        native.write_json(
            partial / "metrics.json",
            {
                "command": f"{COMMAND} SEED={result['seed']}",
                "commit": result["commit"],
                "precision": "float16",
                **facts,
            },
        )
        checksums.write(partial)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        if size > LIMIT:
            raise CheckpointError(f"{target}: {size} bytes, more than {LIMIT}; train a smaller model")


if __name__ == "__main__":
    import tyro

    tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(ship))
