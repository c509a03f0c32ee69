"""The command ``seqlong``: verbs, their help, and errors without tracebacks. Heavy imports wait until a verb runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from seqlong import __version__
from seqlong.errors import ConfigError, SeqlongError, nearest

#: Verb -> (what it does, an example).
VERBS = {
    "fit": ("train", "seqlong fit experiment=dna/demo trainer.max_steps=50"),
    "validate": ("measure on the validation data", "seqlong validate --ckpt_path best"),
    "test": ("measure on the test data", "seqlong test --ckpt_path runs/demo-.../checkpoints/last.ckpt"),
    "predict": ("write predictions into a run folder", "seqlong predict --ckpt_path best data.path=other.fa.gz"),
    "sweep": (
        "train once for every combination",
        "seqlong sweep experiment=dna/demo model.backbone.d_model=64,128 seed=1,2",
    ),
    "launch": (
        "write a job script for SLURM, or lines for torchrun",
        "seqlong launch slurm experiment=dna/pretrain data.path=my.fa.gz --nodes 2 > job.sh",
    ),
    "recall": ("ask a model what it remembers, or tell the best of a sweep", "seqlong recall runs/demo-... passkey"),
    "show": ("show a model: its blocks, parameters, state and FLOPs", "seqlong show model=hybridna_300m"),
    "plan": ("predict memory, time and the longest row", "seqlong plan model=hybridna_300m --gpu h100 --gpus 1,8,64"),
    "words": ("say what other libraries call things", "seqlong words window"),
    "report": ("write the HTML report of a run again", "seqlong report runs/demo-20260801-120000"),
    "video": ("look at video files: what they hold, what decodes", "seqlong video check clips/"),
    "score": (
        "annotate a VCF with how likely each variant is",
        "seqlong score variants.vcf.gz --ref ref.fa --ckpt last --window 8192,65536",
    ),
    "variants": (
        "learn from labelled variants which are damaging, on a frozen model",
        "seqlong variants labelled.vcf --ref ref.fa --ckpt last --label CLASS=LOF",
    ),
    "embed": ("hidden states of whole chromosomes as an array", "seqlong embed ref.fa --ckpt last --output ref.npy"),
    "track": (
        "how likely every base is, or predicted tracks, as a bigWig",
        "seqlong track ref.fa --ckpt last --output ref.bw",
    ),
    "generate": (
        "draw sequences, or texts",
        "seqlong generate --ckpt last --prompt ATGAAACGC --length 1000 --temperature 0.9",
    ),
    "harness": (
        "run tasks of lm-evaluation-harness on a model of text",
        "seqlong harness lambada_openai --ckpt last --limit 100",
    ),
    "attribute": ("which bases matter, as a logo", "seqlong attribute chr7:1000-1100 ref.fa --ckpt last"),
    "reach": ("how much of its context a model uses", "seqlong reach ref.fa --ckpt last --contexts 256,4096,65536"),
    "seen": ("what of a region was trained on", "seqlong seen chr7:1-2000 ref.fa --ckpt last"),
    "check-rc": ("compare a model on both strands", "seqlong check-rc --ckpt last"),
    "tokenizer": ("train a tokenizer on your own text", "seqlong tokenizer train books/ --size 8192"),
    "shards": ("make, check and index tar shards", "seqlong shards check shards/"),
    "bench": ("list or run the benchmarks", "seqlong bench"),
    "doctor": ("check this machine: what each op runs as, how right and how fast", "seqlong doctor"),
}
# Verb -> the module whose `command(words) -> exit status` serves it; the others go through Hydra and LightningCLI.
_COMMANDS = {
    "launch": "seqlong.slurm",
    "recall": "seqlong.recall",
    "show": "seqlong.show",
    "plan": "seqlong.planning.command",
    "words": "seqlong.words",
    "report": "seqlong.report.command",
    "video": "seqlong.video",
    "tokenizer": "seqlong.tokenizer",
    "shards": "seqlong.shards",
    "bench": "seqlong.bench",
    "doctor": "seqlong.doctor",
    "score": "seqlong.inference.score",
    "variants": "seqlong.inference.supervised",
    "embed": "seqlong.inference.embed",
    "track": "seqlong.inference.track",
    "generate": "seqlong.inference.generate",
    "harness": "seqlong.inference.harness",
    "attribute": "seqlong.inference.attribute",
    "reach": "seqlong.inference.reach",
    "seen": "seqlong.inference.seen",
    "check-rc": "seqlong.inference.check_rc",
}
_LIGHTNING = ("fit", "validate", "test", "predict")
# Flags that stand alone; every other flag may take its value from the next word.
_ALONE = ("-h", "--help", "--print_config")
_TAKE_NEXT = ("--ckpt_path", "--config", "-c")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0 done, 1 a bug of ours, 2 a mistake in what was given,
    130 interrupted, 143 stopped by a signal with the checkpoint saved."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except SeqlongError as error:
        rank = os.environ.get("LOCAL_RANK", "0")
        print(f"{f'[rank {rank}] ' if rank != '0' else ''}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into Hydra overrides (``key=value``) and flags (``--key=value``, also from ``--key value``).

    Raises:
        ConfigError: a bare word.
    """
    overrides: list[str] = []
    flags: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
        elif "=" in word or word in _ALONE:
            flags.append(word)
        elif word in _TAKE_NEXT:
            if not rest:
                raise ConfigError(f"{word} needs a value, such as {word} {'last' if 'ckpt' in word else 'config.yaml'}")
            flags.append(f"{word}={rest.pop(0)}")
        elif rest and not rest[0].startswith("-") and "=" not in rest[0]:
            flags.append(f"{word}={rest.pop(0)}")
        else:
            flags.append(word)
    return overrides, flags


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        from seqlong.help import overview

        print(overview(VERBS))
        return 0
    verb, rest = words[0], words[1:]
    if verb in ("--version", "-V"):
        print(f"seqlong {__version__}")
        return 0
    if verb not in VERBS:
        raise ConfigError(f"seqlong has no verb '{verb}'{nearest(verb, VERBS) or '.'} The verbs: {', '.join(VERBS)}")
    if verb in _COMMANDS:
        return int(import_module(_COMMANDS[verb]).command(rest) or 0)
    overrides, flags = split(rest)
    if any(flag in ("-h", "--help") for flag in flags):
        from seqlong.help import verb_help

        print(verb_help(verb, overrides, VERBS))
        return 0
    if verb == "sweep":
        from seqlong.sweep import sweep

        return sweep(overrides, flags)
    from seqlong.launch import launch

    return launch(verb, overrides, flags)
